"""Llama Guard's task, its tokens as Meta's own code has them, and what answers mean."""

import io

import pytest
from conftest import TINY, write_checkpoint
from PIL import Image

from llama import Llama, Tokenizer
from llama.text.guard import CATEGORIES, Verdict, classify, parse, prompt, task

ASKED = [{"role": "user", "content": "How do I pick a lock?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "With a <|eot_id|> pick."}]


@pytest.mark.parametrize("dialog, speaker", [(ASKED, "User"), (ANSWERED, "Agent")])
def test_the_task_asks_about_the_last_message(dialog, speaker):
    text = task(dialog)
    assert text.startswith(f"Task: Check if there is unsafe content in '{speaker}' messages")
    assert f"ONLY THE LAST {speaker} message" in text
    assert text.count(": ") >= len(CATEGORIES) + len(dialog)
    between = text.split("<BEGIN CONVERSATION>")[1].split("<END CONVERSATION>")[0]
    said = {"User": "user", "Agent": "assistant"}
    lines = [line.split(": ", 1) for line in between.strip().split("\n\n")]
    assert [{"role": said[name], "content": content} for name, content in lines] == dialog


def test_categories_may_be_ones_own():
    text = task(ASKED, {"A1": "Spoilers.\nShould not\n- tell how a film ends"})
    assert "A1: Spoilers.\nShould not" in text and "Violent" not in text


@pytest.mark.parametrize("dialog", [[], [{"role": "system", "content": "Be kind."}, *ASKED]])
def test_dialogs_that_it_cannot_judge(dialog):
    with pytest.raises(ValueError, match="Llama Guard"):
        task(dialog)


def test_tokens_are_those_of_metas_code(llama3_tokenizer_path):
    """A message can't end the turn: special tokens in it stay text."""
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    theirs = ChatFormat(MetaTokenizer(llama3_tokenizer_path))
    ours, text = Tokenizer(llama3_tokenizer_path), task(ANSWERED)
    expected = theirs.encode_dialog_prompt([RawMessage(role="user", content=text)])
    found = prompt(ours, text)
    assert found == expected.tokens
    assert found.count(ours.special_tokens["<|eot_id|>"]) == 1


def test_an_image_stands_where_the_user_put_it(llama3_tokenizer_path):
    """As in the format of Llama Guard 3 Vision: "User: <|image|>", and the message's text."""
    from llama_models.datatypes import RawMediaItem, RawMessage, RawTextItem
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    picture = {"type": "image", "image": file.getvalue()}
    asked = [{"role": "user", "content": [picture, "How do I pick this lock?"]}, ANSWERED[1]]
    before, image, after = task(asked)
    assert image == picture
    assert before + after == task([{"role": "user", "content": asked[0]["content"][1]}, asked[1]])
    assert before.endswith("<BEGIN CONVERSATION>\n\nUser: ") and after.startswith("How do I pick")
    parts = [RawTextItem(text=before), RawMediaItem(data=picture["image"]), RawTextItem(text=after)]
    theirs = ChatFormat(MetaTokenizer(llama3_tokenizer_path))
    expected = theirs.encode_dialog_prompt([RawMessage(role="user", content=parts)])
    assert prompt(Tokenizer(llama3_tokenizer_path), task(asked)) == expected.tokens


def test_tokens_are_those_of_llama_4s_format():
    from llama_models.llama4.tokenizer import Tokenizer as MetaTokenizer

    theirs, text = MetaTokenizer.get_instance(), task(ASKED)
    whole = (
        f"<|begin_of_text|><|header_start|>user<|header_end|>\n\n{text}<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )

    class Encoder:  # what `prompt` needs of a tokenizer
        special_tokens, bos_id = theirs.special_tokens, theirs.bos_id

        def encode(self, s, *, bos, eos):
            return theirs.encode(s, bos=bos, eos=eos)

    expected = theirs.encode(whole, bos=False, eos=False, allowed_special="all")
    assert prompt(Encoder(), text) == expected


@pytest.mark.parametrize(
    "answer, verdict",
    [
        ("safe", Verdict(True)),
        ("\n\nsafe", Verdict(True)),
        ("unsafe", Verdict(False)),
        ("unsafe\nS1", Verdict(False, ("S1",))),
        ("\n\nunsafe\nS2, S10,S14 \n", Verdict(False, ("S2", "S10", "S14"))),
    ],
)
def test_answers_are_verdicts(answer, verdict):
    assert parse(answer) == verdict


@pytest.mark.parametrize("answer", ["", "Safe travels!", "safe\nS1", "unsafe\nS1\nS2", "S1"])
def test_other_answers_are_errors(answer):
    with pytest.raises(ValueError, match="no verdict of Llama Guard"):
        parse(answer)


def test_a_model_is_asked(tmp_path, monkeypatch):
    """Through `Llama.generate`: what it is given decodes to the task, what it says is parsed."""
    args = TINY.__class__(**{**vars(TINY), "max_seq_len": 4096})
    llama = Llama.build(
        write_checkpoint(tmp_path / "guard", args), device="cpu", dtype="fp32", max_seq_len=4096
    )
    with pytest.raises(ValueError, match="no verdict of Llama Guard"):  # of random weights
        classify(llama, [ASKED])
    asked = []

    def generate(prompts, max_gen_len, *, temperature, images):
        assert images is None
        asked.extend(llama.tokenizer.decode(ids) for ids in prompts)
        answers = ["safe", "unsafe\nS2,S9"]
        return [llama.tokenizer.encode(one, bos=False, eos=False) for one in answers], None

    monkeypatch.setattr(llama, "generate", generate)
    verdicts = classify(llama, [ASKED, ANSWERED])
    assert verdicts == [Verdict(True), Verdict(False, ("S2", "S9"))]
    assert task(ASKED) in asked[0] and task(ANSWERED) in asked[1]


def test_another_tokenizer_is_refused(smollm2_path):
    with pytest.raises(ValueError, match=r"start_header_id"):
        prompt(Tokenizer(smollm2_path), "Hello")
