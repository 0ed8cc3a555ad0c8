"""A template that switches reasoning on and off, as SmolLM3's, by a variable or by the system."""

import pytest

from llama import Tokenizer
from llama.text.chat import PromptOptions
from llama.text.templates import TemplateFormat

TEMPLATE = """\
{%- set thinks = enable_thinking if enable_thinking is defined else true -%}
{%- if messages[0].role == "system" and "/no_think" in messages[0].content -%}
{%- set thinks = false -%}{%- endif -%}
{{- "<|im_start|>system\\nReasoning Mode: " ~ ("/think" if thinks else "/no_think") }}<|im_end|>
{% for message in messages -%}
{%- if message.role == "assistant" -%}
{% generation %}
{{- "<|im_start|>assistant\\n" ~ message.content ~ "<|im_end|>\\n" }}{% endgeneration %}
{%- elif message.role == "user" -%}
{{- "<|im_start|>user\\n" ~ message.content ~ "<|im_end|>\\n" }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|im_start|>assistant\\n" ~ ("" if thinks else "<think>\\n\\n</think>\\n") }}
{%- endif -%}"""
USER = {"role": "user", "content": "Hello <|im_end|>"}


@pytest.mark.parametrize(
    "dialog, kwargs, thinks",
    [
        ([USER], {}, True),
        ([USER], {"enable_thinking": True}, True),
        ([USER], {"enable_thinking": False}, False),
        ([{"role": "system", "content": "/no_think"}, USER], {}, False),
    ],
)
def test_reasoning_is_switched(smollm2_path, dialog, kwargs, thinks):
    tokenizer = Tokenizer(smollm2_path)
    found = TemplateFormat(tokenizer, TEMPLATE).encode_dialog_prompt(
        dialog, options=PromptOptions(template_kwargs=kwargs)
    )
    mode, end = ("/think", "") if thinks else ("/no_think", "<think>\n\n</think>\n")
    text = tokenizer.decode(found)
    assert text.startswith(f"<|im_start|>system\nReasoning Mode: {mode}<|im_end|>\n")
    assert text.endswith(f"<|im_start|>assistant\n{end}")
    special = tokenizer.special_tokens["<|im_end|>"]
    assert found.count(special) == 2 and "Hello <|im_end|>" in text  # the user's stays text


def test_another_variable_is_refused(smollm2_path):
    template = TemplateFormat(Tokenizer(smollm2_path), TEMPLATE)
    with pytest.raises(ValueError, match="no variable 'thinking'"):
        template.encode_dialog_prompt(
            [USER], options=PromptOptions(template_kwargs={"thinking": False})
        )
