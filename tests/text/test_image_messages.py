"""Images in dialogs: where their tokens stand, against Meta's and Hugging Face's."""

import io
import random
from types import SimpleNamespace

import pytest
import tokenizers
from conftest import write_byte_tokenizer
from llama_models.datatypes import RawMediaItem, RawMessage, RawTextItem
from llama_models.llama3.chat_format import ChatFormat as MetaChatFormat
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer
from PIL import Image
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from llama import ChatFormat, Tokenizer
from llama.text.chat import PromptOptions, check_dialog
from llama.text.encoder import image_id
from llama.text.llama2 import Llama2Format
from llama.text.llama31 import Llama31Format
from llama.text.messages import image_sources
from llama.text.templates import TemplateFormat
from llama.text.vocabulary.byte_level import image_beyond

TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}{{- '<|image|>' }}
            {%- elif part.type == 'text' %}{{- part.text }}{%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
PNG = io.BytesIO()
Image.new("RGB", (2, 2)).save(PNG, "PNG")
USER = {"role": "user", "content": [{"type": "image", "image": "a.png"}, "What is this?"]}


@pytest.fixture(scope="module")
def llama3(llama3_tokenizer_path) -> Tokenizer:
    return Tokenizer(llama3_tokenizer_path)


def dialogs(n: int) -> list:
    """Texts and images in any order, also none, also in what tools return."""
    rng, found = random.Random(5), []
    for _ in range(n):
        dialog = []
        for role in rng.choices(["system", "user", "assistant", "tool"], k=rng.randrange(1, 6)):
            parts = [
                rng.choice([{"type": "text", "text": text}, {"type": "image", "data": b"?"}])
                for text in rng.choices(
                    ["a", " b\n", "", "<|image|>", "in 1789"], k=rng.randrange(5)
                )
            ]
            dialog.append({"role": role, "content": rng.choice([parts, "only text"])})
        found.append(dialog)
    return found


def test_image_tokens_stand_where_metas_do(llama3, llama3_tokenizer_path):
    ours, theirs = Llama31Format(llama3), MetaChatFormat(MetaTokenizer(llama3_tokenizer_path))
    counts = set()
    for dialog in dialogs(200):
        for message in dialog:
            for part in message["content"]:
                if "data" in part:
                    part["data"] = PNG.getvalue()
        end = {"stop_reason": "end_of_turn"}
        raw = [RawMessage(**m, **(end if m["role"] == "assistant" else {})) for m in dialog]
        expected = theirs.encode_dialog_prompt(raw)
        assert ours.encode_dialog_prompt(dialog) == expected.tokens
        # Meta's own messages are read as they are.
        assert ours.encode_dialog_prompt([vars(m) | {} for m in map(plain, raw)]) == expected.tokens
        images = len(expected.vision.images) if expected.vision else 0
        assert expected.tokens.count(128_256) == images == len(image_sources(dialog))
        counts.add(images)
    assert {0, 1, 2, 3} < counts


def plain(message: RawMessage) -> SimpleNamespace:
    """Its role and content alone, the content of Meta's items."""
    return SimpleNamespace(role=message.role, content=message.content)


def test_templates_with_images_give_what_transformers_renders(tmp_path):
    """The ids of Hugging Face's vocabulary, in which <|image|> is the last."""
    tokenizer = Tokenizer(write_byte_tokenizer(tmp_path / "tokenizer.model"))
    names = tokenizer.special_tokens.items()
    special = {k.replace("<|image|>", "<|other|>"): i for k, i in names} | {"<|image|>": 512}
    tokenizer = Tokenizer(tokenizer.vocabulary._replace(special_tokens=special, n_words=513))
    assert image_id(tokenizer) == 512
    peer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(models.BPE()), bos_token="<|begin_of_text|>"
    )
    ours = TemplateFormat(tokenizer, TEMPLATE)
    for dialog in dialogs(60):
        for message in dialog:  # transformers would read the name in a text as an image
            for part in message["content"]:
                if isinstance(part, dict) and part.get("text") == "<|image|>":
                    part["text"] = "<image>"
        rendered = peer.apply_chat_template(
            dialog, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
        )
        expected = tokenizer.encode(rendered, bos=False, eos=False, allowed_special="all")
        found = ours.encode_dialog_prompt(dialog)
        assert found == expected and found.count(512) == len(image_sources(dialog))


def test_templates_that_read_lists_of_parts_alone_get_these(llama3):
    """Llama Guard 3's of 1B and Vision: a text that isn't in a list would be lost, silently."""
    head = TEMPLATE.index("    {%- if message.content is string")
    alone = TEMPLATE[:head] + TEMPLATE[TEMPLATE.index("        {%- for part") :]
    alone = alone.replace("    {%- endif %}\n    {{- '<|eot_id|>' }}", "    {{- '<|eot_id|>' }}")
    dialog = [
        {"role": "user", "content": "Hello <|image|>"},
        {"role": "assistant", "content": "Well"},
    ]
    for end in ([], [USER]):
        expected = TemplateFormat(llama3, TEMPLATE).encode_dialog_prompt([*dialog, *end])
        assert TemplateFormat(llama3, alone).encode_dialog_prompt([*dialog, *end]) == expected
    options = PromptOptions(None, True)
    found, expected = (
        TemplateFormat(llama3, template).encode_dialog_prompt(dialog, options=options)
        for template in (alone, TEMPLATE)
    )
    assert found == expected


def test_images_beside_tools_stand_in_texts_where_the_template_takes_no_parts(llama3):
    """Llama 3.2 Vision's template trims the first question, which it then writes with tools."""
    loop = TEMPLATE.index("{%- for message")
    trims = TEMPLATE[:loop] + (
        "{%- if tools %}{{ tools | length }} {{ messages[0].content | trim }}<|eot_id|>"
        "{%- set messages = messages[1:] %}{%- endif %}"
    )
    ours = TemplateFormat(llama3, trims + TEMPLATE[loop:])
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    content = [USER["content"][0], "<|image|> 1?", {"type": "image", "image": "b"}]
    dialog = [{"role": "user", "content": content}, {"role": "assistant", "content": "2"}]
    ids = ours.encode_dialog_prompt([*dialog, USER], [tool])
    header, end = llama3.special_tokens["<|start_header_id|>"], llama3.special_tokens["<|eot_id|>"]
    first, rest = ids[: ids.index(end)], ids[ids.index(header) :]
    one, after = llama3.encode("1 ", bos=False, eos=False), "<|image|> 1?"
    said = llama3.encode(after, bos=False, eos=False)
    assert first[1:] == [*one, 128_256, *said, 128_256]
    plain = ours.encode_dialog_prompt([dialog[1], USER])
    assert rest == plain[plain.index(header) :]


def test_tokens_added_after_that_of_images_leave_it_its_place(tmp_path):
    """Fine-tuning often adds one for padding, for which the embeddings have room."""
    tokenizer = Tokenizer(write_byte_tokenizer(tmp_path / "tokenizer.model"))
    assert image_id(tokenizer) == 512  # beyond Meta's
    special = image_beyond(tokenizer.special_tokens) | {"<pad>": 513, "<tool>": 514}
    for n_words in (513, 514, 515):
        known = {name: i for name, i in special.items() if i < n_words}
        vocabulary = tokenizer.vocabulary._replace(special_tokens=known, n_words=n_words)
        assert image_id(Tokenizer(vocabulary)) == 512


def test_the_name_of_the_image_token_in_a_text_is_text(llama3):
    dialog = [{"role": "user", "content": ["<|image|>", {"type": "image", "image": "x"}]}]
    meta = llama3.special_tokens["<|image|>"]
    for tested in (Llama31Format(llama3), ChatFormat(llama3), TemplateFormat(llama3, TEMPLATE)):
        ids = tested.encode_dialog_prompt(dialog)
        assert ids.count(128_256) == 1 and meta not in ids
        assert "<|image|>" in llama3.decode([i for i in ids if i != 128_256])


def test_all_ways_to_write_an_image_are_the_same(llama3):
    parts = [
        {"type": "image", "image": b"x"}, {"type": "image", "data": b"x"},
        {"type": "image", "path": b"x"}, {"type": "image", "url": b"x"},
        {"type": "image_url", "image_url": {"url": b"x", "detail": "low"}},
        {"type": "image_url", "image_url": b"x"}, SimpleNamespace(type="image", data=b"x"),
        RawMediaItem(data=b"x"),
    ]  # fmt: skip
    assert image_sources([{"role": "user", "content": [*parts, "text"]}]) == [b"x"] * len(parts)
    assert image_sources([{"role": "user", "content": RawTextItem(text="a")}]) == []
    base64 = [{"type": "image", key: "eA=="} for key in ("data", "base64")]  # Meta's, transformers'
    assert image_sources([{"role": "user", "content": base64}]) == ["data:;base64,eA=="] * 2


def test_texts_of_a_dialog_without_images_are_as_before(llama3):
    """A list of one text is that text, to every format."""
    as_list = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    as_text = [{"role": "user", "content": "Hello"}]
    for tested in (
        Llama31Format(llama3), ChatFormat(llama3), TemplateFormat(llama3, TEMPLATE),
        Llama2Format(llama3),
    ):  # fmt: skip
        assert tested.encode_dialog_prompt(as_list) == tested.encode_dialog_prompt(as_text)


def test_tools_come_before_the_images_of_the_first_question(llama3):
    def add(a: int, b: int) -> int:
        """Add numbers.

        Args:
            a: one
            b: another
        """
        return a + b

    ours = Llama31Format(llama3)
    with_image = ours.encode_dialog_prompt([USER], [add])
    text = ours.encode_dialog_prompt([{"role": "user", "content": "What is this?"}], [add])
    assert [i for i in with_image if i != 128_256] == text or with_image.count(128_256) == 1
    assert llama3.decode([i for i in with_image if i < 128_256]) == llama3.decode(text)


def test_formats_without_a_place_for_images_say_so(llama3, smollm2_path):
    for tested in (
        Llama2Format(llama3),
        TemplateFormat(llama3, "{% for m in messages %}{{ m.role }}{% endfor %}"),
        TemplateFormat(Tokenizer(smollm2_path), TEMPLATE.replace("<|", "<")),
    ):
        with pytest.raises(ValueError, match=r"image"):
            tested.encode_dialog_prompt([USER])
    with pytest.raises(ValueError, match="no place for it there"):
        TemplateFormat(llama3, TEMPLATE).encode_dialog_prompt(
            [USER, {**USER, "role": "assistant"}], options=PromptOptions(None, True)
        )


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image"}, {"type": "image", "image": None}, {"type": "video", "video": "x"},
        {"type": "text"}, {"type": "text", "text": 3}, {"type": "image_url", "image_url": {}},
        {"type": "image", "image": "a", "url": "b"}, 3, None,
    ],
)  # fmt: skip
def test_parts_are_checked(part):
    with pytest.raises(ValueError, match="dialog 4: a part of a message is .*'image'"):
        check_dialog(4, [{"role": "user", "content": ["x", part]}])
