"""A small program of a user's, whose types mypy and pyright check against the installed package."""

import sys
from typing import Iterator, List

from llama import (
    ChatPrediction,
    CompletionPrediction,
    Dialog,
    Event,
    KVCache,
    Llama,
    Message,
    ModelArgs,
    SamplingParams,
    Tokenizer,
    Transformer,
    tool_schema,
)


def population(city: str) -> int:
    """How many people live in a city."""
    return {"Paris": 2_100_000}[city]


def ask(llama: Llama, question: str) -> str:
    message: Message = {"role": "user", "content": question}
    dialog: Dialog = [message]
    answers: List[ChatPrediction] = llama.chat_completion([dialog], temperature=0, max_gen_len=16)
    return answers[0]["generation"]["content"]


def stream(llama: Llama, text: str) -> Iterator[str]:
    params = SamplingParams(temperature=0.8, top_k=50)
    events: Iterator[Event] = llama.stream_text([text], max_gen_len=8, params=params, seed=7)
    for event in events:
        yield event.text


def count(tokenizer: Tokenizer, texts: List[str]) -> int:
    return sum(len(tokenizer.encode(text, bos=True, eos=False)) for text in texts)


def shape(model: Transformer) -> ModelArgs:
    return model.params


def main(ckpt_dir: str) -> None:
    llama = Llama.build(ckpt_dir, max_seq_len=64, max_batch_size=2, quantize="int8")
    completions: List[CompletionPrediction] = llama.text_completion(["Once"], max_gen_len=4)
    print(completions[0]["generation"], completions[0]["finish_reason"])
    print(ask(llama, "Why?"), *stream(llama, "Once"), count(llama.tokenizer, ["a", "b"]))
    print(shape(llama.model).dim, KVCache.__name__, tool_schema(population))


if __name__ == "__main__":
    main(sys.argv[1])
