"""Clients of the real swarm: they ask through doors without pause, and keep what became of every request.

Rules: accepted is what got the head of a 200 answer, or a whole answer. Each request asked ends in one of ENDS: what
is neither a result, an error in OpenAI's shape, the client's own leaving, nor a connection that broke when its door was
killed, counts as unresolved, with the reason. A result is one only if it holds as many tokens as its usage says and as
were asked for (or the model stopped by itself). Times are seconds of time.monotonic().
Source: docs/PROTOCOLS.md; SECURITY.md, "what you can rely on".
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.harness import ANEW

Json = dict[str, Any]
RESULT, ERROR, REFUSED, LEFT, DOOR_KILLED, UNRESOLVED = (
    "result",
    "error",
    "refused",
    "left",
    "door_killed",
    "unresolved",
)
ENDS = (RESULT, ERROR, REFUSED, LEFT, DOOR_KILLED, UNRESOLVED)
SILENCE_S_MAX = 60.0  # a stream says something every 10 s, and a whole answer is to be there by then
REQUEST_S_MAX = 150.0  # above the door's own deadline
PROMPTS = ("Once upon a time", "There was once a poor woodcutter", "The old king had three sons", "In a deep forest")
TOKENS = (24, 60, 120, 240)
STREAMED_SHARE, LEAVE_SHARE = 0.75, 0.05
PAUSE_S = 0.25  # after a refusal: nobody is there, no use in asking a thousand times a second


@dataclass(slots=True, kw_only=True)
class Request:
    """One request as its client saw it. `arrivals`: when text came."""

    door: str
    streamed: bool
    prompt: int
    tokens: int
    began: float
    ended: float = 0.0
    accepted: bool = False
    served_by: str = ""
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    end: str = ""
    why: str = ""

    @property
    def gap_s(self) -> float:
        """The longest silence between two pieces of text."""
        return max((after - before for before, after in itertools.pairwise(self.arrivals)), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorNow:
    """A door as it is now: a restart gives it another address; killed: whether it was since."""

    name: str
    url: str
    killed: Callable[[], bool]


class Client:
    """One client: asks a random living door of its host until told to end."""

    def __init__(self, doors: Callable[[], list[DoorNow]], seed: int) -> None:
        self._doors = doors
        self._rng = random.Random(seed)
        self.requests: list[Request] = []
        self.current: Request | None = None

    def run(self, done: threading.Event) -> None:
        """Ask until `done`; the last request is seen to its end."""
        limits = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(trust_env=False, verify=False, timeout=SILENCE_S_MAX, limits=limits) as http:
            while not done.is_set():
                doors = self._doors()
                if not doors:
                    time.sleep(PAUSE_S)
                    continue
                self.ask(http, self._rng.choice(doors))

    def ask(self, http: httpx.Client, door: DoorNow) -> None:
        """Ask once, and keep what came of it."""
        rng = self._rng
        asked = Request(
            door=door.name,
            streamed=rng.random() < STREAMED_SHARE,
            prompt=rng.randrange(len(PROMPTS)),
            tokens=rng.choice(TOKENS),
            began=time.monotonic(),
        )
        leave_after = rng.randint(1, 10) if rng.random() < LEAVE_SHARE else 0
        self.current = asked
        try:
            body = {"model": "default", "prompt": PROMPTS[asked.prompt], "max_tokens": asked.tokens, "temperature": 0}
            body |= {"stream": True, "stream_options": {"include_usage": True}} if asked.streamed else {}
            with http.stream("POST", f"{door.url}/v1/completions", json=body, headers=ANEW) as response:
                asked.accepted = response.status_code == 200
                asked.served_by = response.headers.get("x-served-by", "")
                asked.end, asked.why = judged(response, asked, leave_after)
        except httpx.ConnectError:
            asked.end, asked.why = "", "no connection: it was killed before it was asked"
        except httpx.TimeoutException as exc:
            asked.end, asked.why = UNRESOLVED, f"silence: {type(exc).__name__}"
        except httpx.TransportError as exc:
            asked.end, asked.why = UNRESOLVED, f"the connection broke: {type(exc).__name__}: {exc}"
        asked.ended = time.monotonic()
        if asked.end == UNRESOLVED and door.killed():
            asked.end = DOOR_KILLED
        if asked.end:  # else nothing was asked
            self.requests.append(asked)
        self.current = None
        if asked.end in ("", REFUSED):
            time.sleep(PAUSE_S)


def judged(response: httpx.Response, asked: Request, leave_after: int) -> tuple[str, str]:
    """How an answer ended, and why if not by a result. Raises TransportError when the connection does not last."""
    if response.status_code != 200 or not asked.streamed:
        told = _json(response.read())
        if response.status_code != 200:
            return _error(told, REFUSED)
        asked.text = told["choices"][0]["text"]
        return _result(told["choices"][0]["finish_reason"], told["usage"], asked)
    finish, usage, end = "", None, ("", "")
    for event in events(response):
        if event is None:
            return end if end[0] else _result(finish, usage, asked)
        if time.monotonic() - asked.began > REQUEST_S_MAX:
            return UNRESOLVED, f"no end within {REQUEST_S_MAX:.0f} s"
        if "error" in event:
            end = _error(event, ERROR)
            continue
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            if choice["text"]:
                asked.arrivals.append(time.monotonic())
                asked.text += choice["text"]
            finish = choice["finish_reason"] or finish
        if leave_after and len(asked.arrivals) >= leave_after:
            return LEFT, ""
    return UNRESOLVED, "a stream that ends without [DONE]"


def events(response: httpx.Response) -> Iterator[Json | None]:
    """The events of a stream; None for its [DONE]."""
    for line in response.iter_lines():
        if line == "data: [DONE]":
            yield None
            return
        if line.startswith("data: "):
            yield _json(line.removeprefix("data: ").encode())


def _json(raw: bytes) -> Json:
    told = json.loads(raw)
    return told if isinstance(told, dict) else {}


def _error(told: Json, kind: str) -> tuple[str, str]:
    error = told.get("error", {})
    if isinstance(error.get("message"), str) and error.get("type") and "code" in error:
        return kind, f"{error['code']}: {error['message'][:200]}"
    return UNRESOLVED, f"an error that is not of OpenAI's shape: {str(told)[:200]}"


def _result(finish: str, usage: Json | None, asked: Request) -> tuple[str, str]:
    """Whether the answer is whole."""
    if finish not in ("stop", "length") or usage is None:
        return UNRESOLVED, f"[DONE] without a finish reason ({finish!r}) or without usage"
    made = usage["completion_tokens"]
    if finish == "length" and made != asked.tokens:
        return UNRESOLVED, f"cut short: {made} of {asked.tokens} tokens"
    return RESULT, ""


def differing(requests: list[Request]) -> list[Request]:
    """Results whose text is not the beginning of the longest result of their prompt: greedy answers are all one."""
    longest: dict[int, str] = {}
    for one in sorted((one for one in requests if one.end == RESULT), key=lambda one: -one.tokens):
        longest.setdefault(one.prompt, one.text)
    return [one for one in requests if one.end == RESULT and not longest[one.prompt].startswith(one.text)]
