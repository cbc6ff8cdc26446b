"""Requests drawn from GET /openapi.json: no 5xx, and every answer fits the document."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as drawn_from
from trio.testing import MockClock

from node.version import VERSION
from node.web.app import build_app
from node.web.door import Door
from node.web.schema_openapi import document
from tests.fake_front import FakeFront
from tests.fake_self import FakeSelf

schemathesis = pytest.importorskip(
    "schemathesis", reason="schemathesis is not installed: pip install -c constraints.txt -e '.[test]'"
)
pytestmark = pytest.mark.slow
URL = os.environ.get("OPENAGI_TEST_NODE")  # of a real node, for the soak; None: the application over the fake front
CASES, CASES_SOAK = 200, 10_000  # of all operations together
CASE_S_MAX = 60.0


class Target:
    """The application without a socket: one client's request at a time, on a clock that jumps."""

    def __init__(self) -> None:
        self.front = FakeFront()
        self.front.itself = memory()
        self.app = build_app(self.front, Random(1))

    def send(self, **request: Any) -> httpx.Response:
        return trio.run(partial(self._send, request), clock=MockClock(autojump_threshold=0))

    async def _send(self, request: dict[str, Any]) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        with trio.fail_after(CASE_S_MAX):
            async with httpx.AsyncClient(transport=transport) as client:
                return await client.request(**request)


FOLDER = tempfile.TemporaryDirectory(prefix="schemathesis")


@cache
def memory() -> FakeSelf:
    """One for all: nothing that is drawn may spoil it."""
    return FakeSelf(Path(FOLDER.name)).live()


@cache
def schema() -> Any:
    if URL is not None:
        return schemathesis.openapi.from_url(f"{URL}/openapi.json")
    app: Door = Target().app
    return schemathesis.openapi.from_dict(document(app._app._app.routes, VERSION))  # type: ignore[attr-defined]


def operations() -> Iterator[Any]:
    return (result.ok() for result in schema().get_all_operations())


ENDLESS = "GET /api/v1/events"  # has an end when its reader has
OPERATIONS = {operation.label: operation for operation in operations() if operation.label != ENDLESS}
CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_headers_conformance,
    schemathesis.checks.response_schema_conformance,
]


def run(label: str, mode: Any, cases: int, seed: int) -> Counter[int]:
    """How often which status came."""
    operation, target, came = OPERATIONS[label], Target(), Counter[int]()

    @drawn_from(seed)
    @settings(
        max_examples=cases, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(operation.as_strategy(generation_mode=mode))
    def one(case: Any) -> None:
        if isinstance(case.body, dict) and len(repr(case.body)) % 2:
            case.body.pop("model", None)  # else nearly every model that is drawn is served by nobody
        if URL is not None:
            came[case.call_and_validate(base_url=URL, checks=CHECKS, timeout=CASE_S_MAX).status_code] += 1
            return
        told = case.as_transport_kwargs(base_url="http://127.0.0.1:8765")
        told.pop("cookies", None)
        response = target.send(**{("content" if name == "data" else name): value for name, value in told.items()})
        came[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    one()
    return came


def run_both(label: str, cases: int, seed: int) -> Counter[int]:
    """Requests that fit the document, and, of what has a body, as many that do not; `cases` is for all operations."""
    modes = MODES if "requestBody" in OPERATIONS[label].definition.raw else MODES[:1]
    share = -(-cases // len(DRAWN))
    return sum((run(label, mode, -(-share // len(modes)), seed) for mode in modes), Counter())


MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
# of those that take nothing there is one request, and it is right
DRAWN = [label for label, each in OPERATIONS.items() if {"requestBody", "parameters"} & each.definition.raw.keys()]


def test_who_takes_nothing_gives_what_the_document_says() -> None:
    for label in OPERATIONS.keys() - set(DRAWN):
        run(label, MODES[0], 1, seed=1)


@pytest.mark.parametrize("label", DRAWN)
def test_what_is_drawn_gets_an_answer_that_fits(label: str) -> None:
    run_both(label, CASES, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("label", DRAWN)
def test_ten_thousand_drawn_requests(label: str) -> None:
    seed = int(time.time())
    print(f"SEED={seed}")
    print(label, dict(run_both(label, CASES_SOAK, seed)))
