"""The lines of a batch: read from JSONL, Parquet or text, made requests, written with replies."""

import io
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Literal, Mapping, Tuple, Type

import msgspec

from llama.apps.completion import seed_of
from llama.server.errors import invalid
from llama.server.offline import Request
from llama.text.files import decode, json_line

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
URLS = (CHAT, COMPLETIONS, "/v1/responses", "/v1/embeddings")  # OpenAI's Batch API's
PLAIN = {"prompt", "messages"}  # what a line may have in place of a request
JSONL, PARQUET, BOM = (".jsonl", ".ndjson", ".json"), ".parquet", b"\xef\xbb\xbf"


class Given(msgspec.Struct):
    """A line in OpenAI's format. The body is passed on as it is written."""

    custom_id: str
    method: Literal["POST"]
    url: str
    body: msgspec.Raw


class Strict(Given, forbid_unknown_fields=True): ...


ASKED = PLAIN.union(Given.__struct_fields__)


@dataclass
class Line:
    """A line of the input.

    Attributes:
        number: from 1.
        value: what stands there, or only its custom_id.
        name: custom_id, or of its number.
        request: what is asked, or why that is no request: its error's body.
        plain: a prompt or messages, and no request in OpenAI's format.
    """

    number: int
    value: Dict[str, Any]
    name: str
    request: Request | Dict[str, Any]
    plain: bool

    def record(self, seed: int, status: int, body: Dict[str, Any]) -> Dict[str, Any]:
        """A line of a result or an error file."""
        if not self.plain:
            name = f"{seed_of(seed, self.name):016x}"
            return {
                "id": f"batch_req_{name}", **self.value,
                "response": {"status_code": status, "request_id": f"req_{name}", "body": body},
                "error": None,
            }  # fmt: skip
        if status != 200:
            return {**self.value, "status_code": status, **body}
        choice = body["choices"][0]
        text = choice["message"]["content"] or "" if "message" in choice else choice["text"]
        return {**self.value, "generation": text, "finish_reason": choice["finish_reason"]}


def read(
    path: Path, content: bytes, plain: Mapping[str, Any], seed: int, lenient: bool = False
) -> List[Line]:
    """The lines of a file, empty ones left out.

    Args:
        path: for the format, and for messages.
        plain: the body's parameters for a prompt or messages.
        seed: of the requests that give none.
        lenient: ignore what else is in lines of OpenAI's format.

    Raises:
        ValueError: no lines, no text, a list, or no Parquet file.
    """
    kind = Given if lenient else Strict
    seen: Dict[str, int] = {}
    is_json = path.suffix.lower() in (*JSONL, PARQUET) or _begins_with_request(content)
    lines = []
    for number, given in _given(path, content):
        value: Dict[str, Any] = {}
        name, is_plain = f"line {number}", False
        request: Request | Dict[str, Any]
        try:
            raw = _raw(given, is_json)
            value = _value(raw)
            is_plain = "body" not in value and bool(PLAIN & value.keys())
            to, body = _of_prompt(value, plain) if is_plain else _of_line(raw, kind)
            if not is_plain and seen.setdefault(value["custom_id"], number) != number:
                first = seen[value["custom_id"]]
                raise ValueError(f"custom_id {value['custom_id']!r} is line {first}'s, too")
            name = name if is_plain else value["custom_id"]
            request = Request(number, to, body, seed_of(seed, name))
        except (ValueError, RecursionError) as error:
            request = invalid(f"line {number}: {str(error).replace('`', '')}").body
        kept = value if is_plain else {"custom_id": value.get("custom_id")}
        lines.append(Line(number, kept, name, request, is_plain))
    if not lines:
        raise ValueError(f'{path} has no lines: each is a text, {{"prompt": ...}} or a request')
    return lines


def _given(path: Path, content: bytes) -> Iterator[Tuple[int, bytes | Dict[str, Any]]]:
    """Lines, or rows of Parquet, by their numbers."""
    if path.suffix.lower() == PARQUET:
        yield from enumerate(_pyarrow().parquet.read_table(io.BytesIO(content)).to_pylist(), 1)
        return
    if b"\0" in content[:1024]:  # later, it is a line's fault
        raise ValueError(f"{path} is no text in UTF-8: unpack or convert it first")
    if path.suffix.lower() in JSONL and content[:1024].removeprefix(BOM).lstrip()[:1] == b"[":
        raise ValueError(f"{path} is a list: write each object on a line of its own: jq -c '.[]'")
    for number, line in enumerate(content.removeprefix(BOM).split(b"\n"), 1):
        if line.strip():
            yield number, line


def _begins_with_request(content: bytes) -> bool:
    """Whether it is JSONL without being called so, such as a pipe: no request is a prompt."""
    with suppress(ValueError, RecursionError):
        first = next((line for line in io.BytesIO(content) if line.strip(BOM + b" \t\r\n")), b"")
        return bool(msgspec.json.decode(first.removeprefix(BOM), type=Given))
    return False


def _raw(given: bytes | Dict[str, Any], is_json: bool) -> bytes:
    """A line as JSON, whatever the file is."""
    if isinstance(given, dict):
        row = {name: _text(name, value) for name, value in given.items() if value is not None}
        for name in ("body", "messages"):
            if isinstance(row.get(name), str):  # JSON as text
                with suppress(ValueError, RecursionError):
                    row[name] = msgspec.json.decode(row[name], type=msgspec.Raw)
        return msgspec.json.encode(row, enc_hook=str)
    if is_json:
        return given
    return msgspec.json.encode({"prompt": decode(given, "it").removesuffix("\r")})


def _text(name: str, value: Any) -> Any:
    """A value in which bytes are text, as Spark and Hive write it."""
    if isinstance(value, list):
        return [_text(name, one) for one in value]
    if isinstance(value, dict):
        return {key: _text(name, one) for key, one in value.items()}
    if isinstance(value, bytes):
        try:
            return decode(value, name, exact=True)
        except ValueError:
            if name in ASKED:
                raise  # others are kept, as base64
    return value


def _value(raw: bytes) -> Dict[str, Any]:
    try:
        value = msgspec.json.decode(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it isn't valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("it is no object {...}")
    if not {"custom_id", "body", *PLAIN} & value.keys():
        has = ", ".join(map(repr, value)) or "nothing"
        raise ValueError(f"neither a prompt, messages nor a request; it has {has:.200}")
    return value


def _of_prompt(value: Dict[str, Any], plain: Mapping[str, Any]) -> Tuple[str, bytes]:
    """The path and the body of a request for a prompt or messages."""
    if value.keys() >= PLAIN:
        raise ValueError("prompt and messages: one of them")
    [name] = PLAIN & value.keys()
    asked = value[name]
    if name == "prompt" and isinstance(asked, list) and not all(type(one) is int for one in asked):
        raise ValueError("prompt: one text, or its ids; each other one is a line of its own")
    body = json.dumps({**plain, name: asked}).encode()
    return (CHAT if name == "messages" else COMPLETIONS), body


def _of_line(raw: bytes, kind: Type[Given]) -> Tuple[str, bytes]:
    """The path and the body of a request in OpenAI's format."""
    given = msgspec.json.decode(raw, type=kind)
    body = msgspec.json.decode(given.body, type=Dict[str, Any])
    if given.url not in URLS:
        raise ValueError(f"url {given.url!r:.100}: it is one of {', '.join(URLS)}")
    if body.get("stream"):
        raise ValueError("stream: a batch has no streams; leave it out")
    return given.url, bytes(given.body)


# --- written -------------------------------------------------------------------------------------


def written(path: Path, records: Iterable[Dict[str, Any]]) -> Iterator[bytes]:
    """Records as the content of a file: Parquet if it is called so, else JSONL."""
    if path.suffix.lower() != PARQUET:
        yield from map(json_line, records)
        return
    pyarrow, rows, buffer = _pyarrow(), list(records), io.BytesIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    table = pyarrow.table({n: _column(pyarrow, [row.get(n) for row in rows]) for n in columns})
    pyarrow.parquet.write_table(table, buffer)
    yield buffer.getvalue()


def _column(pyarrow: Any, values: List[Any]) -> Any:
    """Values of one type; others as JSON, since a column has one type, as are large integers."""
    kinds = {type(value) for value in values if value is not None}
    if any(kinds <= {plain} for plain in (str, bool, int, float)):
        with suppress(OverflowError):
            return pyarrow.array(values)
    return [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("Parquet files need pyarrow: pip install llama-reference[ray]") from None
    return pyarrow
