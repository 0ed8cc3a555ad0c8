"""What a family of networks is to those who read checkpoints and build models."""

from dataclasses import dataclass, fields
from typing import (
    Any,
    Callable,
    Collection,
    Dict,
    FrozenSet,
    Mapping,
    NamedTuple,
    Optional,
    Protocol,
    Sequence,
    Set,
    Tuple,
    Type,
)

import torch

from llama.families.names import GGUF, HF, SAME
from llama.model import ModelArgs, Transformer

Shape = Tuple[int, ...]

# What old transformers wrote into each configuration, also of parts: none of it is of the network.
IGNORED = {
    "_name_or_path", "_attn_implementation_autoset", "architectures", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dropout", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "length_penalty",
    "max_length", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_scores", "pad_token_id", "prefix", "problem_type", "pruned_heads",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_bfloat16", "use_cache",
}  # fmt: skip


class Naming(Protocol):
    """Another format's names of weights, see `names.Names`."""

    def meta(self, name: str) -> str: ...

    def theirs(self, name: str) -> str: ...


class Fused(NamedTuple):
    """A tensor in a file that holds several weights: those of a group side by side, groups below
    each other; or one that isn't stored as it is.

    Attributes:
        groups: Meta's names.
        transposed: each is transposed first.
        stacked: groups, all of one shape, lie along an axis of their own, the first.
        shape: of the tensor, where it isn't that of the weights put together.
        to_theirs, to_ours: where its values aren't those of the one weight that it holds.
    """

    groups: Tuple[Tuple[str, ...], ...]
    transposed: bool = False
    stacked: bool = False
    shape: Optional[Shape] = None
    to_theirs: Optional[Callable[[torch.Tensor], torch.Tensor]] = None
    to_ours: Optional[Callable[[torch.Tensor], torch.Tensor]] = None

    @property
    def as_rows(self) -> bool:
        """Whether its rows are those of the weights, one after another."""
        return not self.transposed and self.to_theirs is None


def whole(name: str, value: Any, least: int = 1) -> int:
    """A value of a configuration, which must be a whole number.

    Raises:
        ValueError: it is none, or one below the least.
    """
    if type(value) is not int or value < least:
        raise ValueError(f"{name}={value!r:.80} isn't a whole number of at least {least}")
    return value


def block_shapes(args: ModelArgs) -> Dict[str, Shape]:
    """Meta's name and whole shape of every weight of one of Llama's blocks."""
    q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    return {
        "attention.wq.weight": (q_dim, args.dim),
        "attention.wk.weight": (kv_dim, args.dim),
        "attention.wv.weight": (kv_dim, args.dim),
        "attention.wo.weight": (args.dim, q_dim),
        "feed_forward.w1.weight": (args.hidden_dim, args.dim),
        "feed_forward.w2.weight": (args.dim, args.hidden_dim),
        "feed_forward.w3.weight": (args.hidden_dim, args.dim),
        "attention_norm.weight": (args.dim,),
        "ffn_norm.weight": (args.dim,),
    }


def llama_shapes(args: ModelArgs) -> Dict[str, Shape]:
    """Meta's name and whole shape of every weight of a Llama."""
    shapes: Dict[str, Shape] = {"tok_embeddings.weight": (args.vocab_size, args.dim)}
    for i in range(args.n_layers):
        shapes.update({f"layers.{i}.{name}": s for name, s in block_shapes(args).items()})
    shapes["norm.weight"] = (args.dim,)
    if not args.tied_embeddings:
        shapes["output.weight"] = (args.vocab_size, args.dim)
    return shapes


@dataclass(frozen=True)
class Family:
    """A network, and how files describe it. The defaults are Llama's.

    Attributes:
        extra_ids: ids after the vocabulary's that a model reads, but doesn't write.
        args: the shape of a model; a class of its own for each family.
        shapes: Meta's names and whole shapes of all weights of a shape.
        architectures: transformers' classes, as config.json names them.
        claims: whether a config.json, of one of these architectures or not, is of this family.
        read_config: fields of args, from what it takes out of a config.json; it may also put there
            what the reader of Llama's keys is to find (`checkpoint.config.FIELDS`).
        write_config: keys of config.json that take the place of Llama's, or add to them.
        nest_config: config.json of all these keys, where some are in others.
        processor: preprocessor_config.json of a shape that reads images, without which transformers
            doesn't; empty: it reads none.
        read_params, write_params: the same for params.json.
        meta_names: of weights in Meta's files, where they are others than in the model.
        module_name: transformers' name of a weight in its model, of the one in its files.
        rotated: the last parts of names of weights whose rows transformers has in another order.
        cached_per_head: vectors of head_dim that are cached for each key/value head, beside those
            of tokens.
        chunks: positions of a chunk, and the layers that attend within one; 0: none does.
        encoder_values: values that a pass of an encoder holds at most, beside its weights.
        gguf: what a GGUF file's general.architecture says.
        claims_gguf: whether a GGUF file is of this family, by its architecture, its metadata and
            the names of its tensors; None: by its architecture.
        read_gguf: fields of args, from a GGUF file's metadata, its architecture left out of the
            keys.
        gguf_architecture: which of these a shape is written as; None: the only one.
        read_names: fields of args that a GGUF file says by its tensors alone, by Meta's names.
        write_gguf: what it says in addition, by the names of GGUFWriter's methods.
        fused: weights that the files of a format, "meta", "hf" or "gguf", hold as one tensor or
            converted, or whose names depend on the shape, by the tensor's name there (as hf_names
            leaves it); and "released", what is read in Meta's format in addition.
        text_args: the shape of what GGUF files hold of a model: text.
        left_out: how names of weights begin that files may hold and this network doesn't use, by
            its fields of args.
    """

    name: str
    extra_ids: int = 0
    args: Type[ModelArgs] = ModelArgs
    network: Type[Transformer] = Transformer
    shapes: Callable[[Any], Dict[str, Shape]] = llama_shapes
    architectures: FrozenSet[str] = frozenset()
    claims: Callable[[Mapping[str, Any]], bool] = lambda config: False
    read_config: Callable[[Dict[str, Any]], Dict[str, Any]] = lambda config: {}
    write_config: Callable[[Any], Dict[str, Any]] = lambda args: {}
    nest_config: Callable[[Any, Dict[str, Any]], Dict[str, Any]] = lambda args, config: config
    processor: Callable[[Any], Dict[str, Any]] = lambda args: {}
    read_params: Callable[[Dict[str, Any]], Dict[str, Any]] = lambda params: params
    write_params: Callable[[Any], Dict[str, Any]] = lambda args: {}
    meta_names: Naming = SAME
    hf_names: Naming = HF
    module_name: Callable[[str], str] = lambda name: name
    rotated: Tuple[str, ...] = ("attention.wq.weight", "attention.wk.weight")
    cached_per_head: Callable[[Any], int] = lambda args: 0
    chunks: Callable[[Any], Tuple[int, Sequence[int]]] = lambda args: (0, ())
    encoder_values: Callable[[Any], int] = lambda args: 0
    gguf: FrozenSet[str] = frozenset()
    gguf_names: Naming = GGUF
    claims_gguf: Optional[Callable[[str, Mapping[str, Any], Collection[str]], bool]] = None
    read_gguf: Callable[[Dict[str, Any]], Dict[str, Any]] = lambda metadata: {}
    read_names: Callable[[Collection[str]], Dict[str, Any]] = lambda names: {}
    gguf_architecture: Optional[Callable[[Any], str]] = None
    write_gguf: Callable[[Any], Dict[str, Any]] = lambda args: {}
    fused: Callable[[Any, str], Dict[str, Fused]] = lambda args, form: {}
    text_args: Callable[[Any], Any] = lambda args: args
    left_out: Callable[[Mapping[str, Any]], Tuple[str, ...]] = lambda fields: ()

    def is_rotated(self, name: str) -> bool:
        """Whether transformers has a weight's rows in another order."""
        return name.startswith("layers.") and name.endswith(self.rotated)

    @property
    def own_fields(self) -> Set[str]:
        """The fields of args that Llama's shape doesn't have."""
        return {f.name for f in fields(self.args)} - {f.name for f in fields(ModelArgs)}
