"""A Llama for EleutherAI's lm-evaluation-harness, an optional dependency.

Needs `pip install 'llama-reference[eval]'`.
"""

from typing import Any, Dict, List, Literal, Optional, Sequence, Set, Tuple

from tqdm import tqdm

from llama.engine.scoring import score_continuations
from llama.generation import Llama

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ImportError as error:
    raise ValueError(
        f"llama eval needs lm_eval ({error}): pip install 'llama-reference[eval]'"
    ) from error

__all__ = ["HarnessModel", "TaskManager", "lm_eval", "make_table"]

MAX_GEN_TOKS = 256  # where a task doesn't say; what the harness's own models do


class HarnessModel(TemplateLM):
    """A Llama as lm_eval sees a model: `lm_eval.simple_evaluate(HarnessModel(llama), ...)`.

    Follows the harness's own `HFLM`: a prefix of bos, or eos where there is none; what is too long
    is truncated on the left. Chat templates aren't applied.

    Args:
        parse_special: names of special tokens in a task's texts become control tokens, as HFLM has
            it. By default they are text.
    """

    def __init__(self, llama: Llama, parse_special: bool = False):
        super().__init__()
        self.llama, self.parse_special = llama, parse_special
        self.max_length = llama.model.params.max_seq_len
        self.batch_size = llama.model.params.max_batch_size
        self._engine = llama.engine(max_rows=self.batch_size)

    @property
    def eot_token_id(self) -> int:
        return self.llama.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.llama.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: Optional[bool] = None, **kwargs: Any
    ) -> List[int]:
        """Token ids; bos in front where the tokenizer adds it, unless add_special_tokens=False."""
        tokenizer = self.llama.tokenizer
        bos = tokenizer.add_bos and add_special_tokens is not False
        special: Literal["all"] | Set[str] = "all" if self.parse_special else set()
        return tokenizer.encode(string, bos=bos, eos=False, allowed_special=special)

    def _loglikelihood_tokens(
        self, requests: Sequence[Tuple[Any, List[int], List[int]]], disable_tqdm: bool = False
    ) -> List[Tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding gives it."""
        pairs = []
        for _, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)  # the last token isn't fed
            if room < 1:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, and max_seq_len is "
                    f"{self.max_length}: choose a larger max_seq_len"
                )
            pairs.append((context[-room:], continuation))
        found: List[Tuple[float, bool]] = []
        step = 32 * self.batch_size  # enough to find equal contexts among
        for begin in tqdm(range(0, len(pairs), step), "scoring", disable=disable_tqdm):
            part = pairs[begin : begin + step]
            found += score_continuations(self._engine, part, self.batch_size)
        return found

    def loglikelihood_rolling(self, requests: List[Any], disable_tqdm: bool = False) -> List[float]:
        """Log-probability of each whole text, its first token given bos or eos.

        In windows of max_seq_len that don't overlap, but for the last, which is filled up.
        """
        windows, owners = [], []
        for row, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for pair in map(make_disjoint_window, rolling):
                windows.append((None, *pair))
                owners.append(row)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for row, (total, _) in zip(owners, scores, strict=True):
            totals[row] += total
        return totals

    def generate_until(self, requests: List[Any], disable_tqdm: bool = False) -> List[str]:
        """Continue each context until one of its strings or the end; greedily unless do_sample."""
        groups: Dict[str, List[int]] = {}  # requests with the same arguments go together
        for row, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(row)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm) as progress:
            for rows in groups.values():
                options = _generation_options(requests[rows[0]].args[1])
                rows.sort(key=lambda row: -len(requests[row].args[0]))
                for begin in range(0, len(rows), self.batch_size):
                    batch = rows[begin : begin + self.batch_size]
                    prompts = [
                        self._fitting(requests[row].args[0], options["max_gen_len"])
                        for row in batch
                    ]
                    done, _ = self.llama.generate(prompts, **options)
                    for row, ids in zip(batch, done, strict=True):
                        answers[row] = _before(options["stop"], self._decode(ids))
                    progress.update(len(batch))
        return answers

    def _decode(self, ids: List[int]) -> str:
        """The text of an answer; as control tokens, special ones have none."""
        special = self.llama.tokenizer.special_tokens.values() if self.parse_special else ()
        return self.llama.tokenizer.decode([id for id in ids if id not in special])

    def _fitting(self, prompt: str, max_gen_len: int) -> List[int]:
        """The ids of a prompt, truncated on the left so that its answer fits."""
        room = self.max_length - max_gen_len
        if room < 2:
            raise ValueError(
                f"the task asks for {max_gen_len} new tokens, and max_seq_len is "
                f"{self.max_length}: choose a larger max_seq_len"
            )
        ids = self.tok_encode(prompt)
        if not ids:
            raise ValueError("an empty prompt, and the tokenizer adds no bos: nothing to continue")
        bos = ids[: self.llama.tokenizer.add_bos]
        return ids if len(ids) <= room else bos + ids[len(ids) - room + len(bos) :]


def _before(stops: Sequence[str], text: str) -> str:
    """A text up to the first of these strings."""
    return text[: min(at for at in (len(text), *map(text.find, stops)) if at >= 0)]


def _generation_options(given: Dict[str, Any]) -> Dict[str, Any]:
    """A task's generation_kwargs as arguments of `Llama.generate`.

    Raises:
        ValueError: one that has no counterpart there.
    """
    left = dict(given)
    until = left.pop("until", None) or []
    lengths = [
        left.pop(name, None)
        for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    ]
    temperature, top_p = left.pop("temperature", 1.0), left.pop("top_p", 1.0)
    if not left.pop("do_sample", False):
        temperature = 0.0
    if left.get("num_beams") == 1:  # as some tasks say
        del left["num_beams"]
    if left:
        raise ValueError(f"the task asks for {left} in generating, which isn't supported")
    return {
        "stop": [until] if isinstance(until, str) else [text for text in until if text],
        "max_gen_len": next((n for n in lengths if n is not None), MAX_GEN_TOKS),
        "temperature": float(temperature),
        "top_p": float(top_p),
    }
