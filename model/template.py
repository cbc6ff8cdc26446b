"""A model's chat template: rendered in a sandbox, its size, its work and its output bounded.

Rules: a template is the model's, so an attacker's: it may not read attributes, and what it may do is counted.
Source: transformers `utils/chat_template_utils.py` for what templates may call; SECURITY.md F14.
"""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import FOREIGN, BadInput, BadModel, first_line

TEMPLATE_CHARS_MAX = 64 << 10
RENDERED_CHARS_MAX = 1 << 20


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, special_tokens: dict[str, object]) -> None:
        """Raises BadModel for a template that is too long or does not compile."""
        if len(source) > TEMPLATE_CHARS_MAX:
            raise BadModel(f"the chat template has {len(source):,} characters, over {TEMPLATE_CHARS_MAX:,}")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        try:
            self._template = environment.from_string(source)
        except (TemplateError, *FOREIGN) as exc:
            raise BadModel(f"the chat template does not compile ({first_line(exc)})") from exc
        self._special_tokens = special_tokens

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The prompt text for (role, content) pairs. Raises BadInput, also for a template that does too much."""
        rows = [{"role": role, "content": content} for role, content in messages]
        try:
            return str(
                self._template.render(messages=rows, tools=None, add_generation_prompt=True, **self._special_tokens)
            )
        except (TemplateError, *FOREIGN) as exc:
            raise BadInput(f"the model's chat template refuses these messages ({first_line(exc)})") from exc
