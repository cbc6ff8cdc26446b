"""How a model was taught to call functions, recognised from its chat template's own text.

Rules: core. A template that is not known to write one of these has no format: its model's calls come as its text.
Source: the templates of Qwen 2.5 and Hermes 2 Pro, of Llama 3.1, of Mistral 7B v0.3.
"""

from __future__ import annotations

from typing import Final

HERMES: Final = "hermes"  # <tool_call>{"name": ..., "arguments": {...}}</tool_call>
LLAMA: Final = "llama"  # {"name": ..., "parameters": {...}}, maybe behind <|python_tag|>
MISTRAL: Final = "mistral"  # [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]


def call_format(template: str) -> str | None:
    """The format, None: not one that is known here."""
    if "<tool_call>" in template:
        return None if "<function=" in template else HERMES  # Qwen3 Coder writes tags and no JSON
    if "[TOOL_CALLS]" in template:
        return None if "[ARGS]" in template else MISTRAL  # since their v11 the name stands before the arguments
    if "<|python_tag|>" in template or '"parameters": dictionary of argument' in template:
        return LLAMA
    return None
