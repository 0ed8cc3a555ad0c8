"""Answer questions about an image, and continue a text that begins with one.

    torchrun --nproc_per_node 1 example_multimodal_completion.py \
        --ckpt_dir checkpoints/Llama-3.2-11B-Vision-Instruct --image photo.jpg
"""

import sys
from typing import Any, List, Optional

import fire

from llama import Dialog, Llama
from llama.apps.scripts import check_options
from llama.layers.parallel import is_rank_zero


def main(
    ckpt_dir: str = "checkpoints/Llama-3.2-11B-Vision-Instruct",
    image: str = "docs/images/chat-page.png",
    tokenizer_path: Optional[str] = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 4096,
    max_batch_size: int = 4,
    max_gen_len: Optional[int] = None,
):
    """Answer questions about an image, and continue a text that begins with one.

    Args:
        ckpt_dir: a checkpoint of Llama 3.2 Vision or Llama 4, Meta's or Hugging Face's; for any
            number of ranks, regardless of how the checkpoint is sharded.
        image: a path, or an http(s) address.
        tokenizer_path: by default the one found with the checkpoint.
        temperature: logits are divided by it; 0 is greedy decoding.
        top_p: sample from the most probable tokens that together have this probability.
        max_seq_len: tokens of dialog and answer together; an image is one, in Llama 4 up to 2467.
        max_batch_size: dialogs answered at once.
        max_gen_len: tokens of an answer at most; by default up to max_seq_len.
    """
    llama = Llama.build(
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )
    picture = {"type": "image", "image": image}
    what, colors, haiku = (
        {"type": "text", "text": text}
        for text in ("What is this?", "Which colors has it?", "If I had to write a haiku for this")
    )
    dialogs: List[Dialog] = [
        [{"role": "user", "content": [picture, what]}],
        [
            {"role": "user", "content": [picture, what]},
            {"role": "assistant", "content": "A page in a browser."},
            {"role": "user", "content": [colors]},
        ],
        [{"role": "user", "content": "Write a haiku about a lighthouse."}],
    ]
    prompts: List[Any] = [[picture, haiku]]
    options: Any = {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p}
    # max_batch_size limits a call, not the number of dialogs
    answers = [
        result["generation"]["content"]
        for begin in range(0, len(dialogs), max_batch_size)
        for result in llama.chat_completion(dialogs[begin : begin + max_batch_size], **options)
    ]
    texts = [result["generation"] for result in llama.text_completion(prompts, **options)]
    if not is_rank_zero():
        return
    for dialog, answer in zip(dialogs, answers, strict=True):
        for message in dialog:
            print(f"{message['role'].capitalize()}: {_shown(message['content'])}\n")
        print(f"> Assistant: {answer}")
        print("\n==================================\n")
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{_shown(prompt)}\n> {text}")
        print("\n==================================\n")


def _shown(content: Any) -> str:
    parts = [content] if isinstance(content, str) else content
    return "".join(p if isinstance(p, str) else p.get("text", "[image] ") for p in parts)


if __name__ == "__main__":
    try:
        check_options(main)
        fire.Fire(main)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
