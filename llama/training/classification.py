"""Sequence classification and regression: a linear head on the last token of each row.

    classifier = SequenceClassifier.build("checkpoints/Llama-3.2-1B", labels=["no", "yes"])
    loss = classifier.loss(classifier(tokens, lengths), labels)
    classifier.write("checkpoints/yes-or-no")

The head, the losses and the files are those of transformers' LlamaForSequenceClassification.
Reward models are of this kind: one label, and "regression".
"""

from dataclasses import replace
from pathlib import Path
from typing import Dict, List, Literal, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from llama import checkpoint
from llama.backends.build import open_tokenizer
from llama.checkpoint import Checkpoint, InMemory, remote, weight_shapes
from llama.checkpoint.config import CLASSIFIER
from llama.checkpoint.huggingface import HFCheckpoint, write
from llama.engine.embeddings import batches
from llama.families.registry import build
from llama.layers import parallel
from llama.layers.ids import check_token_tensor
from llama.model import Transformer
from llama.tokenizer import Tokenizer
from llama.training.heads import (
    SCORE,
    Body,
    check_labels,
    check_writable,
    config_with_head,
    default_labels,
    read_head,
)

Problem = Literal["regression", "single_label_classification", "multi_label_classification"]
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


class SequenceClassifier(nn.Module):
    """A Transformer with a linear head, dim -> labels, in place of its output layer.

    Make one with `SequenceClassifier.build`, or around a model in memory.

    Args:
        score: the head's weight, (len(labels), dim), the same on all ranks: each holds all of it.
            None draws one as transformers does, by the seed.
        tied: tie_word_embeddings in the config that `write` writes; by default the model's own.

    Attributes:
        labels: their names, in order.
        problem_type: the kind of labels, which decides the loss; None until the first loss.
        pad_id: the padding id of transformers, or None: the config's, and for a new head the
            tokenizer's.

    Raises:
        ValueError: no labels or one twice, a head of another shape, an unknown problem_type.
    """

    def __init__(
        self,
        model: Transformer,
        labels: Sequence[str],
        score: Optional[torch.Tensor] = None,
        *,
        problem_type: Optional[Problem] = None,
        tokenizer: Optional[Tokenizer] = None,
        tied: Optional[bool] = None,
        seed: int = 1,
    ):
        super().__init__()
        shape = (len(labels), model.params.dim)
        check_labels(labels)
        if problem_type not in (None, *PROBLEMS):
            raise ValueError(f"problem_type={problem_type!r}: choose one of {PROBLEMS}, or None")
        if problem_type == "single_label_classification" and len(labels) == 1:
            raise ValueError(f"{problem_type} takes 2 labels or more, not 1: or else 'regression'")
        if score is None:
            generator = torch.Generator().manual_seed(seed)
            score = 0.02 * torch.randn(shape, generator=generator)  # LlamaConfig.initializer_range
        if score.shape != shape:
            raise ValueError(f"a head of shape {tuple(score.shape)}, and the model takes {shape}")
        norm = model.norm.weight
        self.model = model
        self.score = nn.Linear(model.params.dim, len(labels), bias=False, device="meta")
        self.score.weight = nn.Parameter(score.to(norm.device, norm.dtype, copy=True))
        self.labels = list(labels)
        self.problem_type: Optional[Problem] = problem_type
        self.tokenizer = tokenizer
        self.pad_id = None if tokenizer is None else tokenizer.pad_id
        self.tied = model.params.tied_embeddings if tied is None else tied

    @staticmethod
    def build(
        ckpt_dir: str | Path,
        tokenizer_path: Optional[str | Path] = None,
        num_labels: Optional[int] = None,
        model_parallel_size: Optional[int] = None,
        seed: int = 1,
        *,
        labels: Optional[Sequence[str]] = None,
        problem_type: Optional[Problem] = None,
        device: Optional[str | torch.device] = None,
        dtype: Optional[str | torch.dtype] = None,
    ) -> "SequenceClassifier":
        """Open a directory of transformers' LlamaForSequenceClassification with its head, or any
        checkpoint that `Llama.build` opens with a new one, and load this rank's part of it.

        Args:
            tokenizer_path: by default what is found with the checkpoint; there may be none.
            num_labels: for a new head, whose labels are then LABEL_0, LABEL_1, ...
            seed: of a new head.
            labels: names for a new head, in the place of num_labels.
            problem_type: by default what the checkpoint says.

        Raises:
            FileNotFoundError: no checkpoint there, or no such tokenizer.
            ValueError: a broken or unsupported checkpoint; no labels for a new head, or other ones
                than a checkpoint has; a tokenizer that isn't its own.
        """
        torch_device = parallel.initialize(model_parallel_size, device)
        torch_dtype = parallel.pick_dtype(dtype, torch_device)
        path = remote.local_path(ckpt_dir)
        if labels is None and num_labels is not None:
            labels = default_labels(num_labels)
        if num_labels is not None and labels is not None and len(labels) != num_labels:
            raise ValueError(f"num_labels={num_labels} and {len(labels)} labels: pass one of them")

        config, head = config_with_head(path, CLASSIFIER), None
        source: Checkpoint
        if config:
            source = HFCheckpoint(path, {CLASSIFIER})
            own, head = read_head(source, path / "config.json", config)
            if labels is not None and list(labels) != own:
                raise ValueError(f"{path} has the labels {own[:20]}: pass these or none")
            labels, problem_type = own, problem_type or config.get("problem_type")
        else:
            source = checkpoint.open(path)
            if labels is None:
                raise ValueError(f"{path} has no head for classes: pass num_labels or labels")
        body = Body(source, [SCORE if config else "output.weight"])

        tokenizer_path, tokenizer = tokenizer_path or source.tokenizer_path, None
        if tokenizer_path is not None:
            tokenizer = open_tokenizer(body, tokenizer_path)
        pad_id = config.get("pad_token_id")
        if type(pad_id) is not int or not 0 <= pad_id < body.args.vocab_size:
            pad_id = None  # old configs say -1
        elif tokenizer is not None and pad_id in tokenizer.special_tokens.values():
            # transformers looks for the config's id; a tokenizer that pads with another would
            # have it pool padding.
            tokenizer.pad_id = pad_id
            tokenizer.vocabulary = tokenizer.vocabulary._replace(pad_id=pad_id)

        model = build(body.args, device="meta")
        checkpoint.load(body, model, dtype=torch_dtype, device=torch_device)
        try:
            classifier = SequenceClassifier(
                model, labels, head, problem_type=problem_type, tokenizer=tokenizer,
                tied=source.args.tied_embeddings, seed=seed,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if config:  # by which transformers pools, whatever the tokenizer pads with
            classifier.pad_id = pad_id
        return classifier

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits of each row's class: (B, T) ids, (B,) lengths -> (B, num_labels), fp32.

        Differentiable. Rows are padded on the right with any id of the vocabulary: a token never
        sees what comes after it, so padding needs no mask. transformers takes any pad_id at the
        end of a row for padding: lengths that don't count it give its logits.

        Raises:
            ValueError: ids outside of the vocabulary; lengths that aren't one of 1 to T for each
                row.
        """
        B, T = tokens.shape[:2]
        check_token_tensor(tokens, self.model.vocab_size)
        if lengths.shape != (B,) or lengths.is_floating_point():
            shape = tuple(lengths.shape)
            raise ValueError(f"lengths of {lengths.dtype} {shape}: integers, one for each of {B}")
        wrong = [n for n in lengths.tolist() if not 1 <= n <= T]
        if wrong:
            raise ValueError(f"length {wrong[0]} isn't one of 1 to {T}, the width of the tokens")
        lengths = lengths.to(tokens.device)
        h = self.model.hidden(tokens)  # (B, T, dim)
        return self.score(h[torch.arange(B, device=h.device), lengths - 1]).float()

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of logits (B, num_labels), by problem_type:

            regression                    squared error; labels (B, num_labels), or (B,) for one
            single_label_classification   cross-entropy; labels (B,), indices
            multi_label_classification    binary cross-entropy of each; labels (B, num_labels), 0..1

        Where problem_type is None, the first labels decide it for good: regression if there is one
        label, single if they are integers, else multi.
        Source: transformers' `ForSequenceClassificationLoss`.

        Raises:
            ValueError: labels of another shape or out of range.
        """
        rows, n = logits.shape
        kind = self.problem_type
        if kind is None and n == 1:
            kind = "regression"
        elif kind is None:
            integers = labels.dtype in (torch.int32, torch.int64)
            kind = "single_label_classification" if integers else "multi_label_classification"
        single = kind == "single_label_classification"
        shapes = {(rows,)} if single else {(rows, n), (rows,)} if n == 1 else {(rows, n)}
        if labels.shape not in shapes:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} for logits {(rows, n)}: {kind} takes "
                + " or ".join(map(str, sorted(shapes)))
            )
        if single and (labels.is_floating_point() or labels.dtype == torch.bool):
            raise ValueError(f"labels of {labels.dtype}: {kind} takes integers")
        most = n - 1 if single else 1
        wrong = labels[~((labels >= 0) & (labels <= most))]
        if kind != "regression" and len(wrong):
            raise ValueError(f"label {wrong[0].item()} isn't within 0 to {most}, as {kind} takes")

        self.problem_type = kind
        labels = labels.to(logits.device)
        if single:
            return F.cross_entropy(logits, labels.long())
        labels = labels.to(logits.dtype).view_as(logits)
        if kind == "regression":
            return F.mse_loss(logits, labels)
        return F.binary_cross_entropy_with_logits(logits, labels)

    @torch.inference_mode()
    def predict(self, texts: Sequence[str | Sequence[int]], batch_size: int = 8) -> torch.Tensor:
        """Logits of texts, or of ids in a text's place: (len(texts), num_labels), fp32, on the CPU.

        Any pad_id at the end of ids doesn't count, as in transformers.

        Raises:
            ValueError: no list; no tokenizer; ids outside of the vocabulary; a text without tokens,
                or longer than max_seq_len, by number.
        """
        if isinstance(texts, str):
            raise ValueError("texts is one text: pass a list of texts")
        encoded = [self._encode(text) for text in texts]
        found = torch.empty(len(encoded), len(self.labels))
        args, device = self.model.params, self.score.weight.device
        for rows, tokens, lengths in batches(encoded, args, batch_size, device):
            found[rows] = self(tokens, lengths).cpu()
        return found

    def classify(
        self, texts: Sequence[str | Sequence[int]], batch_size: int = 8
    ) -> List[Dict[str, float]]:
        """Of each text, by label: probabilities, or the values of a regression.

        Probabilities add up to 1, except for multi_label_classification. See `predict`.
        """
        logits, kind = self.predict(texts, batch_size), self.problem_type
        if kind == "multi_label_classification":
            logits = logits.sigmoid()
        elif kind == "single_label_classification" or (kind is None and len(self.labels) > 1):
            logits = logits.softmax(-1)
        return [dict(zip(self.labels, row, strict=True)) for row in logits.tolist()]

    def _encode(self, text: str | Sequence[int]) -> List[int]:
        if not isinstance(text, str):
            ids = list(text)
            # transformers doesn't tell padding from a real token of that id at the end, not in
            # training either: where the padding is also the end of a turn, the token before counts.
            while len(ids) > 1 and ids[-1] == self.pad_id:
                ids.pop()
            return ids
        if self.tokenizer is None:
            raise ValueError("no tokenizer: build with tokenizer_path, or pass ids")
        return self.tokenizer.encode(text, bos=self.tokenizer.add_bos, eos=False)

    def write(
        self,
        path: str | Path,
        dtype: Optional[torch.dtype] = None,
        *,
        max_shard_bytes: int = 5 * 10**9,
        force: bool = False,
    ) -> Path:
        """Write a directory that LlamaForSequenceClassification.from_pretrained loads; returns it.

        transformers finds the end of a padded row by pad_token_id: it is pad_id, with which the
        tokenizer that is written pads, too. Without one, transformers takes one row at a time.

        Args:
            dtype: of the weights; None keeps the model's.
            max_shard_bytes, force: see `checkpoint.huggingface.write`.

        Raises:
            FileExistsError: the directory exists, without `force`.
            ValueError: a model whose weights are in blocks, or compiled, or of another family; an
                adapter that isn't merged.
        """
        check_writable(self.model, CLASSIFIER)
        if Path(path).exists() and not force:  # on all ranks alike
            raise FileExistsError(f"{path} exists: choose another name, or overwrite it with force")
        source = checkpoint.gather(self.model)
        args = replace(source.args, tied_embeddings=True)  # no output layer: see Body
        score = self.score.weight.detach().cpu()
        settings = {
            "architectures": [CLASSIFIER],
            "id2label": {str(i): label for i, label in enumerate(self.labels)},
            "label2id": {label: i for i, label in enumerate(self.labels)},
            "pad_token_id": self.pad_id,
            "problem_type": self.problem_type,
            "tie_word_embeddings": self.tied,
        }
        if parallel.is_rank_zero():
            weights = {name: source.weights[name] for name in weight_shapes(args)}
            write(
                InMemory(args, weights), path, dtype,
                tokenizer=self.tokenizer, max_shard_bytes=max_shard_bytes, force=force,
                head={SCORE: score.to(dtype or score.dtype)}, settings=settings,
            )  # fmt: skip
        parallel.barrier()
        return Path(path)
