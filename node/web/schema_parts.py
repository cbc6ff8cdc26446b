"""What the bodies of other vendors' clients have in common: sampling's bounds, and text that comes in parts.

Rules: core. A part of another kind than text, and a key that a part may not have, is refused and named. Parts of one
message are joined as they are: vendors cut one text into parts at any place (citations, cache breakpoints).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from node import work
from node.errors import BadRequest

Tokens = Annotated[int, Field(ge=1, le=work.TOKENS_MAX)]
Temperature = Annotated[float, Field(ge=0.0, le=10.0)]
TopP = Annotated[float, Field(gt=0.0, le=1.0)]
TopK = Annotated[int, Field(ge=0, le=1 << 20)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Field(max_length=work.STOPS_MAX)]
Logprobs = Annotated[int, Field(ge=0, le=work.LOGPROBS_MAX)]

# type of a part -> keys that it may have beside type and text, none of which changes the text
PartKinds = Mapping[str, frozenset[str]]


def object_of(value: object, param: str, keys: frozenset[str]) -> dict[str, object]:
    """An object with these keys only (null means absent). Raises BadRequest that names what is too much."""
    if not isinstance(value, dict):
        raise BadRequest(f"{param} is {shown(value)}, wanted an object with {', '.join(sorted(keys))}", param=param)
    for key in value.keys() - keys:
        if value[key] not in (None, []):
            where = f"{param}.{str(key)[:60]}"
            raise BadRequest(f"{where} is not supported by this node: leave it out", param=where)
    return value


def text_of(value: object, param: str, kinds: PartKinds, *, between: str = "") -> str:
    """The text of a string or of text parts. Raises BadRequest."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise BadRequest(f"{param} is {shown(value)}, wanted a string or text parts", param=param)
    texts = []
    for index, part in enumerate(value):
        where = f"{param}.{index}"
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            came = f"a part of type {shown(kind)}" if isinstance(part, dict) else shown(part)
            raise BadRequest(
                f"{where} is {came}; this node's models read text only: {' or '.join(sorted(kinds))}", param=where
            )
        text = object_of(part, where, kinds[kind] | {"type", "text"}).get("text")
        if not isinstance(text, str):
            raise BadRequest(f"{where}.text is {shown(text)}, wanted a string", param=f"{where}.text")
        texts.append(text)
    return between.join(texts)


def shown(value: object) -> str:
    """A short picture of what came, for error messages."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
