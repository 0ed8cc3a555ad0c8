"""Names of weights: Meta's, which are the project's, and those of another format."""

import re
from typing import Callable, Dict, NamedTuple, TypeVar

T = TypeVar("T")
# What torch.compile, FSDP, activation checkpointing and DDP put into the names of what they wrap.
_WRAPPERS = re.compile(
    r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)+"
    r"|(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def unwrapped(weights: Dict[str, T]) -> Dict[str, T]:
    """Weights without the names of wrappers, unless these tell two apart."""
    found = {_WRAPPERS.sub("", name): weight for name, weight in weights.items()}
    return found if len(found) == len(weights) else weights


class Names(NamedTuple):
    """A format's names, by their stems: what is left of a name without layer and ".weight"."""

    layers: str  # what precedes a layer's number
    to_meta: Dict[str, str]  # its stems to Meta's

    def meta(self, name: str) -> str:
        """Meta's name of a weight; one that Llama doesn't have stays as it is."""
        match = re.fullmatch(rf"(?:{re.escape(self.layers)}\.(\d+)\.)?(.+)\.weight", name)
        if match is None or match[2] not in self.to_meta:
            stem = re.sub(r"^layers\.\d+\.", "", name).removesuffix(".weight")
            return f"{name} (Meta's name)" if stem in self.to_meta.values() else name
        return (f"layers.{match[1]}." if match[1] else "") + self.to_meta[match[2]] + ".weight"

    def theirs(self, name: str) -> str:
        """The inverse of `meta`."""
        stem, prefix = name.removesuffix(".weight"), ""
        if stem.startswith("layers."):
            _, i, stem = stem.split(".", 2)
            prefix = f"{self.layers}.{i}."
        by_meta = {ours: theirs for theirs, ours in self.to_meta.items()}
        return f"{prefix}{by_meta[stem]}.weight"


class Same(NamedTuple):
    """The names of a format that has ours."""

    def meta(self, name: str) -> str:
        return name

    def theirs(self, name: str) -> str:
        return name


SAME = Same()


class WithBiases:
    """Names of weights, and of biases beside them."""

    def __init__(self, names: Names):
        self._names = names

    def meta(self, name: str) -> str:
        return self._of_weight(self._names.meta, name)

    def theirs(self, name: str) -> str:
        return self._of_weight(self._names.theirs, name)

    def _of_weight(self, translate: Callable[[str], str], name: str) -> str:
        if not name.endswith(".bias"):
            return translate(name)
        weight = name.removesuffix("bias") + "weight"
        found = translate(weight)
        return name if found == weight else found.removesuffix("weight") + "bias"


HF = Names(
    "model.layers",
    {
        "model.embed_tokens": "tok_embeddings",
        "model.norm": "norm",
        "lm_head": "output",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    },
)
GGUF = Names(
    "blk",
    {
        "token_embd": "tok_embeddings",
        "output_norm": "norm",
        "output": "output",
        "attn_q": "attention.wq",
        "attn_k": "attention.wk",
        "attn_v": "attention.wv",
        "attn_output": "attention.wo",
        "attn_norm": "attention_norm",
        "ffn_gate": "feed_forward.w1",
        "ffn_down": "feed_forward.w2",
        "ffn_up": "feed_forward.w3",
        "ffn_norm": "ffn_norm",
    },
)
