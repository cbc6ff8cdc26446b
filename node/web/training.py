"""The routes of training: what there is to tell, and the operator's words.

Rules: only who sits at this machine, or has a key for it, may begin, join, pause or leave (node/web/operator.py): a run
reads files of this machine. Bodies are JSON objects as node/training_wish.py has them; what does not fit is refused
with the field's name.
Source: INTERFACES.md (`train`, GET /api/v1/training).
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from node.errors import BadRequest
from node.front import Front
from node.training_wish import Begin, Join
from node.web.caller import Need
from node.web.door import read_body
from node.web.operator import check_is_operator

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
    check_is_operator(request, Need.TRAIN, "training", "training is begun and ended")


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
