"""What a client sends of a sealed request: to whom, and bytes that this node cannot read.

Rules: core. Source: docs/PROTOCOLS.md, "Sealed requests".
"""

from __future__ import annotations

from pydantic import ConfigDict, Field

from crypto.identity import PEER_ID_CHARS_MAX
from node.web.schema import Strict


class SealedRequest(Strict):
    """POST /api/v1/sealed. All but peer are base64."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    peer: str = Field(min_length=1, max_length=PEER_ID_CHARS_MAX)
    key: str = Field(max_length=64)
    request_id: str = Field(max_length=64)
    sealed: str
