"""Hugging Face's format: config.json and *.safetensors (or pytorch_model*.bin), read and written.

Formats: transformers' LlamaConfig and LlamaForCausalLM; the weights are in `safetensors.py`.
"""

import math
import re
import warnings
from pathlib import Path
from types import MappingProxyType
from typing import AbstractSet, Any, Callable, Dict, List, Mapping, Optional, Set

import torch

from llama.checkpoint.config import config_of, read_config, read_scheme
from llama.checkpoint.fused import Part, cut, plan, stored_as
from llama.checkpoint.listing import PROCESSOR
from llama.checkpoint.pth import index_pth
from llama.checkpoint.safetensors import index_safetensors, interleave, under, write_safetensors
from llama.checkpoint.schemes import assemble
from llama.checkpoint.schemes.weight import QuantizedWeight
from llama.checkpoint.shapes import checked_args, weight_shapes
from llama.checkpoint.source import Checkpoint, Shape, Stored, find_tokenizer
from llama.checkpoint.writing import Progress, dtype_of, no_progress
from llama.families.registry import family_of
from llama.text.files import beside, read_object, write_json
from llama.text.vocabulary import writing as writing_vocabulary
from llama.tokenizer import Tokenizer


def index_tensors(file: Path, *, codes: bool = False) -> Dict[str, Stored]:
    """Where each tensor of a .safetensors or .bin file lies.

    Args:
        codes: it may hold more than floats, see `source.CODES`.

    Raises:
        ValueError: a damaged file.
    """
    index = index_safetensors if file.suffix == ".safetensors" else index_pth
    return index(file, codes=codes)


class HFCheckpoint:
    """A directory in Hugging Face's format, of an architecture that is known."""

    def __init__(self, path: Path, known: Optional[AbstractSet[str]] = None):
        self.path = Path(path)
        family, fields = read_config(self.path / "config.json", known)
        scheme = read_scheme(self.path / "config.json")
        ours = family.hf_names.meta
        tensors: Dict[str, Stored] = {}
        self.left_out = 0  # weights that the network doesn't use
        for file in self._files():
            for name, stored in index_tensors(file, codes=True).items():
                if name.startswith("transformer."):  # in LlamaForQuestionAnswering
                    name = name.replace("transformer.", "model.", 1)
                if name.startswith(family.left_out(fields)):
                    self.left_out += 1
                    continue
                if re.fullmatch(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", name):
                    continue  # what follows from rope_theta; old files have it
                if name in tensors:
                    other = tensors[name].file.name
                    raise ValueError(f"{ours(name)} is both in {other} and in {file}")
                tensors[name] = stored
        plain, quantized = assemble(scheme, tensors)
        found: Dict[str, Part] = {ours(name): part for name, part in (plain | quantized).items()}
        self.args = checked_args(self.path / "config.json", fields, len(found), family)
        self._stored = cut(found, family.fused(self.args, "hf"), weight_shapes(self.args))
        self.quantized = {
            name: weight
            for name, weight in self._stored.items()
            if isinstance(weight, QuantizedWeight)
        }
        if self.args.tied_embeddings:
            self._stored.pop("output.weight", None)  # as transformers does
        self.tokenizer_path: Optional[Path] = find_tokenizer(self.path)
        _check_processor(self.path, family.processor(self.args))

    def _files(self) -> List[Path]:
        """The files with weights, by the index where there is one."""
        for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
            index = self.path / f"{stem}.{suffix}.index.json"
            single = self.path / f"{stem}.{suffix}"
            if index.exists():
                weight_map = read_object(index).get("weight_map")
                if not isinstance(weight_map, dict) or not weight_map:
                    raise ValueError(f"{index} has no weight_map")
                return self._indexed(index, suffix, {str(name) for name in weight_map.values()})
            if single.is_file():
                return [single]
        others = [file.name for file in self.path.glob("*.safetensors")]
        hint = f": if {others[0]} has all weights, rename it so" if len(others) == 1 else ""
        raise ValueError(
            f"{self.path} has no model.safetensors, pytorch_model.bin or their index{hint}"
        )

    def _indexed(self, index: Path, suffix: str, names: Set[str]) -> List[Path]:
        """The files that an index names, all of which must be there, and no others."""
        for name in sorted(names):
            if Path(name).name != name or not name.endswith("." + suffix):
                raise ValueError(
                    f"{index}: weight_map has {name!r}, not a .{suffix} file beside it"
                )
            if not (self.path / name).exists():
                raise ValueError(f"{index} names {name}, which is missing; fetch it")
        stem = min(names).split("-")[0]
        extra = {f.name for f in self.path.glob(f"{stem}-*-of-*.{suffix}")} - names
        if extra:
            raise ValueError(f"{index} doesn't know {min(extra)}: two checkpoints in one place?")
        return [self.path / name for name in sorted(names)]

    def shapes(self) -> Dict[str, Shape]:
        return {name: stored.shape for name, stored in self._stored.items()}

    def stored_as(self, name: str) -> str:
        return stored_as(self._stored[name])

    def read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        return self._in_order(name, self._stored[name].read, axis, start, stop)

    def read_blocks(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """The same of a quantized weight, as blocks, (rows, bytes of a row).

        Along axis 1 start and stop are whole blocks.
        """
        return self._in_order(name, self.quantized[name].read_blocks, axis, start, stop)

    def _in_order(
        self, name: str, read: Callable[[int, int, int], torch.Tensor], *of: int
    ) -> torch.Tensor:
        """What `read` returns, rows in Meta's order."""
        axis, start, stop = of
        if not family_of(self.args).is_rotated(name):
            return read(axis, start, stop)
        d = self.args.head_dim
        if axis != 0:
            return interleave(read(axis, start, stop), d)
        first, last = start // d * d, -(-stop // d) * d  # rows change places within a head
        return interleave(read(0, first, last), d)[start - first : stop - first]


def _check_processor(path: Path, expected: Mapping[str, Any]) -> None:
    """Warn of what a directory says of its images' preparation, and isn't done."""
    for name, part in ((PROCESSOR, None), ("processor_config.json", "image_processor")):
        if not expected or not (path / name).exists():
            continue
        found = read_object(path / name)
        given = found if part is None else found.get(part)
        for key, value in (given if isinstance(given, dict) else {}).items():
            wanted = expected.get(key, value)
            if value != wanted and not key.endswith(("_class", "_type")):
                warnings.warn(
                    f"{path / name}: {key}={value!r:.80} isn't followed: images are prepared with "
                    f"{wanted!r}",
                    stacklevel=2,
                )


def write(
    source: Checkpoint,
    path: str | Path,
    dtype: Optional[torch.dtype] = None,
    *,
    tokenizer: Optional[Tokenizer] = None,
    max_shard_bytes: int = 5 * 10**9,
    force: bool = False,
    progress: Progress = no_progress,
    head: Mapping[str, torch.Tensor] = MappingProxyType({}),
    settings: Mapping[str, Any] = MappingProxyType({}),
    body: str = "model.",
) -> Path:
    """Write a directory that transformers' from_pretrained loads; returns it.

    Args:
        dtype: of the weights; None keeps what they are stored in (fp32 where quantized).
        tokenizer: whose files are written beside the weights.
        max_shard_bytes: size beyond which another .safetensors file is begun.
        force: overwrite what is there, once the new directory is complete.
        head: weights beyond those of the shape, by Hugging Face's names, as they are.
        settings: keys of config.json that take the place of what follows from the shape.
        body: what names of the body's weights begin with in transformers' class.

    Raises:
        FileExistsError: the directory exists, without `force`.
    """
    path, args = Path(path), source.args
    shapes = weight_shapes(args)
    dtypes = {name: dtype or dtype_of(source, name) for name in shapes}
    parts = plan(shapes, family_of(args).fused(args, "hf"))
    sizes = {
        name: sum(math.prod(shapes[one]) * dtypes[one].itemsize for one in of)
        for name, of in parts.items()
    }
    shards: List[List[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[one] for one in shards[-1]) + size > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    with beside(path, force) as partial:
        partial.mkdir()
        files = ["model.safetensors"]
        if len(shards) > 1:
            n = len(shards)
            files = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
        for file, shard in zip(files, shards, strict=True):
            extra = head if file == files[-1] else {}
            write_safetensors(source, partial / file, shard, dtypes, progress, extra, body)
        if len(shards) > 1:
            hf_names = family_of(args).hf_names
            weight_map = {
                under(body, hf_names.theirs(name)) if name in shapes else name: file
                for file, shard in zip(files, shards, strict=True)
                for name in shard
            } | dict.fromkeys(head, files[-1])
            total = sum([*sizes.values(), *(weight.nbytes for weight in head.values())])
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(partial / "model.safetensors.index.json", index)
        if processor := family_of(args).processor(args):
            write_json(partial / PROCESSOR, processor)
        bos_id: Optional[int] = None
        eos: List[int] = []
        if tokenizer is not None:
            bos_id, eos = tokenizer.bos_id, sorted(tokenizer.stop_tokens)
            vocabulary = tokenizer.vocabulary
            if family_of(args).extra_ids:
                vocabulary = writing_vocabulary.for_images(vocabulary)
            writing_vocabulary.write_for_hugging_face(vocabulary, partial)
            if processor and vocabulary.chat_template:  # that of a tokenizer isn't a processor's
                (partial / "chat_template.jinja").write_text(vocabulary.chat_template, "utf-8")
        config = config_of(args, next(iter(dtypes.values())), bos_id, eos)
        write_json(partial / "config.json", {**config, **settings})
    return path
