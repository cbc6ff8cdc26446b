#!/usr/bin/env python3
"""Asks a model through any node so that only the peer that answers can read the prompt. Needs cryptography 47 or later.

    python sealed.py "Once upon a time"                           through the node on this machine
    python sealed.py --node http://HOST:PORT --peer 12D3KooW...   a peer that you chose yourself
    python sealed.py --model NAME --max-tokens 40 --path /v1/completions "Once"

The node that is asked sees peer, sizes and times. It also says which peers there are: name one with --peer when you have
reason to trust one, for a node that lies may list only peers of its own. A peer's key is believed when its identity,
whose public key the peer id is, has signed it. Wire form: docs/PROTOCOLS.md, "Sealed requests".

When a peer fails before its first word, the next one is asked. When it fails later, the request is sealed to another
and STARTS AGAIN from nothing, and that is said on stderr: only the asker can go on with what is sealed, and to go on in
the middle of an answer exactly takes its token ids, which OpenAI's routes do not tell.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SUITE_ID = bytes.fromhex("002000010001")  # DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-128-GCM
SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_128_GCM)
SALT, MORE, LAST, RELAY = 0, 1, 2, 3  # kinds of frames
SKEW_MS = 60_000
PAD_TO = 1024  # the request's plain text is a multiple, so that its length tells little
PEERS_MAX = 4  # tried for one request
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


class Untrue(Exception):
    """Something was not made by the peer that was asked, or is not whole."""


class Failed(Exception):
    """A peer, or the node, gave no answer. Another peer may."""


class WrongKey(Failed):
    """The peer has another key by now; statement is its new one."""

    def __init__(self, statement: bytes) -> None:
        super().__init__("the peer has another key by now")
        self.statement = statement


# --- who a peer is, and its key ---


def public_key_of(peer: str) -> bytes:
    """The Ed25519 key that a peer id is."""
    number = 0
    for char in peer:
        number = number * 58 + BASE58.index(char)
    raw = number.to_bytes(38, "big")
    if raw[:6] != bytes.fromhex("002408011220"):
        raise Untrue(f"{peer} is no Ed25519 peer id")
    return raw[6:]


def elements(raw: bytes) -> Iterator[Any]:
    """The scalars of a msgpack array of less than 16: texts, bytes and unsigned integers."""
    at, left = 1, raw[0] - 0x90
    while left > 0:
        left, tag = left - 1, raw[at]
        at += 1
        if tag < 0x80:
            yield tag
            continue
        width = {0xC4: 1, 0xC5: 2, 0xD9: 1, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}.get(tag, 0)
        number = tag & 0x1F if 0xA0 <= tag < 0xC0 else int.from_bytes(raw[at : at + width], "big")
        at += width
        if 0xCC <= tag <= 0xCF:
            yield number
            continue
        content = raw[at : at + number]
        at += number
        yield content if tag in (0xC4, 0xC5) else content.decode()


def key_of(statement: bytes, peer: str, now_ms: int | None = None) -> tuple[bytes, str]:
    """The peer's sealing key and the network it is for. Raises Untrue unless this very peer signed it, for now."""
    now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    try:
        version, domain, network, sender, _, made_ms, expires_ms, body, signature = elements(statement)
        if (version, domain, sender) != (1, "sealing", public_key_of(peer)) or statement[0] != 0x99:
            raise Untrue("the statement is not this peer's statement of a sealing key")
        signed = b"openagi:sealing:\x98" + statement[1:-66]
        Ed25519PublicKey.from_public_bytes(sender).verify(signature, signed)
    except (ValueError, IndexError, TypeError, OverflowError, InvalidSignature) as exc:
        raise Untrue("the key was not signed by the peer that it is said to be of") from exc
    if not made_ms - SKEW_MS <= now_ms <= expires_ms + SKEW_MS:
        raise Untrue("the key's time is over or has not come: is this machine's clock right?")
    if len(body) != 38 or body[:6] != SUITE_ID:
        raise Untrue("the key is for another suite: this client is too old, or too new")
    return body[6:], network


# --- one sealed request ---


class Request:
    """A request sealed to one peer, and what opens its answer."""

    def __init__(self, peer: str, statement: bytes, path: str, body: dict[str, Any]) -> None:
        self.key, network = key_of(statement, peer)
        self.peer, self.id, self._secret = peer, os.urandom(16), os.urandom(32)
        parts = (network.encode(), peer.encode(), self.id)
        self._context = b"".join(len(part).to_bytes(2, "big") + part for part in parts)
        text = json.dumps({"path": path, "body": body}).encode()
        text += b" " * (-len(text) % PAD_TO)
        info = self._labelled(b"openagi:sealed:1:request")
        self.sealed = SUITE.encrypt(self._secret + text, X25519PublicKey.from_public_bytes(self.key), info)
        self._aead: AESGCM | None = None
        self._count = 0
        self.is_whole = False

    def _labelled(self, label: bytes) -> bytes:
        return len(label).to_bytes(2, "big") + label + self._context

    def to_json(self) -> bytes:
        """The body of POST /api/v1/sealed."""
        fields = {"key": self.key, "request_id": self.id, "sealed": self.sealed}
        told = {name: base64.b64encode(value).decode() for name, value in fields.items()}
        return json.dumps({"peer": self.peer, **told}).encode()

    def open(self, frame: bytes) -> bytes:
        """The content of the next frame. Raises Untrue: it was changed, left out, repeated or moved."""
        if self.is_whole:
            raise Untrue("something came after the last frame")
        if frame[0] == SALT and self._aead is None:
            info = self._labelled(b"openagi:sealed:1:answer")
            key = HKDF(algorithm=SHA256(), length=16, salt=frame[1:], info=info).derive(self._secret)
            self._aead = AESGCM(key)
            return b""
        if self._aead is None or frame[0] not in (MORE, LAST):
            raise Untrue(f"a frame of kind {frame[0]} came out of turn")
        nonce = self._count.to_bytes(12, "big")
        self._count += 1
        try:
            plain = self._aead.decrypt(nonce, frame[1:], frame[:1])
        except InvalidTag as exc:
            raise Untrue("a frame was not sealed by the peer, or not in its turn") from exc
        self.is_whole = frame[0] == LAST
        return plain[4 : 4 + int.from_bytes(plain[:4], "big")]


# --- the node in between ---


class Node:
    """The node that passes requests on."""

    def __init__(self, url: str, timeout_s: float = 120.0) -> None:
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connect: Callable[[], http.client.HTTPConnection] = lambda: kind(parts.netloc, timeout=timeout_s + 10)
        self._base, self._timeout_s = parts.path.rstrip("/"), timeout_s

    def get(self, path: str) -> Any:
        """The JSON at a path. Raises Failed."""
        connection = self._connect()
        try:
            connection.request("GET", self._base + path)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as exc:
            raise Failed(f"the node cannot be asked: {exc}") from exc
        finally:
            connection.close()
        if response.status != 200:
            raise Failed(_message(body))
        return json.loads(body)

    def statement_of(self, peer: str) -> bytes:
        """A peer's statement of its key, as the node has it from the peer. Raises Failed."""
        return base64.b64decode(self.get(f"/api/v1/peers/{peer}/sealing-key")["statement"])

    def frames(self, request: Request) -> Iterator[bytes]:
        """The frames of its answer as they come. Raises Failed, WrongKey. Closing the iterator cancels the request."""
        connection = self._connect()
        headers = {"content-type": "application/json", "x-timeout-s": str(self._timeout_s)}
        try:
            connection.request("POST", self._base + "/api/v1/sealed", request.to_json(), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise _refused(response.read())
            while head := response.read(4):
                size = int.from_bytes(head, "big")
                frame = response.read(size)
                if len(frame) < size:
                    break
                if frame and frame[0] == RELAY:
                    raise _refused(frame[1:])
                if frame:
                    yield frame
        except (OSError, http.client.HTTPException) as exc:
            raise Failed(f"the node is gone: {exc}") from exc
        finally:
            connection.close()

    def answer(self, request: Request) -> Iterator[bytes]:
        """The body of its answer as it comes. Raises Failed (also: the peer's own error), WrongKey, Untrue."""
        contents = (request.open(frame) for frame in self.frames(request))
        next(contents, None)  # the salt
        head = json.loads(next(contents, None) or b'{"status": 0}')
        if head["status"] == 0:
            raise Untrue("the answer ended before its head")
        if head["status"] != 200:
            raise Failed(_message(b"".join(contents)))
        yield from contents
        if not request.is_whole:
            raise Untrue("the answer was cut before its last frame")

    def peers_with(self, model: str | None) -> list[str]:
        """Peers that serve the model (any that makes text), who has most room first; the node itself last."""
        rows = self.get("/v1/models")["data"]
        wanted = [row for row in rows if row["kind"] == "causal" and model in (None, row["id"])]
        names = {row["id"] for row in wanted}
        peers = [row for row in self.get("/api/v1/peers")["peers"] if names & {one["name"] for one in row["models"]}]
        peers.sort(key=lambda row: (-(row["slots_free"] or 0), row["rtt_ms"] or 1e9))
        own = [self.get("/api/v1/status")["node"]["peer_id"]] if any(row["local"] for row in wanted) else []
        return [row["peer_id"] for row in peers] + own


def ask(
    node: Node, peers: list[str], path: str, body: dict[str, Any], say: Callable[[str], object]
) -> Iterator[bytes]:
    """The answer of the first of these peers that gives a whole one. What was had of another's is not taken back: `say`
    is told that the answer starts again. Raises Failed when none does."""
    why = "there is no peer to ask"
    for peer in peers[:PEERS_MAX]:
        statement: bytes | None = None
        for _ in range(2):  # once more when its key has changed
            began = False
            try:
                statement = statement or node.statement_of(peer)
                for part in node.answer(Request(peer, statement, path, body)):
                    began = True
                    yield part
                return
            except WrongKey as exc:
                statement, why = exc.statement, f"{peer}: {exc}"
                continue
            except (Failed, Untrue) as exc:
                why = f"{peer}: {exc}"
            if began:
                say(f"\n[{why}; the answer starts again elsewhere]\n")
            break
    raise Failed(why)


def _refused(body: bytes) -> Failed:
    told = json.loads(body)
    if "sealing_key" in told:
        return WrongKey(base64.b64decode(told["sealing_key"]))
    return Failed(_message(body))


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{len(body)} bytes that are no answer of a node's"


# --- the command ---


def words(parts: Iterator[bytes], path: str) -> Iterator[str]:
    """The text of OpenAI's server-sent events. Raises Failed for an error among them."""
    kept = b""
    for part in parts:
        *events, kept = (kept + part).split(b"\n\n")
        for event in events:
            lines = event.split(b"\n")
            data = b"".join(line[6:] for line in lines if line.startswith(b"data: "))
            if not data or data == b"[DONE]":
                continue
            if b"event: error" in lines:
                raise Failed(_message(data))
            for choice in json.loads(data)["choices"]:
                yield (choice["delta"].get("content") if "chat" in path else choice["text"]) or ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--node", default="http://127.0.0.1:8765", help="the node that passes it on")
    parser.add_argument("--peer", action="append", help="who may read it, in place of whom the node lists; repeatable")
    parser.add_argument("--model")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--timeout-s", type=float, default=120.0)
    parser.add_argument("--path", default="/v1/chat/completions", choices=["/v1/chat/completions", "/v1/completions"])
    args = parser.parse_args()
    body: dict[str, Any] = {"max_tokens": args.max_tokens, "stream": True}
    if args.model:
        body["model"] = args.model
    chat = args.path == "/v1/chat/completions"
    body |= {"messages": [{"role": "user", "content": args.text}]} if chat else {"prompt": args.text}
    try:
        node = Node(args.node, args.timeout_s)
        peers = args.peer or node.peers_with(args.model)
        parts = ask(node, peers, args.path, body, lambda told: print(told, file=sys.stderr, flush=True))
        for word in words(parts, args.path):
            print(word, end="", flush=True)
    except Failed as exc:
        print(f"\nno answer: {exc}", file=sys.stderr)
        return 1
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
