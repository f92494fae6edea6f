"""Chat templates of Hugging Face files: messages to text, with the Jinja settings and functions of transformers."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from r3rag_jax.errors import UserError
from r3rag_jax.text.template_limits import LimitedEnvironment

# Bundled chat templates, with which the published checkpoints were trained, and the special tokens that they write.
TEMPLATES = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
# Placeholder in a rendered template for a text that is encoded separately. It holds what a template may alter: a
# template that escapes, cuts, reflows or reformats the content does not show the placeholder.
CONTENT = "\x00Content: <a> & \"b\", 'c'  {d}\n\n\\e É 中\x00"


class ChatTemplate:
    """A chat template. It may expect a message's content as text, or as a list of parts as vision models' do."""

    def __init__(self, text: str):
        self.text = text
        self._takes_parts: bool | None = None

    @functools.cached_property
    def _environment(self) -> LimitedEnvironment:
        return _new_environment()

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        return self._environment.from_string(self.text)

    def render(
        self, messages: Sequence[Mapping[str, Any]], specials: Mapping[str, str], *, add_generation_prompt: bool
    ) -> str:
        """Return the text of a conversation. A template that reads parts alone gets each text as one part.

        Args:
            specials: the text of `bos_token`, `eos_token`, … for the template.

        Raises:
            ValueError: the template is not valid, or refuses the messages.
        """
        if self._takes_parts is None:
            self._takes_parts = self._shows_parts_alone(specials)
        if self._takes_parts:
            messages = [_in_parts(message) for message in messages]
        return self._render(messages, specials, add_generation_prompt)

    def _shows_parts_alone(self, specials: Mapping[str, str]) -> bool:
        """Whether the template shows a content in parts, but not one that is text."""
        message = {"role": "user", "content": CONTENT}
        for is_parts, shown in ((False, message), (True, _in_parts(message))):
            try:
                text = self._render([shown], specials, add_generation_prompt=True)
            except ValueError:  # reported, if neither form is shown, where the template is used
                continue
            if CONTENT in text:
                return is_parts
        return False

    def _render(
        self, messages: Sequence[Mapping[str, Any]], specials: Mapping[str, str], add_generation_prompt: bool
    ) -> str:
        try:
            template = self._template
            self._environment.start()
            return template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **specials,
            )
        except Exception as error:  # a template is a program: besides Jinja's errors it may raise any of Python's
            raise ValueError(f"{type(error).__name__}: {error}") from error


def read_template(name: str) -> str:
    """Return the text of a chat template: one of TEMPLATES, or a Jinja file.

    Raises:
        UserError: `name` is neither.
    """
    if name in TEMPLATES:
        return (files("r3rag_jax.text") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"model.chat_template must be {', '.join(TEMPLATES)} or a Jinja file; got {name}") from None


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}


class _Generation(Extension):
    """The block tag {% generation %}, which templates put around the assistant's text; it renders its body."""

    tags = {"generation"}  # noqa: RUF012 (declared by Jinja as a set of the class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the nodes of the block as they are."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _new_environment() -> LimitedEnvironment:
    """Return a sandboxed Jinja environment of limited work with the settings and functions of chat templates."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        # Jinja's own filter escapes <, > and & for HTML, which models were not trained on.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    def strftime_now(format_: str) -> str:
        return datetime.datetime.now().strftime(format_)

    environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.add_filter("tojson", tojson)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
