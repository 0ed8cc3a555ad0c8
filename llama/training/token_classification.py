"""Heads on every token: classes of tokens, and the span of a context that answers a question.

    tagger = TokenClassifier.build("checkpoints/Llama-3.2-1B", labels=["O", "NAME"])
    loss = tagger.loss(tagger(tokens), labels)
    tagger.write("checkpoints/names")
    answer = QuestionAnswerer.build("checkpoints/squad").answer("Who?", "Ada wrote it.")

Heads, losses and files are those of transformers' LlamaForTokenClassification and
LlamaForQuestionAnswering. A causal model sees of each token what stands before it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Dict, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from llama import checkpoint
from llama.backends.build import open_tokenizer
from llama.checkpoint import Checkpoint, InMemory, remote, weight_shapes
from llama.checkpoint.huggingface import HFCheckpoint, write
from llama.engine.embeddings import batches
from llama.families.registry import build
from llama.layers import parallel
from llama.layers.ids import check_token_tensor
from llama.model import Transformer
from llama.tokenizer import Tokenizer
from llama.training.heads import Body, check_labels, check_writable, config_with_head, read_head
from llama.training.losses import IGNORED

Self = TypeVar("Self", bound="_TokenHead")


class Tagged(NamedTuple):
    """A token of a text, and what it is taken for."""

    text: str  # the characters that it completes, perhaps none: all of them add up to the text
    label: str
    probability: float


def check_integers(labels: torch.Tensor) -> None:
    """ValueError for labels of floats."""
    if labels.is_floating_point():
        raise ValueError(f"labels of {labels.dtype}: integers are needed")


class _TokenHead(nn.Module):
    """A Transformer with a linear head, dim -> labels, on each token.

    Args:
        weight, bias: the head's, (len(labels), dim) and (len(labels),), whole on each rank. None
            draws the weight as transformers does, by the seed, and a bias of zeros.

    Raises:
        ValueError: no labels or one twice, or a head of another shape.
    """

    architecture: ClassVar[str]
    head: ClassVar[str]  # its module in transformers' class
    body: ClassVar[str] = "model."  # what names of the others begin with

    def __init__(
        self,
        model: Transformer,
        labels: Sequence[str],
        weight: Optional[torch.Tensor] = None,
        bias: Optional[torch.Tensor] = None,
        *,
        tokenizer: Optional[Tokenizer] = None,
        tied: Optional[bool] = None,
        seed: int = 1,
    ):
        super().__init__()
        check_labels(labels)
        n, dim = len(labels), model.params.dim
        if weight is None:
            weight = 0.02 * torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
        bias = torch.zeros(n) if bias is None else bias
        if weight.shape != (n, dim) or bias.shape != (n,):
            found = tuple(weight.shape), tuple(bias.shape)
            raise ValueError(f"a head of shapes {found}, and the model takes {((n, dim), (n,))}")
        norm = model.norm.weight
        self.model, self.labels, self.tokenizer = model, list(labels), tokenizer
        self.score = nn.Linear(dim, n, device="meta")
        self.score.weight = nn.Parameter(weight.to(norm.device, norm.dtype, copy=True))
        self.score.bias = nn.Parameter(bias.to(norm.device, norm.dtype, copy=True))
        self.tied = model.params.tied_embeddings if tied is None else tied

    @classmethod
    def build(
        cls: type[Self],
        ckpt_dir: str | Path,
        tokenizer_path: Optional[str | Path] = None,
        model_parallel_size: Optional[int] = None,
        seed: int = 1,
        *,
        labels: Optional[Sequence[str]] = None,
        device: Optional[str | torch.device] = None,
        dtype: Optional[str | torch.dtype] = None,
    ) -> Self:
        """Open a directory of transformers' class with its head, or any checkpoint that
        `Llama.build` opens with a new one, and load this rank's part of it.

        Args:
            seed: of a new head.
            labels: names for a new head.

        Raises:
            FileNotFoundError: no checkpoint there, or no such tokenizer.
            ValueError: a broken or unsupported checkpoint; no labels for a new head, or other ones
                than a checkpoint has; a tokenizer that isn't its own.
        """
        torch_device = parallel.initialize(model_parallel_size, device)
        torch_dtype = parallel.pick_dtype(dtype, torch_device)
        path = remote.local_path(ckpt_dir)
        config, names = config_with_head(path, cls.architecture), [f"{cls.head}.weight"]
        weight = bias = None
        source: Checkpoint
        if config:
            names.append(f"{cls.head}.bias")
            source = HFCheckpoint(path, {cls.architecture})
            own, weight = cls._read_head(source, path, config)
            if source.shapes().get(names[1]) != (len(own),):
                raise ValueError(f"{path} lacks {names[1]} of {len(own)} values: fetch it again")
            bias = source.read(names[1], 0, 0, len(own))
            if labels is not None and list(labels) != own:
                raise ValueError(f"{path} has the labels {own[:20]}: pass these or none")
            labels = own
        else:
            source, names = checkpoint.open(path), ["output.weight"]
            labels = cls._new_labels(path, labels)
        body, tokenizer = Body(source, names), None
        if tokenizer_path or source.tokenizer_path:
            tokenizer = open_tokenizer(body, tokenizer_path)
        model = build(body.args, device="meta")
        checkpoint.load(body, model, dtype=torch_dtype, device=torch_device)
        tied = source.args.tied_embeddings
        return cls(model, labels, weight, bias, tokenizer=tokenizer, tied=tied, seed=seed)

    @classmethod
    def _read_head(
        cls, source: HFCheckpoint, path: Path, config: Dict[str, Any]
    ) -> Tuple[List[str], torch.Tensor]:
        """The labels and the head's weight."""
        raise NotImplementedError

    @classmethod
    def _new_labels(cls, path: Path, labels: Optional[Sequence[str]]) -> Sequence[str]:
        """Those of a new head, if these are asked for."""
        raise NotImplementedError

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of each token's class: (B, T) ids -> (B, T, len(labels)), fp32.

        Differentiable. Rows are padded on the right with any id, which changes nothing before it.

        Raises:
            ValueError: ids outside of the vocabulary.
        """
        check_token_tensor(tokens, self.model.vocab_size)
        return self.score(self.model.hidden(tokens)).float()

    @torch.inference_mode()
    def predict(
        self, texts: Sequence[str | Sequence[int]], batch_size: int = 8
    ) -> List[torch.Tensor]:
        """Logits of each text, or of ids in a text's place: (tokens, len(labels)), fp32, CPU.

        Raises:
            ValueError: no list; no tokenizer; ids outside of the vocabulary; a text without tokens,
                or longer than max_seq_len, by number.
        """
        if isinstance(texts, str):
            raise ValueError("texts is one text: pass a list of texts")
        encoded = [self._encode(text) if isinstance(text, str) else list(text) for text in texts]
        found: List[torch.Tensor] = [torch.empty(0)] * len(encoded)
        args, device = self.model.params, self.score.weight.device
        for rows, tokens, _ in batches(encoded, args, batch_size, device):
            for row, logits in zip(rows, self(tokens).cpu(), strict=True):
                found[row] = logits[: len(encoded[row])].clone()
        return found

    def write(
        self, path: str | Path, dtype: Optional[torch.dtype] = None, *, force: bool = False
    ) -> Path:
        """Write a directory that transformers' class loads, from all ranks; returns it.

        Args:
            dtype: of the weights; None keeps the model's.

        Raises:
            FileExistsError: the directory exists, without `force`.
            ValueError: a model whose weights are in blocks, or compiled, or of another family; an
                adapter that isn't merged.
        """
        check_writable(self.model, self.architecture)
        if Path(path).exists() and not force:  # on all ranks alike
            raise FileExistsError(f"{path} exists: choose another name, or overwrite it with force")
        source = checkpoint.gather(self.model)
        args = replace(source.args, tied_embeddings=True)  # no output layer: see Body
        settings = {
            "architectures": [self.architecture],
            "id2label": {str(i): label for i, label in enumerate(self.labels)},
            "label2id": {label: i for i, label in enumerate(self.labels)},
            "tie_word_embeddings": self.tied,
        }
        if parallel.is_rank_zero():
            weights = {name: source.weights[name] for name in weight_shapes(args)}
            head = {"weight": self.score.weight.detach(), "bias": self.score.bias.detach()}
            write(
                InMemory(args, weights), path, dtype, tokenizer=self.tokenizer, force=force,
                head={f"{self.head}.{k}": w.cpu().to(dtype or w.dtype) for k, w in head.items()},
                settings=settings, body=self.body,
            )  # fmt: skip
        parallel.barrier()
        return Path(path)

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("no tokenizer: build with tokenizer_path, or pass ids")
        return self.tokenizer

    def _encode(self, text: str) -> List[int]:
        return self._tokenizer.encode(text, bos=self._tokenizer.add_bos, eos=False)


class TokenClassifier(_TokenHead):
    """A Transformer with a linear head, dim -> labels, on each token.

    Make one with `TokenClassifier.build`, or around a model in memory.
    """

    architecture = "LlamaForTokenClassification"
    head = "score"

    @classmethod
    def _read_head(
        cls, source: HFCheckpoint, path: Path, config: Dict[str, Any]
    ) -> Tuple[List[str], torch.Tensor]:
        return read_head(source, path / "config.json", config)

    @classmethod
    def _new_labels(cls, path: Path, labels: Optional[Sequence[str]]) -> Sequence[str]:
        if labels is None:
            raise ValueError(f"{path} has no head for classes of tokens: pass labels")
        return labels

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of logits (B, T, n) and labels (B, T), but for labels IGNORED, -100.

        Raises:
            ValueError: labels of another shape, no integers, out of range, or all ignored.
        """
        check_integers(labels)
        known = (labels >= 0) & (labels < len(self.labels))
        if labels.shape != logits.shape[:2] or not (known | (labels == IGNORED)).all():
            raise ValueError(
                f"labels of shape {tuple(labels.shape)}: integers 0 to {len(self.labels) - 1}, or "
                f"{IGNORED}, for each of {tuple(logits.shape[:2])} tokens"
            )
        if not known.any():
            raise ValueError("labels are all ignored: nothing to learn")
        return F.cross_entropy(
            logits.flatten(0, 1), labels.flatten().long().to(logits.device), ignore_index=IGNORED
        )

    def classify(self, texts: Sequence[str], batch_size: int = 8) -> List[List[Tagged]]:
        """Of each text, its tokens with the most probable label each. See `predict`."""
        found, predicted = [], self.predict(texts, batch_size)
        for text, logits in zip(texts, predicted, strict=True):
            best = logits.softmax(-1).max(-1)
            names = [self.labels[label] for label in best.indices.tolist()]
            stream = self._tokenizer.stream()
            pieces = [stream.feed(id) for id in self._encode(text)]
            pieces[-1] += stream.finish()
            found.append(list(map(Tagged, pieces, names, best.values.tolist())))
        return found


class Answer(NamedTuple):
    """A span of a context."""

    text: str
    first: int  # of its tokens, in question and context together
    last: int
    score: float  # the sum of the two logits


class QuestionAnswerer(_TokenHead):
    """A Transformer with two logits on each token: that an answer begins there, and that it ends.

    It is built as a `TokenClassifier` is, without labels.
    """

    architecture = "LlamaForQuestionAnswering"
    head = "qa_outputs"
    body = "transformer."
    LABELS: ClassVar[List[str]] = ["start", "end"]

    @classmethod
    def _read_head(
        cls, source: HFCheckpoint, path: Path, config: Dict[str, Any]
    ) -> Tuple[List[str], torch.Tensor]:
        shape = source.shapes().get(name := f"{cls.head}.weight")
        if shape != (2, source.args.dim):
            raise ValueError(f"{path}: {name} has the shape {shape}, not {(2, source.args.dim)}")
        return cls.LABELS, source.read(name, 0, 0, 2)

    @classmethod
    def _new_labels(cls, path: Path, labels: Optional[Sequence[str]]) -> Sequence[str]:
        if labels not in (None, cls.LABELS):
            raise ValueError(f"labels={labels}: a QuestionAnswerer has its own, {cls.LABELS}")
        return cls.LABELS

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of where answers begin and end.

        Args:
            logits: (B, T, 2).
            labels: (B, 2), the first and the last token of each answer; one at T doesn't count.

        Raises:
            ValueError: labels of another shape, no integers, or out of range; none that counts of
                where answers begin, or end.
        """
        check_integers(labels)
        B, T, _ = logits.shape
        if labels.shape != (B, 2) or not ((labels >= 0) & (labels <= T)).all():
            raise ValueError(
                f"labels of shape {tuple(labels.shape)}: two tokens of 0 to {T} for each of {B}"
            )
        if (labels == T).all(0).any():
            raise ValueError(
                f"no label of where answers begin, or none of where they end, is below {T}, the "
                "number of tokens: nothing to learn"
            )
        labels = labels.long().to(logits.device)
        starts, ends = (
            F.cross_entropy(logits[..., i], labels[:, i], ignore_index=T) for i in range(2)
        )
        return (starts + ends) / 2

    def answer(self, question: str, context: str, max_tokens: int = 30) -> Answer:
        """The span of the context with the largest sum of logits, of at most max_tokens tokens.

        The question stands before the context, each encoded as a text.

        Raises:
            ValueError: max_tokens below 1, a context without tokens, and what `predict` raises.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1")
        asked, told = self._encode(question), self._encode(context)
        begin = len(asked) + bool(self._tokenizer.add_bos)  # behind the context's own BOS
        if begin == len(asked + told):
            raise ValueError(f"context={context!r}: the context has no tokens to answer with")
        [logits] = self.predict([asked + told])
        starts, ends = logits[begin:].unbind(-1)
        sums = starts[:, None] + ends
        allowed = torch.ones_like(sums).triu().tril(max_tokens - 1).bool()
        first, last = divmod(int(sums.masked_fill(~allowed, -torch.inf).argmax()), len(ends))
        ids = (asked + told)[begin + first : begin + last + 1]
        return Answer(
            self._tokenizer.decode(ids), begin + first, begin + last, float(sums[first, last])
        )
