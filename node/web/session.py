"""The routes by which a wallet signs in: /api/v1/session/challenge, then /api/v1/session.

Rules: they parse, ask SignIns, and shape what came. The domain that the wallet shows its owner is that of the page
that asks (its Origin, which the door has let through), else the Host. What a client sends is in no log.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from crypto.disk import told_time
from node.errors import BadRequest, NoRoom, RequestError
from node.web.door import COUNTS_KEY, headers_of, read_body
from node.web.errors import Forbidden, Unauthorized
from node.web.wallets import SESSION_S_MAX, SignInFault, SignInRefused, SignIns, Wanted

MESSAGE_CHARS_MAX = 2_000
_T = TypeVar("_T")


class ChallengeAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /api/v1/session/challenge. seconds: how long the session is to hold."""

    address: str
    session_key: str
    chain_id: int = 1
    seconds: int = SESSION_S_MAX


class SessionAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /api/v1/session: the challenge as it came, and the wallet's signature, 0x and hexadecimal."""

    message: str
    signature: str


class SessionRoutes:
    """See the module."""

    def __init__(self, sign_ins: SignIns, clock: Callable[[], float] = time.time) -> None:
        self._sign_ins = sign_ins
        self._clock = clock

    async def challenge(self, request: Request) -> Response:
        asked = await _asked(request, ChallengeAsked)
        headers = headers_of(request.scope)
        origin = headers.get("origin") or f"http://{headers.get('host', 'localhost')}"
        wanted = Wanted(
            address=asked.address,
            key=asked.session_key,
            domain=urlsplit(origin).netloc,
            uri=origin,
            chain_id=asked.chain_id,
            life_s=asked.seconds,
        )
        try:
            message = self._sign_ins.challenge(wanted, nonce=secrets.token_hex(16), now=self._clock())
        except SignInRefused as exc:
            raise _refusal(request, exc) from exc
        return _json({"message": message})

    async def session(self, request: Request) -> Response:
        asked = await _asked(request, SessionAsked)
        if len(asked.message) > MESSAGE_CHARS_MAX:
            message = f"message has {len(asked.message)} characters, a challenge at most {MESSAGE_CHARS_MAX}"
            raise BadRequest(message, param="message")
        try:
            session = self._sign_ins.answer(asked.message, asked.signature, self._clock())
        except SignInRefused as exc:
            raise _refusal(request, exc) from exc
        told = {"address": session.address, "session_key": session.key, "scopes": ["infer"]}
        return _json({**told, "expires": told_time(session.until_s)})


def _refusal(request: Request, exc: SignInRefused) -> RequestError:
    request.scope[COUNTS_KEY].drops[exc.fault.value] += 1
    match exc.fault:
        case SignInFault.MALFORMED:
            return BadRequest(str(exc), param=exc.param)
        case SignInFault.NOT_LISTED:
            return Forbidden(str(exc), param=exc.param, code=exc.fault.value)
        case SignInFault.FULL:
            return NoRoom(str(exc))
        case SignInFault.UNKNOWN | SignInFault.WRONG:
            return Unauthorized(str(exc), param=exc.param, code=exc.fault.value)


async def _asked(request: Request, kind: type[_T]) -> _T:
    """Raises BadRequest and what read_body raises."""
    raw = await read_body(request.scope, request.receive)
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise BadRequest(f"the body does not fit: {str(exc)[:300]}") from exc


def _json(value: dict[str, object]) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
