"""A running node as the commands see it: HTTP requests, events of a stream, and failures as one sentence. A key that
the node wants is taken from OPENAGI_API_KEY.

Rules: httpx is imported on first use, so that `--help` and a wrong flag cost nothing; torch and libp2p never. Every
failure is a CommandFailed with its exit code; `plainly` turns it into a line on stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

if TYPE_CHECKING:
    import httpx

NODE_URL = "http://127.0.0.1:8765"
EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_TRY_LATER = 1, 2, 69, 75
CONNECT_S_MAX = 5.0
READ_S_MAX = 130.0  # above the node's own deadline, whose error says more
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

NodeUrl = Annotated[
    str, typer.Option("--node", metavar="URL", envvar="OPENAGI_NODE", help="HTTP address of a running node.")
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", metavar="KEY", envvar="OPENAGI_API_KEY", help="The key that the node wants, if it wants one."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


class CommandFailed(Exception):
    """A command's clear end without success: one sentence, and the exit code."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def plainly() -> Iterator[None]:
    """Print a CommandFailed to stderr and exit with its code."""
    try:
        yield
    except CommandFailed as failure:
        print(f"node: {failure}", file=sys.stderr)
        raise typer.Exit(failure.exit_code) from None


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that came over a stream: a chunk, or a comment's word and JSON."""

    comment: str
    content: dict[str, Any]


class NodeClient:
    """One node's HTTP door. Close it, or use it as a context manager."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Raises CommandFailed when the address is none, or the key cannot be one."""
        import httpx  # only a command that talks to a node pays for it

        text = url if "://" in url else f"http://{url}"
        try:
            parts = urlsplit(text)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good:
            raise CommandFailed(f"--node {url!r} is not an address like {NODE_URL}", EXIT_USAGE)
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
            raise CommandFailed("--api-key is no key: wanted letters, digits and signs, in one line", EXIT_USAGE)
        self.url = text.rstrip("/").removesuffix("/v1")  # as the SDKs are given it
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        timeout = httpx.Timeout(READ_S_MAX, connect=CONNECT_S_MAX)
        # a proxy of the environment cannot reach this machine's own loopback
        trusts = parts.hostname not in LOOPBACK
        self._http = httpx.Client(base_url=self.url, timeout=timeout, trust_env=trusts, headers=headers)

    def __enter__(self) -> NodeClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str) -> Any:
        """The JSON at `path`. Raises CommandFailed."""
        with self._failures():
            return self._decoded(self._http.get(path))

    def delete(self, path: str) -> Any:
        """The JSON answer. Raises CommandFailed."""
        with self._failures():
            return self._decoded(self._http.delete(path))

    def post(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[Any, httpx.Headers]:
        """The JSON answer and its headers. Raises CommandFailed."""
        with self._failures():
            response = self._http.post(path, json=body, headers=headers)
            return self._decoded(response), response.headers

    @contextmanager
    def stream(
        self, path: str, body: dict[str, Any], headers: dict[str, str]
    ) -> Iterator[tuple[httpx.Headers, Iterator[Event]]]:
        """The events of a streamed answer. Leaving early cancels the answer. Raises CommandFailed."""
        with self._failures(), self._http.stream("POST", path, json=body, headers=headers) as response:
            if response.status_code != 200:
                response.read()
                self._decoded(response)
            yield response.headers, self._events(response)

    def _events(self, response: httpx.Response) -> Iterator[Event]:
        for line in response.iter_lines():
            if line == "data: [DONE]":
                return
            if line.startswith(":"):
                word, _, rest = line[1:].strip().partition(" ")
                yield Event(word, json.loads(rest) if rest.startswith("{") else {})
            elif line.startswith("data:"):
                chunk = json.loads(line.removeprefix("data:"))
                if isinstance(chunk, dict) and "error" in chunk:
                    raise _failure(chunk, 0)
                yield Event("", chunk)
        raise CommandFailed(f"the node at {self.url} broke off in mid-answer; see its log")

    def _decoded(self, response: httpx.Response) -> Any:
        try:
            value = response.json()
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise CommandFailed(
                f"{self.url} answered {response.status_code} and no JSON object; is it a node of this project?"
            )
        if response.status_code >= 400 or value.keys() == {"error"}:  # a long answer that failed after it had begun
            raise _failure(value, response.status_code)
        return value

    @contextmanager
    def _failures(self) -> Iterator[None]:
        import httpx  # see __init__

        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise CommandFailed(
                f"no node answers at {self.url}: start one with `python -m node`, or name another with --node URL",
                EXIT_UNREACHABLE,
            ) from None
        except httpx.TimeoutException:
            raise CommandFailed(
                f"the node at {self.url} said nothing for {READ_S_MAX:.0f} s; see its log", EXIT_TRY_LATER
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as exc:
            raise CommandFailed(f"the talk with {self.url} failed: {exc}") from None


def _failure(body: dict[str, Any], status: int) -> CommandFailed:
    """The node's own error as ours: try later, your input, or theirs."""
    error = body.get("error")
    told = error if isinstance(error, dict) else {}
    message = str(told.get("message") or f"HTTP {status}")
    if status == 401:
        message += "; give the node's key by --api-key or OPENAGI_API_KEY"
    elif told.get("code") == "lacks_scope":
        message += "; `python -m node keys create --scope` makes a key with more"
    if told.get("retryable"):
        return CommandFailed(message, EXIT_TRY_LATER)
    return CommandFailed(message, EXIT_USAGE if status in (400, 401, 403, 404, 413) else EXIT_FAILED)


def route_headers(route: str, peer: str | None) -> dict[str, str]:
    """The headers that ask for a route."""
    return {"x-route": route} | ({"x-peer": peer} if peer else {})
