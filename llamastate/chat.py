"""Chat templates: the one inside the GGUF, rendered by Jinja2 in a sandbox.

A template is a program that came with a download. The sandbox keeps it from touching anything but its arguments, and
a failure of any kind becomes :class:`~llamastate.errors.TemplateError`.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llamastate.errors import TemplateError

__all__ = ["render"]


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None, **_: Any) -> str:
    # Jinja's own filter escapes <, > and & for HTML; models were trained on plain JSON
    return json.dumps(value, ensure_ascii=False, indent=indent)


@lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    # What templates in the wild expect: the options and helpers of transformers' apply_chat_template.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: dt.datetime.now().strftime(form)
    return environment.from_string(template)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    bos_token: str,
    eos_token: str,
    **variables: Any,
) -> str:
    """Render a chat template.

    Parameters
    ----------
    template : str
        Jinja2 source.
    messages : sequence of mapping
        Each with ``role`` and ``content``, and whatever else the template reads.
    add_generation_prompt : bool
        Whether the text ends where the assistant is to begin.
    bos_token, eos_token : str
        Their text.
    **variables
        More names for the template (``tools``, ``enable_thinking``, ...).

    Raises
    ------
    TemplateError
        The template cannot be compiled, or refuses these messages.
    """
    try:
        return _compile(template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
            **variables,
        )
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise TemplateError(f"the chat template failed: {error}", reason=str(error)) from error
