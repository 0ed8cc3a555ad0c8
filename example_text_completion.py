"""Continue a few texts.

    torchrun --nproc_per_node 1 example_text_completion.py
    torchrun --nproc_per_node 1 example_text_completion.py \
        --ckpt_dir checkpoints/Meta-Llama-3-8B --max_seq_len 128 --max_batch_size 4
"""

import sys
from typing import List, Optional

import fire

from llama import Llama
from llama.apps.scripts import check_options
from llama.layers.parallel import is_rank_zero


def main(
    ckpt_dir: str = "checkpoints/SmolLM2-135M-Instruct",
    tokenizer_path: Optional[str] = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int = 64,
    max_batch_size: int = 4,
):
    """Continue a few texts, among them a translation shown by example (few-shot).

    Args:
        ckpt_dir: Meta's params.json and consolidated.*.pth, Hugging Face's config.json and
            *.safetensors, or a .gguf file; for any number of ranks, however it is sharded.
        tokenizer_path: by default the one found with the checkpoint.
        temperature: logits are divided by it; 0 is greedy decoding.
        top_p: sample from the most probable tokens that together have this probability.
        max_seq_len: tokens of text and continuation together.
        max_gen_len: tokens of a continuation at most.
        max_batch_size: texts continued at once.
    """
    llama = Llama.build(
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )
    prompts: List[str] = [
        # a sentence to complete
        "The capital of France is",
        "Simply put, the tides of the sea are caused by",
        # code
        'def is_prime(n: int) -> bool:\n    """Whether n is a prime number."""\n',
        # few-shot: examples show the task
        "Translate English to French:\n\nsea => mer\nbread => pain\nhouse => maison\ncheese =>",
    ]
    # max_batch_size limits a call, not the number of prompts
    results = [
        result
        for begin in range(0, len(prompts), max_batch_size)
        for result in llama.text_completion(
            prompts[begin : begin + max_batch_size],
            max_gen_len=max_gen_len,
            temperature=temperature,
            top_p=top_p,
        )
    ]
    if not is_rank_zero():
        return
    for prompt, result in zip(prompts, results, strict=True):
        print(prompt)
        print(f"> {result['generation']}")
        print("\n==================================\n")


if __name__ == "__main__":
    try:
        check_options(main)
        fire.Fire(main)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
