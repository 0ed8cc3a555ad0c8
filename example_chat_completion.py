"""Answer a few dialogs.

    torchrun --nproc_per_node 1 example_chat_completion.py
    torchrun --nproc_per_node 8 example_chat_completion.py \
        --ckpt_dir checkpoints/Meta-Llama-3-70B-Instruct --max_seq_len 512 --max_batch_size 6
"""

import sys
from typing import List, Optional

import fire

from llama import Dialog, Llama
from llama.apps.scripts import check_options
from llama.layers.parallel import is_rank_zero


def main(
    ckpt_dir: str = "checkpoints/SmolLM2-135M-Instruct",
    tokenizer_path: Optional[str] = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_batch_size: int = 4,
    max_gen_len: Optional[int] = None,
):
    """Answer a few dialogs, among them one of several turns and one with a system message.

    Args:
        ckpt_dir: Meta's params.json and consolidated.*.pth, Hugging Face's config.json and
            *.safetensors, or a .gguf file; for any number of ranks, however it is sharded.
        tokenizer_path: by default the one found with the checkpoint.
        temperature: logits are divided by it; 0 is greedy decoding.
        top_p: sample from the most probable tokens that together have this probability.
        max_seq_len: tokens of dialog and answer together.
        max_batch_size: dialogs answered at once.
        max_gen_len: tokens of an answer at most; by default up to max_seq_len.
    """
    llama = Llama.build(
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )
    dialogs: List[Dialog] = [
        [
            {"role": "user", "content": "What is the capital of Italy?"},
            {"role": "assistant", "content": "The capital of Italy is Rome."},
            {"role": "user", "content": "What is the capital of France?"},
        ],
        [
            {"role": "user", "content": "I have a free day in Lisbon. What should I see first?"},
            {"role": "assistant", "content": "Start at the Belém Tower, by the river Tagus."},
            {"role": "user", "content": "And what should I eat while I am there?"},
        ],
        [
            {"role": "system", "content": "Answer in one short sentence."},
            {"role": "user", "content": "Why does the moon change its shape?"},
        ],
        [{"role": "user", "content": "Write a haiku about a lighthouse."}],
    ]
    # max_batch_size limits a call, not the number of dialogs
    results = [
        result
        for begin in range(0, len(dialogs), max_batch_size)
        for result in llama.chat_completion(
            dialogs[begin : begin + max_batch_size],
            max_gen_len=max_gen_len,
            temperature=temperature,
            top_p=top_p,
        )
    ]
    if not is_rank_zero():
        return
    for dialog, result in zip(dialogs, results, strict=True):
        for message in dialog:
            print(f"{message['role'].capitalize()}: {message['content']}\n")
        answer = result["generation"]
        print(f"> {answer['role'].capitalize()}: {answer['content']}")
        print("\n==================================\n")


if __name__ == "__main__":
    try:
        check_options(main)
        fire.Fire(main)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
