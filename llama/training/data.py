"""Training data: JSONL of dialogs or texts, as token ids and labels."""

from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch

from llama.layers.ids import common_length, padded
from llama.text.chat import Dialog, Format, check_dialog, content_of
from llama.text.files import objects, read_text, string
from llama.text.messages import image_sources
from llama.text.tools import Tools
from llama.tokenizer import Tokenizer
from llama.training.losses import IGNORED

LINES = (".jsonl", ".ndjson")  # an object on each line
TABLES = (".json", ".csv", ".tsv", ".parquet")  # nobody means to learn these as they are written


class Example(NamedTuple):
    """One row to train on."""

    tokens: List[int]
    labels: List[int]  # the tokens, or IGNORED

    @property
    def asked(self) -> int:
        """The number of tokens in the loss. The first of a row never is: nothing predicts it."""
        return sum(label != IGNORED for label in self.labels[1:])


class Examples(NamedTuple):
    rows: List[Example]
    cut: int  # dialogs that were truncated
    dropped: int  # dialogs left out, since truncation left no token to train on


def read_examples(
    path: str | Path, tokenizer: Tokenizer, formatter: Optional[Format], max_seq_len: int
) -> Examples:
    """Read the examples of a file.

    Each line of a .jsonl file is {"messages": [{"role": ..., "content": ...}, ...]}, with "tools"
    if it has them, or {"text": ...}; any other file is one text. In dialogs, only the assistant's
    tokens are trained on, with the token that ends each answer; a dialog longer than max_seq_len is
    truncated. In texts, all tokens are trained on; a text longer than max_seq_len is split into
    several rows. Keys that are null count as not given.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is neither, by number; a dialog without an answer, or for a model
            without a chat format; no token to train on; a table, which is no text.
    """
    path = Path(path)
    if path.suffix.lower() in TABLES:
        raise ValueError(
            f'{path}: no {path.suffix} is read. Write {{"messages": [...]}} or {{"text": "..."}} '
            "on each line of a .jsonl file; a plain text is named .txt"
        )
    if path.suffix.lower() not in LINES:
        text = read_text(path)
        if not text.strip():
            raise ValueError(f"{path} is empty: nothing to learn")
        return Examples(text_examples(text, tokenizer, max_seq_len), 0, 0)
    rows: List[Example] = []
    cut = dropped = 0
    for number, line in objects(path):
        given = {key for key, value in line.items() if value is not None}
        if given == {"text"}:
            text = string(path, number, line, "text")
            rows += text_examples(text, tokenizer, max_seq_len)
            continue
        if given not in ({"messages"}, {"messages", "tools"}):
            raise ValueError(
                f'{path}, line {number}: it has {", ".join(line)}; a line is {{"messages": [...]}} '
                'or {"text": "..."}; "tools": [...] may stand beside messages'
            )
        try:
            whole = dialog_example(
                _without_nulls(line["messages"]), tokenizer, formatter, line.get("tools")
            )
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        row = Example(whole.tokens[:max_seq_len], whole.labels[:max_seq_len])
        cut += len(whole.tokens) > max_seq_len
        dropped += not row.asked
        rows += [row] * bool(row.asked)
    if not rows:
        raise ValueError(
            f"{path}: no line, or nothing to learn within max_seq_len={max_seq_len} tokens"
        )
    return Examples(rows, cut, dropped)


def _without_nulls(messages: Any) -> Any:
    """The messages without keys that are null, which tables write for what a message lacks. Beside
    tool calls, OpenAI's files leave out an empty content."""
    if not isinstance(messages, list):
        return messages
    found = []
    for message in messages:
        if isinstance(message, dict):
            message = {key: value for key, value in message.items() if value is not None}
            if message.get("tool_calls"):
                message.setdefault("content", None)
        found.append(message)
    return found


def text_examples(text: str, tokenizer: Tokenizer, max_seq_len: int) -> List[Example]:
    """Split a text into rows. They overlap by one token, so that each but the first is a target."""
    ids = tokenizer.encode(text, bos=tokenizer.add_bos, eos=True)
    step = max_seq_len - 1
    pieces = [ids[i : i + max_seq_len] for i in range(0, max(1, len(ids) - 1), step)]
    return [Example(piece, piece) for piece in pieces if len(piece) > 1]


def dialog_example(
    dialog: Dialog, tokenizer: Tokenizer, formatter: Optional[Format], tools: Tools = None
) -> Example:
    """A dialog's ids, with labels for the tokens that the model would generate.

    In the ids of the whole dialog, an answer begins where the prompt for it ends, and extends to
    its stop token. So training matches generation, whatever the chat format. A token that merges
    the end of a prompt with white space before the answer gets no label, nor does a greeting that a
    dialog begins with, which no prompt asks for.

    Raises:
        ValueError: not a dialog, an image, no answer at its end, no chat format, or one that writes
            an answer differently when messages follow.
    """
    if formatter is None:
        raise ValueError('this checkpoint has no chat format: train it on {"text": ...}')
    if not isinstance(dialog, Sequence) or isinstance(dialog, str):
        raise ValueError(f"messages is a list of messages, not {dialog!r:.60}")
    if not isinstance(tools, (list, tuple, type(None))):
        raise ValueError(f"tools is a list of definitions, not {tools!r:.60}")
    check_dialog(0, dialog, assistant_first=True)
    if image_sources(dialog):
        raise ValueError("messages have an image, and texts alone are learned: leave it out")
    if len(dialog) < 2 or dialog[-1]["role"] != "assistant":
        raise ValueError("the last message isn't the assistant's: there is nothing to learn of it")
    ids = formatter.encode_dialog_prompt([*dialog, {"role": "user", "content": "x"}], tools)
    labels, end = [IGNORED] * len(ids), 0
    for i, message in enumerate(dialog):
        if i and message["role"] == "assistant":
            prompt = formatter.encode_dialog_prompt(dialog[:i], tools)
            same = common_length(prompt, ids)
            stops = (at for at in range(len(prompt), len(ids)) if ids[at] in tokenizer.stop_tokens)
            end = next(stops, -1) + 1
            begin = len(prompt) if same == len(prompt) else same + 1
            # The ids found must end as the message does; otherwise this format has no stop token.
            said = tokenizer.decode(ids[same : end - 1]).strip()
            text = "" if message.get("tool_calls") else content_of(message).strip()
            if not end or same < len(prompt) - 1 or not said.endswith(text):
                raise ValueError(
                    f"message {i}: the chat format writes this answer differently once the dialog "
                    "goes on, or without an end, so that it can't be told what is to be learned"
                )
            labels[begin:end] = ids[begin:end]
    return Example(ids[:end], labels[:end])


def batch(
    rows: Sequence[Example], device: Optional[torch.device] = None
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels, both (B, T), padded on the right with 0 and IGNORED."""
    tokens = padded([row.tokens for row in rows], device or torch.device("cpu"))
    labels = torch.full_like(tokens, IGNORED)
    for i, row in enumerate(rows):
        labels[i, : len(row.labels)] = torch.tensor(row.labels)
    return tokens, labels


def order(n: int, epoch: int, seed: int) -> List[int]:
    """The order of n examples in an epoch, a function of these arguments only."""
    seed = ((seed << 20) + epoch) % (1 << 63)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
