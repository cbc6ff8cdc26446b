"""When to stop asking a peer that fails, and when to try it again: one circuit breaker.

Rules: core. A peer that never worked, or to which there is no connection, is cut off at its first failure, a proven
one after FAILURES_IN_A_ROW; it stays cut off OPEN_S_MIN, twice as long each time it fails its probe, at most
OPEN_S_MAX. After that one request at a time may try. All changes of state stand in TRANSITIONS.
Source: M. Nygard, Release It!, "Circuit Breaker"; SECURITY.md P11.
"""

from __future__ import annotations

from enum import Enum, StrEnum

FAILURES_IN_A_ROW = 3  # a healthy peer may lose one connection and refuse to hurry once
OPEN_S_MIN = 10.0  # a restart of a node takes about so long
OPEN_S_MAX = 600.0  # a black hole costs its askers six requests an hour


class State(StrEnum):
    """Whether requests may go there."""

    CLOSED = "closed"  # they may
    OPEN = "open"  # they may not
    HALF_OPEN = "half-open"  # one may, as a probe
    PROBING = "probing"  # the probe is under way


class Event(Enum):
    """What the breaker hears."""

    STARTED = "started"  # a request was sent there
    WORKED = "worked"
    FAILED = "failed"  # and the peer has credit left
    TRIPPED = "tripped"  # it failed, and that was its last credit
    RELEASED = "released"  # the requests under way ended without a verdict
    COOLED = "cooled"  # the open time is over
    RECONNECTED = "reconnected"  # it could not be reached, and now there is a new connection


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.CLOSED: {
        Event.STARTED: State.CLOSED,
        Event.WORKED: State.CLOSED,
        Event.FAILED: State.CLOSED,
        Event.TRIPPED: State.OPEN,
        Event.RELEASED: State.CLOSED,
        Event.COOLED: State.CLOSED,
        Event.RECONNECTED: State.CLOSED,
    },
    State.OPEN: {
        Event.STARTED: State.OPEN,  # pinned by the user, against advice
        Event.WORKED: State.CLOSED,
        Event.FAILED: State.OPEN,
        Event.TRIPPED: State.OPEN,
        Event.RELEASED: State.OPEN,
        Event.COOLED: State.HALF_OPEN,
        Event.RECONNECTED: State.HALF_OPEN,
    },
    State.HALF_OPEN: {
        Event.STARTED: State.PROBING,
        Event.WORKED: State.CLOSED,
        Event.FAILED: State.OPEN,
        Event.TRIPPED: State.OPEN,
        Event.RELEASED: State.HALF_OPEN,
        Event.COOLED: State.HALF_OPEN,
        Event.RECONNECTED: State.HALF_OPEN,
    },
    State.PROBING: {
        Event.STARTED: State.PROBING,
        Event.WORKED: State.CLOSED,
        Event.FAILED: State.OPEN,
        Event.TRIPPED: State.OPEN,
        Event.RELEASED: State.HALF_OPEN,
        Event.COOLED: State.PROBING,
        Event.RECONNECTED: State.PROBING,
    },
}


class Breaker:
    """The breaker of one peer. `now` is monotonic seconds."""

    __slots__ = ("_failures", "_level", "_open_until_s", "_state", "_unreachable", "proven")

    def __init__(self) -> None:
        self.proven = False  # it has finished a request for us
        self._state = State.CLOSED
        self._failures = 0  # in a row
        self._level = 0  # how often in a row it was opened
        self._open_until_s = 0.0
        self._unreachable = False  # why it was opened last

    def state(self, now: float) -> State:
        """The state, after the open time ended if it did."""
        if self._state is State.OPEN and now >= self._open_until_s:
            self._change(Event.COOLED, now)
        return self._state

    def allows(self, now: float) -> bool:
        """Whether a request may be sent."""
        return self.state(now) in (State.CLOSED, State.HALF_OPEN)

    def retry_in_s(self, now: float) -> float:
        """Seconds until a request may be sent again; 0 when it may now or depends on a probe."""
        return max(0.0, self._open_until_s - now) if self.state(now) is State.OPEN else 0.0

    def started(self, now: float) -> None:
        """A request was sent."""
        self.state(now)
        self._change(Event.STARTED, now)

    def worked(self, now: float) -> None:
        """A request was answered in full."""
        self.proven = True
        self._failures = self._level = 0
        self._change(Event.WORKED, now)

    def failed(self, now: float, *, unreachable: bool = False) -> None:
        """A request failed there; unreachable: there was no connection, which a new one would mend."""
        self.state(now)
        self._failures += 1
        self._unreachable = unreachable
        spent = unreachable or not self.proven or self._failures >= FAILURES_IN_A_ROW
        self._change(Event.TRIPPED if spent else Event.FAILED, now)

    def released(self, now: float) -> None:
        """No request of ours is under way there any more, and none of them gave a verdict."""
        self._change(Event.RELEASED, now)

    def reconnected(self, now: float) -> None:
        """A new connection came up. It mends only what a lost connection broke: a black hole reconnects for free."""
        if self._unreachable:
            self._unreachable = False
            self._change(Event.RECONNECTED, now)

    def _change(self, event: Event, now: float) -> None:
        before, self._state = self._state, TRANSITIONS[self._state][event]
        if self._state is State.OPEN and before is not State.OPEN:
            self._open_until_s = now + min(OPEN_S_MAX, OPEN_S_MIN * 2.0**self._level)
            self._level = min(self._level + 1, 32)
