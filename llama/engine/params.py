"""How a token is sampled: one dataclass for the Python API, the command line and the server.

torch isn't imported, so that `llama --help` needn't wait for it.
"""

import math
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Callable, Collection, List, Mapping, Optional, Sequence

if TYPE_CHECKING:
    import torch

    Processor = Callable[[List[int], torch.Tensor], torch.Tensor]
else:
    Processor = Callable


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled. The defaults for all but temperature and top_p change nothing.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token each time (greedy
            decoding).
        top_p: nucleus sampling: draw from the most probable tokens that together have this share
            of the probability, 0 to 1 (arXiv 1904.09751).
        top_k: draw from this many most probable tokens; 0 for all.
        min_p: draw from tokens at least this times as probable as the most probable one, 0 to 1
            (arXiv 2407.01082).
        typical_p: locally typical sampling: draw from the tokens whose information is nearest to
            the expected one, and that together have this share of the probability, above 0 and at
            most 1 (arXiv 2202.00666).
        repetition_penalty: positive logits of tokens in prompt and answer are divided by it,
            negative ones multiplied; above 0 (arXiv 1909.05858).
        presence_penalty: subtracted from the logit of each token that the answer has (OpenAI's
            formula).
        frequency_penalty: the same, times the number of times that the answer has it.
        no_repeat_ngram_size: no n-gram of this size occurs twice in prompt and answer; 0 for off.
        logit_bias: added to the logits of these ids.
        banned_tokens: ids that are never sampled.
        min_tokens: stop tokens are banned, and stop strings ignored, until the answer has so many
            tokens; a structured output that is complete ends nonetheless.
        guidance_scale: classifier-free guidance, above 1: log-probabilities are
            negative + scale * (own - negative), those of the negative prompt and of the own one
            (arXiv 2306.17806).
        negative_prompt: token ids in place of the prompt; its last token alone by default.
        logits_processor: called with the row's ids, prompt included, and its logits (vocab_size,);
            returns what to use in their place.

    Raises:
        ValueError: a value out of range, by name.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    banned_tokens: Collection[int] = ()
    min_tokens: int = 0
    guidance_scale: float = 1.0
    negative_prompt: Optional[Sequence[int]] = None
    logits_processor: Optional[Processor] = None

    @property
    def is_argmax(self) -> bool:
        """Whether it is greedy decoding, with nothing that changes or bans single tokens."""
        # Filters don't matter without sampling; guidance is applied to the logits before.
        plain = replace(self, top_p=1.0, top_k=0, min_p=0.0, typical_p=1.0)
        plain = replace(plain, guidance_scale=1.0, negative_prompt=None)
        return plain == _ARGMAX

    def __post_init__(self) -> None:
        def check(name: str, fits: bool, range_: str) -> None:
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)} must {range_}")

        penalties = "repetition_penalty", "presence_penalty", "frequency_penalty"
        for name in ("temperature", "top_p", "min_p", "typical_p", "guidance_scale", *penalties):
            check(name, isinstance(getattr(self, name), Real), "be a number")
        for name in ("top_k", "no_repeat_ngram_size", "min_tokens"):
            check(name, isinstance(getattr(self, name), Integral), "be a whole number")
            check(name, getattr(self, name) >= 0, "be 0 (off) or more")
        check("temperature", 0 <= self.temperature < math.inf, "be 0 (greedy) or more")
        for name in ("top_p", "min_p"):
            check(name, 0 <= getattr(self, name) <= 1, "lie between 0 and 1")
        check("typical_p", 0 < self.typical_p <= 1, "be more than 0 and at most 1")
        check("repetition_penalty", 0 < self.repetition_penalty < math.inf, "be more than 0")
        biases = self.logit_bias  # None is as good as none
        numbers = isinstance(biases, Mapping) and all(
            isinstance(value, Real) and value < math.inf for value in biases.values()
        )
        check("logit_bias", numbers or biases is None, "map token ids to numbers, or to -inf")
        banned = self.banned_tokens
        several = isinstance(banned, Collection) and not isinstance(banned, str)
        check("banned_tokens", several, "be a list of token ids")
        processor = self.logits_processor
        check("logits_processor", processor is None or callable(processor), "be one function")
        check("guidance_scale", math.isfinite(self.guidance_scale), "be a finite number")
        if self.negative_prompt is not None and not len(self.negative_prompt):
            raise ValueError("negative_prompt is empty: it takes at least one token")
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, math.isfinite(getattr(self, name)), "be a finite number")


_ARGMAX = SamplingParams(temperature=0.0, top_p=1.0)
