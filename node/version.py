"""Which release of the node this is, as it names itself to peers and clients."""

from __future__ import annotations

VERSION = "0.1.0"
AGENT = f"openagi-node/{VERSION}"
