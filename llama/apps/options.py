"""Options that sub-commands share: the two dataclasses, as cyclopts takes them."""

import os
from dataclasses import MISSING, field, fields, make_dataclass
from typing import Annotated, Any, Callable, Collection, List, Type, TypeVar, get_type_hints

from cyclopts import Parameter

from llama.backends.options import ModelOptions
from llama.engine.params import SamplingParams
from llama.text.files import decode

T = TypeVar("T")


def is_utf8(hint: Any, value: Any) -> None:
    """Raises ValueError for texts that the shell gave in another encoding."""
    for text in [value] if isinstance(value, str) else value or ():
        decode(os.fsencode(text), "an argument", exact=True)


# --prompt '- a list'
Text = Annotated[str, Parameter(allow_leading_hyphen=True, validator=is_utf8)]
Texts = Annotated[List[str], Parameter(allow_leading_hyphen=True, validator=is_utf8)]
FileName = Annotated[str, Parameter(allow_leading_hyphen=True)]  # in any encoding


def flat(group: str, hidden: Collection[str] = ()) -> Callable[[Type[T]], Type[T]]:
    """Makes options of a dataclass' subclass, which may have other defaults and aliases.

    Only what the dataclass itself requires may be given without its name.
    """

    def decorate(cls: Type[T]) -> Type[T]:
        hints, own = get_type_hints(cls, include_extras=True), []
        for old in fields(cls):  # type: ignore[arg-type]
            default: Any = vars(cls).get(old.name, old.default)
            named = old.default is not MISSING or old.default_factory is not MISSING
            new = field(default=default, default_factory=old.default_factory, kw_only=named)  # type: ignore[call-overload]
            parse = Parameter(parse=None if old.name not in hidden else False)
            own.append((old.name, Annotated[hints[old.name], parse], new))
        names = {"__module__": __name__, "__doc__": cls.__mro__[1].__doc__}
        made = make_dataclass(cls.__name__, own, bases=(cls,), frozen=True, namespace=names)
        return Parameter(name="*", group=group)(made)

    return decorate


@flat("Model")
class Model(ModelOptions): ...


@flat("Model")
class CachingModel(ModelOptions):
    prefix_cache_mb: int = 500


@flat("Model")
class ScoringModel(ModelOptions):
    max_batch_size: Annotated[int, Parameter(alias="--batch_size")] = 8


NO_OPTIONS = ("logit_bias", "banned_tokens", "negative_prompt", "logits_processor")


@flat("Sampling", NO_OPTIONS)
class Sampling(SamplingParams): ...


@flat("Sampling", NO_OPTIONS)
class GreedySampling(SamplingParams):
    temperature: float = 0.0


SAMPLING, GREEDY = Sampling(), GreedySampling()  # as defaults
