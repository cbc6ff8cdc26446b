"""The pages of a node, dashboard and chat, and the files that they are made of.

Rules: what is served is what lay in static/ at the start: a request's name is looked up in that table and never joined
to a path. Pages load nothing from other hosts and run no inline script: CONTENT_POLICY has the browser refuse it, and
trusted types have it refuse text as HTML. A page holds no secret, so it needs no key; what it asks for may. Files are
kept by browsers, and asked for anew by their digest.

Source: W3C Content Security Policy Level 3; W3C Trusted Types; RFC 9110 section 13.1.2 (If-None-Match).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from node.front import Front
from node.web.errors import NotFound
from node.web.live import Events, Live

STATIC = Path(__file__).parent / "static"
FILE_BYTES_MAX = 256 << 10
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
CONTENT_POLICY = "; ".join((
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self'",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
))  # fmt: skip
HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file as it is served."""

    body: bytes
    type: str
    tag: str


def page_routes(front: Front, stop: trio.Event, paths: frozenset[str]) -> list[Route]:
    """The pages, their files, and the events that keep the dashboard live. paths: the node's other routes."""
    pages = Pages(read_files(STATIC))
    events = Events(Live(front, paths), stop)
    return [
        Route("/", pages.dashboard, methods=["GET"]),
        Route("/chat", pages.chat, methods=["GET"]),
        Route("/static/{name}", pages.file, methods=["GET"]),
        Route("/api/v1/events", events.events, methods=["GET"]),
    ]


def read_files(folder: Path) -> dict[str, File]:
    """Every file of a known type in a folder, by its name."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in TYPES and path.is_file():
            body = path.read_bytes()
            assert len(body) <= FILE_BYTES_MAX, f"{path.name} has {len(body)} bytes, and a page is to open at once"
            tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            files[path.name] = File(body=body, type=TYPES[path.suffix], tag=tag)
    return files


class Pages:
    """Serves the files of one table."""

    def __init__(self, files: dict[str, File]) -> None:
        self._files = files

    async def dashboard(self, request: Request) -> Response:
        """GET /."""
        return self._answer(request, "dashboard.html")

    async def chat(self, request: Request) -> Response:
        """GET /chat."""
        return self._answer(request, "chat.html")

    async def file(self, request: Request) -> Response:
        """GET /static/NAME. Raises NotFound."""
        return self._answer(request, request.path_params["name"])

    def _answer(self, request: Request, name: str) -> Response:
        file = self._files.get(name)
        if file is None:
            raise NotFound(f"there is no file {name[:100]!r}; the pages are / and /chat")
        headers = {**HEADERS, "etag": file.tag}
        if file.tag in (tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")):
            return Response(status_code=304, headers=headers)
        return Response(file.body, headers={**headers, "content-type": file.type})
