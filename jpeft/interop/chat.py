"""Chat templates: Jinja in a sandbox, with the names that Hugging Face's templates expect."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jpeft.errors import ModelInputError


def template_of(file: bytes | None, said: Any) -> str:
    """Return the chat template of a checkpoint folder: `chat_template.jinja`, or what `tokenizer_config.json` says.

    Example:
        >>> template_of(None, [{"name": "tool_use", "template": "A"}, {"name": "default", "template": "B"}])
        'B'
    """
    if file is not None:
        return file.decode("utf-8")
    if isinstance(said, list):
        named = {one.get("name"): one.get("template") for one in said if isinstance(one, dict)}
        said = named.get("default")
    return said if isinstance(said, str) else ""


def render(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any],
           add_generation_prompt: bool = True, default_system: bool = True) -> str:
    """Render a conversation; see `jpeft.interop.tokenizer.Tokenizer.chat`.

    Raises:
        ModelInputError: there is no template, it is damaged or refuses these messages, or jinja2 is missing.

    Example:
        >>> render("{{ bos_token }}{{ messages[0]['content'] }}", [{"role": "user", "content": "Hi"}],
        ...        {"bos_token": "<s>"})
        '<s>Hi'
    """
    if not template:
        raise ModelInputError("the tokenizer has no chat template; write the prompt yourself, or take a chat model")
    if isinstance(messages, str | Mapping) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise ModelInputError("messages must be a list of {'role': ..., 'content': ...}")

    if default_system or not messages or messages[0]["role"] == "system":
        return _text(template, messages, {**variables, "add_generation_prompt": add_generation_prompt})
    return _without_default(template, messages, variables, add_generation_prompt)


def _without_default(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any],
                     prompt: bool) -> str:
    """Give the template a system prompt, behind which it writes none of its own, and cut that off again."""
    ours, mark = [{"role": "system", "content": "-"}], "\0"
    marked = {**variables, "bos_token": mark}
    try:
        head = _text(template, ours, {**marked, "add_generation_prompt": False})
    except ModelInputError:  # a template that takes no system prompt has none
        return _text(template, messages, {**variables, "add_generation_prompt": prompt})
    whole = _text(template, [*ours, *messages], {**marked, "add_generation_prompt": prompt})
    if not whole.startswith(head):
        raise ModelInputError("this chat template has no system turn of its own to leave out; pass default_system=True")
    rest = mark * head.startswith(mark) + whole[len(head):]
    return rest.replace(mark, str(variables.get("bos_token") or ""))


def _text(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    try:
        import jinja2
    except ImportError as error:
        raise ModelInputError("chat templates need jinja2; pip install 'jpeft[gguf]'") from error
    try:
        return str(_compiled(template).render(messages=[dict(m) for m in messages], **variables))
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, ModelInputError):
            raise
        raise ModelInputError(f"the chat template refuses these messages ({type(error).__name__}: "
                              f"{' '.join(str(error).split())[:300]})") from error


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what the assistant says; the text is not changed by it."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise ModelInputError(f"the chat template refuses these messages: {' '.join(str(message).split())}")

    def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    def now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=refuse, strftime_now=now)
    return environment.from_string(template)
