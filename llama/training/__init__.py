"""Losses and fine-tuning; `llama finetune` is the command."""

from llama.training.data import Example, dialog_example, read_examples, text_examples
from llama.training.gradients import clip_gradients, sum_replicas, trained
from llama.training.losses import IGNORED, next_token_loss, summed_loss
from llama.training.trainer import Recipe, Step, Trainer, recompute_blocks

__all__ = [
    "IGNORED",
    "Example",
    "Recipe",
    "Step",
    "Trainer",
    "clip_gradients",
    "dialog_example",
    "next_token_loss",
    "read_examples",
    "recompute_blocks",
    "sum_replicas",
    "summed_loss",
    "text_examples",
    "trained",
]
