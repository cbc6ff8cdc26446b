"""The rpc automaton: frames and bytes, the table, credit, and histories of two ends with frames in flight."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from crypto import canonical
from p2p import rpc
from p2p.errors import LocalProtocolError, RemoteError, RemoteProtocolError
from p2p.rpc import Call, CallId, Cancel, Credit, End, Error, Item, Role, Rpc, State
from p2p.transport import FRAME_BYTES_MAX

ERROR = RemoteError("full", "no room", retryable=True)
FRAMES: list[rpc.Frame] = [
    Call(1, "echo", {"a": [1, b"2", None]}),
    Cancel(1),
    Credit(1, 5),
    Item(1, "x"),
    End(1, [1.5]),
    Error(1, "full", "no room", True),
]


def pair() -> tuple[Rpc, Rpc]:
    return Rpc(Role.CALLER), Rpc(Role.CALLEE)


ITEM_BYTES_MAX = canonical.CONTROL.bytes_max - 64  # with its head it fits a frame
WIDE = canonical.Limits(bytes_max=FRAME_BYTES_MAX, bin_max=FRAME_BYTES_MAX)


def opened(limits: canonical.Limits = canonical.CONTROL) -> tuple[Rpc, Rpc, CallId]:
    """Both ends with one open call."""
    caller, callee = Rpc(Role.CALLER, limits), Rpc(Role.CALLEE, limits)
    call_id, raw = caller.call("echo", None)
    callee.receive(raw)
    return caller, callee, call_id


def sent(raw: bytes | None) -> bytes:
    assert raw is not None
    return raw


# -- frames and bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", FRAMES)
def test_a_frame_comes_back_from_its_bytes(frame: rpc.Frame) -> None:
    assert rpc.decode_frame(rpc.encode_frame(frame)) == frame


def test_the_wire_form_is_an_array() -> None:
    assert canonical.decode(rpc.encode_frame(Call(7, "echo", "x"))) == ["call", 7, "echo", "x"]
    assert canonical.decode(rpc.encode_frame(Error(7, "a", "b", False))) == ["error", 7, "a", "b", False]


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        "call",
        ["call"],
        ["calls", 1, "echo", None],
        ["call", 0, "echo", None],
        ["call", 1.0, "echo", None],
        ["call", True, "echo", None],
        ["call", (1 << 53) + 1, "echo", None],
        ["call", 1, "", None],
        ["call", 1, "x" * 65, None],
        ["call", 1, b"echo", None],
        ["call", 1, "echo"],
        ["call", 1, "echo", None, None],
        ["cancel", 1, 1],
        ["credit", 1, 0],
        ["credit", 1, rpc.WINDOW + 1],
        ["error", 1, "", "m", False],
        ["error", 1, "c", "m" * 1025, False],
        ["error", 1, "c", "m", 0],
        [["call"], 1, "echo", None],
        [1, 1, "echo", None],
    ],
)
def test_what_is_no_frame_is_the_peers_fault(value: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        rpc.decode_frame(canonical.encode(value))


@given(st.binary(max_size=200))
@example(b"")
@example(rpc.encode_frame(FRAMES[0])[:-1])
@example(rpc.encode_frame(FRAMES[0]) + b"\0")
def test_any_bytes_are_a_frame_or_the_peers_fault(raw: bytes) -> None:
    try:
        frame = rpc.decode_frame(raw)
    except RemoteProtocolError:
        return
    assert rpc.decode_frame(rpc.encode_frame(frame)) == frame


@given(st.sampled_from(FRAMES), st.integers(min_value=0), st.integers(0, 255))
def test_a_damaged_frame_is_a_frame_or_the_peers_fault(frame: rpc.Frame, position: int, byte: int) -> None:
    raw = bytearray(rpc.encode_frame(frame))
    raw[position % len(raw)] = byte
    try:
        rpc.decode_frame(bytes(raw))
    except RemoteProtocolError:
        pass


def test_a_protocols_own_limits_hold_in_both_directions() -> None:
    large = Call(1, "m", bytes(100_000))
    raw = rpc.encode_frame(large, WIDE)
    assert rpc.decode_frame(raw, WIDE) == large
    with pytest.raises(LocalProtocolError, match="100014 bytes; a frame here holds at most 65536"):
        rpc.encode_frame(large)
    with pytest.raises(RemoteProtocolError, match="100014 bytes came, at most 65536"):
        rpc.decode_frame(raw)
    assert Rpc(Role.CALLEE, WIDE).receive(Rpc(Role.CALLER, WIDE).call("m", large.body)[1]) == large
    with pytest.raises(RemoteProtocolError):
        Rpc(Role.CALLEE).receive(raw)
    with pytest.raises(LocalProtocolError):
        Rpc(Role.CALLER).call("m", large.body)


@pytest.mark.parametrize("body", [float("inf"), 1 << 64, {1: 1}, {1}, object(), bytes(FRAME_BYTES_MAX)])
def test_what_cannot_be_sent_is_our_fault_and_changes_nothing(body: Any) -> None:
    caller, callee, call_id = opened()
    for attempt in (lambda: caller.call("echo", body), lambda: callee.end(call_id, body)):
        with pytest.raises(LocalProtocolError):
            attempt()
    assert caller.receive(callee.end(call_id, 1)) == End(1, 1)
    assert caller.call("echo", None)[0] == 2
    with pytest.raises(LocalProtocolError):
        caller.call("", None)
    with pytest.raises(LocalProtocolError):
        caller.call("x" * 65, None)


def test_a_long_error_is_cut_to_its_bounds() -> None:
    caller, callee, call_id = opened()
    frame = caller.receive(callee.error(call_id, RemoteError("c" * 100, "ä" * 2000, retryable=False)))
    assert frame == Error(1, "c" * 64, "ä" * 1024, False)
    caller, callee, call_id = opened()
    assert caller.receive(callee.error(call_id, RemoteError("", "", retryable=True))) == Error(1, "error", "", True)
    caller, callee, call_id = opened()
    frame = caller.receive(callee.error(call_id, RemoteError("c", "\udc80", retryable=True)))  # a name from a disk
    assert frame == Error(1, "c", "?", True)


# -- the table --------------------------------------------------------------------------------------------------------

STATES: dict[State, list[rpc.Frame]] = {
    State.IDLE: [],
    State.OPEN: [Call(1, "m", None)],
    State.CANCELLED: [Call(1, "m", None), Cancel(1)],
    State.DONE: [Call(1, "m", None), End(1, None)],
}


def brought_to(role: Role, state: State) -> Rpc:
    """One end whose call 1 stands there: what the other end sends is received, what it sends is sent."""
    end = Rpc(role)
    for frame in STATES[state]:
        if rpc.SENDER[type(frame)] is role:
            end._send(frame)
        else:
            end.receive(rpc.encode_frame(frame))
    assert end.state(1) is state
    return end


def test_the_table_is_total() -> None:
    assert set(rpc.TRANSITIONS) == set(rpc.CROSSED) == set(State)
    assert set(rpc.SENDER) == {type(frame) for frame in FRAMES}
    for state in State:
        assert not rpc.CROSSED[state] & set(rpc.TRANSITIONS[state])


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__name__)
def test_every_frame_in_every_state(frame: rpc.Frame, role: Role, state: State) -> None:
    """What the table allows happens, what crossed is ignored, and all else is its sender's fault."""
    kind = type(frame)
    if isinstance(frame, Credit):
        frame = Credit(1, 1)
    after = rpc.TRANSITIONS[state].get(kind)

    receiver, raw = brought_to(role, state), rpc.encode_frame(frame)
    if isinstance(frame, Credit) and state is State.OPEN:  # so that there is something to give back
        item = rpc.encode_frame(Item(1, None))
        receiver.receive(item) if role is Role.CALLER else receiver._send(Item(1, None), item)
    if rpc.SENDER[kind] is role or (after is None and kind not in rpc.CROSSED[state]):
        with pytest.raises(RemoteProtocolError):
            receiver.receive(raw)
    elif after is None:
        assert receiver.receive(raw) is None
        assert receiver.state(1) is state
    else:
        assert receiver.receive(raw) == frame
        assert receiver.state(1) is after

    sender = brought_to(role, state)
    if rpc.SENDER[kind] is not role or after is None:
        with pytest.raises(LocalProtocolError):
            sender._send(frame)
        assert sender.state(1) is state


def test_ids_only_rise() -> None:
    callee = Rpc(Role.CALLEE)
    callee.receive(rpc.encode_frame(Call(5, "m", None)))
    assert callee.state(4) is State.DONE  # skipped ids are over, they can never be begun
    for call_id in (4, 5):
        with pytest.raises(RemoteProtocolError, match=f"call {call_id}"):
            callee.receive(rpc.encode_frame(Call(call_id, "m", None)))
    callee.receive(rpc.encode_frame(Call(6, "m", None)))
    assert callee.unfinished == 2


def test_calls_have_a_bound_at_both_ends() -> None:
    caller, callee = pair()
    for _ in range(rpc.CALLS_MAX):
        callee.receive(caller.call("m", None)[1])
    with pytest.raises(LocalProtocolError):
        caller.call("m", None)
    with pytest.raises(RemoteProtocolError, match=str(rpc.CALLS_MAX)):
        callee.receive(rpc.encode_frame(Call(rpc.CALLS_MAX + 1, "m", None)))


def test_a_cancelled_call_counts_until_the_callee_ends_it() -> None:
    caller, callee, call_id = opened()
    assert callee.receive(sent(caller.cancel(call_id))) == Cancel(1)
    assert caller.cancel(call_id) is None
    assert caller.unfinished == callee.unfinished == 1
    assert caller.receive(callee.error(call_id, ERROR)) == Error(1, "full", "no room", True)
    assert caller.unfinished == callee.unfinished == 0
    assert caller.cancel(call_id) is None


# -- credit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "units"), [(1, 1), (1024, 1), (1025, 2), (131_072, 128)])
def test_an_item_costs_a_unit_for_each_begun_kibibyte(size: int, units: int) -> None:
    assert rpc.units_of(bytes(size)) == units


def test_items_stop_when_credit_is_used_up_and_go_on_when_it_comes() -> None:
    caller, callee, call_id = opened()
    frames = []
    while (raw := callee.item(call_id, "x")) is not None:
        frames.append(caller.receive(raw))
    assert len(frames) == rpc.WINDOW
    assert callee.credit(call_id) == caller.credit(call_id) == 0
    credits = [caller.consumed(call_id, 1) for _ in frames]
    given = [raw for raw in credits if raw is not None]
    assert [rpc.decode_frame(raw) for raw in given] == [Credit(1, rpc.WINDOW // 2)] * 2
    callee.receive(given[0])
    assert callee.item(call_id, "x") is not None


def test_an_item_over_its_bound_is_our_fault() -> None:
    _, callee, call_id = opened(WIDE)
    with pytest.raises(LocalProtocolError, match="in pieces"):
        callee.item(call_id, bytes(rpc.ITEM_UNITS_MAX * rpc.UNIT_BYTES))
    assert callee.item(call_id, bytes(rpc.ITEM_UNITS_MAX * rpc.UNIT_BYTES - 64)) is not None


def test_items_beyond_the_credit_are_the_peers_fault_also_after_a_cancel() -> None:
    for is_cancelled in (False, True):
        caller, _, call_id = opened()
        if is_cancelled:
            caller.cancel(call_id)
        raw = rpc.encode_frame(Item(1, None))
        for _ in range(rpc.WINDOW):
            caller.receive(raw)
        with pytest.raises(RemoteProtocolError, match="units"):
            caller.receive(raw)


def test_credit_over_the_window_is_the_peers_fault() -> None:
    _, callee, call_id = opened()
    callee.item(call_id, None)
    callee.receive(rpc.encode_frame(Credit(1, 1)))
    with pytest.raises(RemoteProtocolError, match="window"):
        callee.receive(rpc.encode_frame(Credit(1, 1)))


def test_nothing_is_given_back_for_a_call_that_is_over() -> None:
    caller, callee, call_id = opened()
    for _ in range(rpc.WINDOW):
        caller.receive(sent(callee.item(call_id, None)))
    caller.receive(callee.end(call_id, None))
    assert caller.consumed(call_id, rpc.WINDOW) is None
    caller, callee, call_id = opened()
    caller.receive(sent(callee.item(call_id, None)))
    caller.cancel(call_id)
    assert caller.consumed(call_id, rpc.WINDOW) is None


# -- histories --------------------------------------------------------------------------------------------------------


class Line:
    """Both ends, what is on the way between them, and what a program at each end would see."""

    def __init__(self) -> None:
        self.caller, self.callee = pair()
        self.down: deque[bytes] = deque()  # caller to callee
        self.up: deque[bytes] = deque()
        self.unread: dict[int, deque[int]] = {}  # items at the caller, by call: their units
        self.ends: dict[int, list[rpc.Frame]] = {}
        self.begun = 0

    def act(self, step: str, pick: int, size: int) -> None:
        getattr(self, f"do_{step}")(pick, size)
        self.check()

    def chosen(self, end: Rpc, pick: int) -> CallId | None:
        live = sorted(end._calls)
        return CallId(live[pick % len(live)]) if live else None

    def do_call(self, pick: int, size: int) -> None:
        if self.caller.unfinished < rpc.CALLS_MAX:
            call_id, raw = self.caller.call("m", bytes(size % 50))
            self.down.append(raw)
            self.unread[call_id], self.ends[call_id] = deque(), []
            self.begun += 1

    def do_cancel(self, pick: int, size: int) -> None:
        call_id = self.chosen(self.caller, pick)
        if call_id is not None and (raw := self.caller.cancel(call_id)) is not None:
            self.down.append(raw)

    def do_read(self, pick: int, size: int) -> None:
        waiting = [call_id for call_id, items in self.unread.items() if items]
        if waiting:
            call_id = waiting[pick % len(waiting)]
            raw = self.caller.consumed(CallId(call_id), self.unread[call_id].popleft())
            if raw is not None:
                self.down.append(raw)

    def do_item(self, pick: int, size: int) -> None:
        call_id = self.chosen(self.callee, pick)
        if call_id is not None and self.callee.state(call_id) is State.OPEN:
            raw = self.callee.item(
                call_id, bytes(min(size, canonical.CONTROL.bytes_max - 64))
            )  # with its head it fits a frame
            if raw is not None:
                self.up.append(raw)

    def do_end(self, pick: int, size: int) -> None:
        call_id = self.chosen(self.callee, pick)
        if call_id is not None:
            self.up.append(self.callee.end(call_id, size) if size % 2 else self.callee.error(call_id, ERROR))

    def do_arrive_down(self, pick: int, size: int) -> None:
        for _ in range(1 + pick % 4):
            if self.down:
                self.callee.receive(self.down.popleft())

    def do_arrive_up(self, pick: int, size: int) -> None:
        for _ in range(1 + pick % 4):
            if self.up:
                raw = self.up.popleft()
                frame = self.caller.receive(raw)
                if isinstance(frame, Item):
                    self.unread[frame.id].append(rpc.units_of(raw))
                elif frame is not None:
                    self.ends[frame.id].append(frame)

    def check(self) -> None:
        assert self.caller.unfinished <= rpc.CALLS_MAX
        assert self.callee.unfinished <= self.caller.unfinished
        for call_id, ends in self.ends.items():
            assert len(ends) <= 1
            assert (self.caller.state(call_id) is State.DONE) == bool(ends)
            assert sum(self.unread[call_id]) <= rpc.WINDOW  # what a slow reader makes us hold
            assert 0 <= self.callee.credit(call_id) <= rpc.WINDOW

    def finish(self) -> None:
        """Everything arrives, everything is read, every handler ends."""
        while self.up or self.down or self.callee.unfinished or any(self.unread.values()):
            self.do_arrive_down(3, 0)
            self.do_arrive_up(3, 0)
            self.do_read(0, 0)
            if not self.down:
                self.do_end(0, 1)
        self.check()
        assert all(len(ends) == 1 for ends in self.ends.values())
        assert len(self.ends) == self.begun
        assert self.caller.unfinished == self.callee.unfinished == 0


STEPS = ["call", "cancel", "read", "item", "item", "end", "arrive_down", "arrive_up"]
histories = st.lists(
    st.tuples(st.sampled_from(STEPS), st.integers(0, 300), st.one_of(st.integers(0, 3000), st.integers(0, 130_000))),
    max_size=120,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(histories)
def test_every_call_ends_exactly_once_whatever_crosses(history: list[tuple[str, int, int]]) -> None:
    line = Line()
    for step, pick, size in history:
        line.act(step, pick, size)
    line.finish()


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 130_000), max_size=40))
def test_credit_never_sticks(sizes: list[int]) -> None:
    """Whatever the sizes, a reader that reads lets the next item through."""
    caller, callee, call_id = opened(WIDE)
    for size in sizes:
        raw = callee.item(call_id, bytes(size))
        assert raw is not None
        caller.receive(raw)
        back = caller.consumed(call_id, rpc.units_of(raw))
        if back is not None:
            callee.receive(back)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(Role), st.lists(st.tuples(st.sampled_from(FRAMES), st.integers(1, 4)), max_size=30))
def test_a_liar_only_ever_breaks_the_rules(role: Role, lies: list[tuple[rpc.Frame, int]]) -> None:
    """Any frames in any order: taken, ignored, or a RemoteProtocolError; what is held stays bounded."""
    end = Rpc(role)
    if role is Role.CALLER:
        for _ in range(3):
            end.call("m", None)
    for frame, call_id in lies:
        try:
            end.receive(rpc.encode_frame(msgspec.structs.replace(frame, id=call_id)))
        except RemoteProtocolError:
            pass
        assert end.unfinished <= rpc.CALLS_MAX
