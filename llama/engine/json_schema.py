"""JSON schemas in llguidance's keywords."""

import json
import math
import re
from typing import Any, Mapping, Set, Tuple

# The supported keywords, by their values: a schema, a list of schemas, schemas by name, others.
# Others are errors, since llguidance ignores unknown ones and takes options from "x-guidance".
_ONE = {"additionalProperties", "items"}
LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
_NAMED = {"properties", "patternProperties", "$defs", "definitions"}
_VALUES = {
    "$ref", "type", "enum", "const", "required", "minProperties", "maxProperties", "minItems",
    "maxItems", "minLength", "maxLength", "pattern", "format", "minimum", "maximum",
    "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "$schema", "$id", "$comment", "title",
    "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly",
}  # fmt: skip
# Of OpenAPI and pydantic: formats that any text has.
_ANY_FORMAT = ("binary", "password", "path", "file-path", "directory-path")
_BASE64 = "^(?:[A-Za-z0-9{0}]{{4}})*(?:[A-Za-z0-9{0}]{{2}}==|[A-Za-z0-9{0}]{{3}}=)?$"
_PATTERNS = {"byte": _BASE64.format("+/"), "base64": _BASE64.format("+/")}
_PATTERNS["base64url"] = _BASE64.format("_-")
# pydantic's uuid4, for example; versions by RFC 9562.
_UUID = "^[0-9a-f]{{8}}-[0-9a-f]{{4}}-{}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}$"


def plain_schema(schema: Any, where: str, base: str = "#") -> Any:
    """A copy in llguidance's keywords, whose references are relative to the pointer `base`."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("uniqueItems") is False:  # as is any list's default
        schema = {key: value for key, value in schema.items() if key != "uniqueItems"}
    unknown = schema.keys() - _ONE - LISTS - _NAMED - _VALUES - {"nullable", "discriminator"}
    if unknown:
        raise ValueError(f"{where}: the keyword {min(unknown)!r} isn't supported: take it out")
    required, least = schema.get("required", []), schema.get("minProperties", 0)
    if isinstance(required, list) and isinstance(least, int) and least > len(required):
        # Names that aren't listed may occur twice.
        raise ValueError(f"{where}: minProperties isn't supported beyond the required ones")
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise ValueError(f"{where}: 'properties' must be an object, not {properties!r}")
    names = [schema.get("enum"), schema.get("const"), [*properties]]
    texts = json.dumps(names, ensure_ascii=False).replace("\\\\", "")
    if "\\u" in texts or "\x7f" in texts:  # llguidance would drop them
        raise ValueError(f"{where}: a name, const or enum has a control character: take it out")

    _check_bounds(schema, where)

    def plain(value: Any) -> Any:
        return plain_schema(value, where, base)

    copy = dict(schema)
    form = str(schema.get("format"))
    version = re.fullmatch(r"uuid([1-8])", form)
    pattern = _UUID.format(version[1]) if version else _PATTERNS.get(form)
    if pattern or form in (*_ANY_FORMAT, "ipvanyaddress"):
        del copy["format"]
    if pattern:
        copy.setdefault("pattern", pattern)
    if form == "ipvanyaddress":  # pydantic's
        copy.setdefault("anyOf", [{"type": "string", "format": f} for f in ("ipv4", "ipv6")])
    # Of OpenAPI, too: the parts differ in a property. llguidance doesn't see it.
    if copy.pop("discriminator", None) and "anyOf" not in copy and "oneOf" in copy:
        copy["anyOf"] = copy.pop("oneOf")
    if base != "#":  # references would be relative to it
        copy.pop("$id", None)
    for key, value in [*copy.items()]:
        if key in _ONE:
            if isinstance(value, list):
                raise ValueError(f"{where}: {key!r} is a list: write 'prefixItems' instead")
            copy[key] = plain(value)
        elif key in LISTS and isinstance(value, list):
            copy[key] = [plain(one) for one in value]
        elif key in _NAMED and isinstance(value, dict):
            copy[key] = {name: plain(one) for name, one in value.items()}
        elif key == "$ref" and isinstance(value, str) and value.startswith("#"):
            copy[key] = base + value[1:]
    if copy.pop("nullable", False) is True:  # of OpenAPI, and of llama.tools
        outer = {key: copy.pop(key) for key in ("$defs", "definitions") if key in copy}
        copy = {**outer, "anyOf": [copy, {"type": "null"}]}
    return copy


def _check_bounds(schema: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for bounds of numbers that llguidance doesn't keep to."""

    def bound(side: str) -> Tuple[float, bool]:
        """The tighter of both bounds, and whether it is exclusive."""
        sign = 1 if side == "Minimum" else -1
        given = [(schema.get(side.lower()), False), (schema.get(f"exclusive{side}"), True)]
        known = [(sign * n, out) for n, out in given if isinstance(n, (int, float))]
        return max(known, default=(-math.inf, False))

    (least, above), (most, below) = bound("Minimum"), bound("Maximum")
    most, kinds = -most, schema.get("type")
    if "integer" in (kinds if isinstance(kinds, list) else [kinds]):
        for n in (least, most):
            if math.isfinite(n) and abs(n) >= 1 << 63:
                raise ValueError(f"{where}: the bound {n:g} of integers must lie within 2^63")
    elif (above and least == least // 1 and least < most < least + 1) or (
        below and most == most // 1 and most - 1 < least < most
    ):
        n = least if above and least == least // 1 else most
        raise ValueError(
            f"{where}: numbers from {least:g} to {most:g} without {n:g} itself aren't supported: "
            "move that bound a little, or include it"
        )


def closed_schema(schema: Any) -> Any:
    """A copy whose objects have no properties but those named, unless it says otherwise.

    Parts of an object's schema, in allOf for example, don't know what the others name.
    """
    return _closed(schema, _refs_of_parts(schema))


def _closed(schema: Any, parts: Set[str]) -> Any:
    """As `closed_schema`; definitions that are parts stay open."""
    if not isinstance(schema, dict):
        return schema
    copy, lists = dict(schema), LISTS - {"allOf"}
    if "properties" in schema:
        lists = {"prefixItems"}
    for key, value in schema.items():
        if key in _ONE:
            copy[key] = _closed(value, parts)
        elif key in lists and isinstance(value, list):
            copy[key] = [_closed(one, parts) for one in value]
        elif key in _NAMED and isinstance(value, dict):
            copy[key] = {
                name: one if f"#/{key}/{name}" in parts else _closed(one, parts)
                for name, one in value.items()
            }
    is_object = schema.get("type") == "object" or "properties" in schema
    if is_object and not schema.keys() & (LISTS | {"$ref", "patternProperties"}):
        copy.setdefault("additionalProperties", False)
    return copy


def _refs_of_parts(schema: Any) -> Set[str]:
    """The references to what holds for an object together with other schemas."""
    if not isinstance(schema, (dict, list)):
        return set()
    inner = schema.values() if isinstance(schema, dict) else schema
    found = set().union(*map(_refs_of_parts, inner))
    if isinstance(schema, dict):
        own = "properties" in schema
        lists = [schema.get(key) for key in ("allOf", "anyOf", "oneOf") if own or key == "allOf"]
        parts = [one for list_ in lists if isinstance(list_, list) and (own or len(list_) > 1)
                 for one in list_]  # fmt: skip
        refs = [one.get("$ref") for one in [*parts, *[schema] * own] if isinstance(one, dict)]
        found |= {ref for ref in refs if isinstance(ref, str)}
    return found
