"""Sign a request for any node of the network: no API key, no account, only an Ed25519 key of your own.

A node accepts it once, within a minute, and no other node does: the signature covers method, path, query, body and the
peer id of the node that is asked. RFC 9421 (HTTP message signatures), RFC 9530 (Content-Digest).

    pip install cryptography
    python signed.py http://127.0.0.1:8765 12D3KooW... "Once upon a time"

The peer id is what the node prints when it starts, and what `GET /api/v1/status` calls node.peer_id.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

LIFE_S = 30  # a node takes at most 60
COVERED = '("@method" "@path" "@query" "content-digest" "x-audience")'


def signed_headers(
    key: Ed25519PrivateKey, method: str, url: str, body: bytes, audience: str, now: float | None = None
) -> dict[str, str]:
    """The headers that make this request a signed one.

    key: yours; keep it, for it is who you are. audience: the peer id of the node that the request goes to. body: the
    very bytes that are sent (b"" for none). Send the request with these headers within LIFE_S seconds, once: sign a
    repetition anew. The path and the query are signed as they stand in `url`, so send exactly that.
    """
    parts = urlsplit(url)
    created = int(time.time() if now is None else now)
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
    digest = f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"
    covered = (
        f"{COVERED};created={created};expires={created + LIFE_S}"
        f';nonce="{secrets.token_urlsafe(18)}";keyid="{public}";alg="ed25519"'
    )
    base = "\n".join(
        [
            f'"@method": {method.upper()}',
            f'"@path": {parts.path or "/"}',
            f'"@query": ?{parts.query}',
            f'"content-digest": {digest}',
            f'"x-audience": {audience}',
            f'"@signature-params": {covered}',
        ]
    )
    signature = base64.b64encode(key.sign(base.encode())).decode()
    return {
        "content-digest": digest,
        "x-audience": audience,
        "signature-input": f"sig1={covered}",
        "signature": f"sig1=:{signature}:",
    }


def main() -> None:
    """Ask for a completion with a fresh key."""
    if len(sys.argv) != 4:
        sys.exit("usage: signed.py URL PEER_ID TEXT")
    node, audience, text = sys.argv[1].rstrip("/"), sys.argv[2], sys.argv[3]
    url = f"{node}/v1/completions"
    body = json.dumps({"prompt": text, "max_tokens": 32}).encode()
    headers = signed_headers(Ed25519PrivateKey.generate(), "POST", url, body, audience)
    request = urllib.request.Request(url, body, {"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=130) as response:
            print(json.load(response)["choices"][0]["text"])
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.code}: {json.load(error)['error']['message']}")
    except urllib.error.URLError as error:
        sys.exit(f"no node answers at {node}: {error.reason}")


if __name__ == "__main__":
    main()
