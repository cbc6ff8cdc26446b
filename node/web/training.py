"""The routes of training: what there is to tell, and the operator's words.

Rules: only who sits at this machine, or has a key for it, may begin, join, pause or leave: a run reads files of this
machine. A proxy on this machine comes from loopback too, whoever stands behind it, so what says that it was handed on
is refused without such a key. Bodies are JSON objects as node/training_wish.py has them; what does not fit is
refused with the field's name.
Source: INTERFACES.md (`train`, GET /api/v1/training).
"""

from __future__ import annotations

import ipaddress
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from node.errors import BadRequest
from node.front import Front
from node.training_wish import Begin, Join
from node.web.asker import proxy_header
from node.web.caller import Caller, Need
from node.web.door import CALLER_KEY, COUNTS_KEY, headers_of, read_body
from node.web.errors import Forbidden

_T = TypeVar("_T")


class Training:
    """See the module."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def status(self, request: Request) -> Response:
        return _json(self._front.training.status())

    async def start(self, request: Request) -> Response:
        return _json(await self._front.training.begin(await _asked(request, Begin)))

    async def join(self, request: Request) -> Response:
        return _json(await self._front.training.join(await _asked(request, Join)))

    async def pause(self, request: Request) -> Response:
        _check_is_operator(request)
        return _json(await self._front.training.pause(is_paused=True))

    async def resume(self, request: Request) -> Response:
        _check_is_operator(request)
        return _json(await self._front.training.pause(is_paused=False))

    async def leave(self, request: Request) -> Response:
        _check_is_operator(request)
        return _json(await self._front.training.leave())


def _check_is_operator(request: Request) -> None:
    """Raises Forbidden."""
    caller: Caller | None = request.scope.get(CALLER_KEY)
    if caller is not None and caller.is_named and caller.may(Need.TRAIN):
        return
    host = request.client.host if request.client is not None else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        address = ipaddress.ip_address("0.0.0.0")  # nobody's
    mapped = getattr(address, "ipv4_mapped", None)  # as a socket for both families has it
    drops = request.scope[COUNTS_KEY].drops
    if not (mapped or address).is_loopback:
        drops["training_from_elsewhere"] += 1
        raise Forbidden("training is begun and ended from this machine only: ask on 127.0.0.1")
    name = proxy_header(headers_of(request.scope))
    if name is not None:
        drops["training_by_proxy"] += 1
        raise Forbidden(
            f"training is begun and ended from this machine only, and the header {name[:40]} says that a proxy "
            "hands this on: ask the node itself, on 127.0.0.1",
            param=name[:40],
        )


async def _asked(request: Request, kind: type[_T]) -> _T:
    """Raises Forbidden, BadRequest and what read_body raises."""
    _check_is_operator(request)
    raw = await read_body(request.scope, request.receive)
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        what, _, place = str(exc)[:300].partition(" - at `$")
        field = place.strip(".`")
        where = f"the field {field}" if field else "the body"
        raise BadRequest(f"{where} does not fit: {what}", param=field or None) from exc


def _json(value: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
