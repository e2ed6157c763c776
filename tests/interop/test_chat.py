"""Chat templates: what templates of the wild use, what they may not do, and leaving out their own system prompt."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("jinja2", reason="needs jinja2, which chat templates are written in")
pytest.importorskip("tokenizers", reason="needs tokenizers, which the tokenizer wraps")

import tokenizers

from jpeft.errors import ModelInputError
from jpeft.interop.chat import template_of
from jpeft.interop.tokenizer import Tokenizer

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
CHATML = ("{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
          "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
          "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3 = ("{{- bos_token }}{%- for m in messages %}{{- '[' + m.role + ']' + m.content|trim + '<eot>' }}{%- endfor %}"
          "{%- if add_generation_prompt %}{{- '[assistant]' }}{%- endif %}")
GEMMA = ("{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role\nnot supported') }}"
         "{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")


def chat(template: str, *messages: Any, **options: Any) -> str:
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "<|im_start|>": 1}, "<s>"))
    return Tokenizer(raw, 0, 8, False, {"bos_token": 1 if template == CHATML else 0}, template=template).chat(
        messages, **options)


def test_conversations() -> None:
    head = "<|im_start|>system\nBe kind<|im_end|>\n"
    turn, prompt = "<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>assistant\n"
    assert chat(CHATML, USER) == head + turn + prompt
    assert chat(CHATML, USER, ANSWER, add_generation_prompt=False) == head + turn + prompt + "Yo<|im_end|>\n"
    assert chat(LLAMA3, USER) == "<s>[user]Hi<eot>[assistant]"


@pytest.mark.parametrize(("template", "want"), [
    (CHATML, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    (LLAMA3, "<s>[user]Hi<eot>[assistant]"),
    (GEMMA, "<s><user>Hi"),
])  # fmt: skip
def test_without_the_templates_own_system_prompt(template: str, want: str) -> None:
    assert chat(template, USER, default_system=False) == want


def test_a_system_prompt_of_the_user_stays() -> None:
    system = {"role": "system", "content": "Be terse"}
    assert chat(CHATML, system, USER, default_system=False) == chat(CHATML, system, USER)


def test_a_template_that_folds_the_system_prompt_in() -> None:
    folds = "{% if messages[0].role == 'system' %}{{ messages[-1].content }}{{ messages[0].content }}{% endif %}"
    with pytest.raises(ModelInputError, match="no system turn of its own to leave out"):
        chat(folds, USER, default_system=False)


def test_what_templates_use() -> None:
    assert chat("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
                USER, ANSWER) == "Hi"
    assert chat("{% generation %}{{ messages[0].content }}{% endgeneration %}!", USER) == "Hi!"
    assert chat("{{ messages[0] | tojson }} {{ tools is defined }} {{ think }}", {"role": "user", "content": "<ü>"},
                think=True) == '{"role": "user", "content": "<ü>"} False True'
    assert chat("{{ strftime_now('%Y') }}", USER) >= "2024"
    assert chat("    {% if true %}\na\n    {% endif %}\nb", USER) == "a\nb"


@pytest.mark.parametrize(("template", "text"), [
    ("", "has no chat template"),
    ("{% if %}", r"refuses these messages \(TemplateSyntaxError"),
    ("{{ messages[0].content.nothing.more }}", r"\(UndefinedError"),
    ("{{ raise_exception('roles must\nalternate') }}", "refuses these messages: roles must alternate"),
    ("{{ messages.__class__.__mro__ }}", r"\(SecurityError"),
    ("{{ messages.append(1) }}", r"\(SecurityError"),
    ("{{ 1 + 'a' }}", r"\(TypeError"),
])  # fmt: skip
def test_refusals(template: str, text: str) -> None:
    with pytest.raises(ModelInputError, match=text) as caught:
        chat(template, USER)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("messages", ["Hi", USER, [{"content": "Hi"}]])
def test_messages_of_another_form(messages: Any) -> None:
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0}, "<s>"))
    with pytest.raises(ModelInputError, match="must be a list of"):
        Tokenizer(raw, 0, 8, False, template="x").chat(messages)


def test_where_folders_keep_templates() -> None:
    assert template_of("ü".encode(), "other") == "ü"
    assert template_of(None, "A") == "A"
    assert template_of(None, [{"name": "default", "template": "B"}]) == "B"
    assert template_of(None, None) == ""
