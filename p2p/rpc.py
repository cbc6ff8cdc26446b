"""The automaton of one rpc stream: many calls on it, both roles, one table of what may follow what.

Rules: core. The side that opened the stream is the CALLER, the other the CALLEE. Ids are the caller's, and each is
larger than the last. A call ends exactly once, by End or Error from the callee, after a Cancel too; until then it
counts against CALLS_MAX. Items are held by credit: a call starts with WINDOW units, an item costs one unit for each
begun UNIT_BYTES of its frame, and the caller gives units back as its program takes items. Two frames can cross on the
way; CROSSED names those that are received and ignored. Everything else that the table does not name is a breach: ours
is a LocalProtocolError, theirs a RemoteProtocolError, after which the stream is of no more use.
Wire: each frame is canonical msgpack, an array [kind, id, ...], within the limits of its protocol, which are small
(CONTROL) unless the protocol has its own: a frame is decoded on the loop, so its limits are what a peer can cost it.

Source: RFC 9113 section 5.1 (states, crossing frames) and 5.2 (credit); python-hyper/h11 h11/_state.py for the form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Annotated, Any, NewType

import msgspec
from msgspec import Meta, Struct

from crypto.canonical import CONTROL, Limits, Value, decode, encode
from crypto.errors import BadEncoding
from p2p.errors import LocalProtocolError, RemoteError, RemoteProtocolError

CALLS_MAX = 256  # unfinished calls on one stream, cancelled ones that the callee has not ended yet included
UNIT_BYTES = 1024  # of an item's frame for one unit of credit: a token's piece costs one
WINDOW = 256  # units a call may have on the way or unread: 256 KiB held for a slow reader, at most
ITEM_UNITS_MAX = WINDOW // 2  # credit comes back by half windows, so more could wait for ever
METHOD_CHARS_MAX = 64
CODE_CHARS_MAX = 64
MESSAGE_CHARS_MAX = 1024

CallId = NewType("CallId", int)
_Id = Annotated[int, Meta(ge=1, le=1 << 53)]


class Call(Struct, frozen=True, array_like=True, tag="call", forbid_unknown_fields=True):
    """Caller: begin a call."""

    id: _Id
    method: Annotated[str, Meta(min_length=1, max_length=METHOD_CHARS_MAX)]
    body: Any


class Cancel(Struct, frozen=True, array_like=True, tag="cancel", forbid_unknown_fields=True):
    """Caller: stop working on a call; nobody reads its items any more."""

    id: _Id


class Credit(Struct, frozen=True, array_like=True, tag="credit", forbid_unknown_fields=True):
    """Caller: `units` more may be sent."""

    id: _Id
    units: Annotated[int, Meta(ge=1, le=WINDOW)]


class Item(Struct, frozen=True, array_like=True, tag="item", forbid_unknown_fields=True):
    """Callee: one of the values that precede the end."""

    id: _Id
    body: Any


class End(Struct, frozen=True, array_like=True, tag="end", forbid_unknown_fields=True):
    """Callee: the call is complete; `body` is its result."""

    id: _Id
    body: Any


class Error(Struct, frozen=True, array_like=True, tag="error", forbid_unknown_fields=True):
    """Callee: the call has failed."""

    id: _Id
    code: Annotated[str, Meta(min_length=1, max_length=CODE_CHARS_MAX)]
    message: Annotated[str, Meta(max_length=MESSAGE_CHARS_MAX)]
    retryable: bool


Frame = Call | Cancel | Credit | Item | End | Error
Kind = type[Call] | type[Cancel] | type[Credit] | type[Item] | type[End] | type[Error]


_TAGS = frozenset(("call", "cancel", "credit", "item", "end", "error"))


class _Boxed(Struct, frozen=True, array_like=True):
    """A frame in a struct: msgspec keeps what it learns about a struct, and learns a bare union anew at each use."""

    frame: Frame


class Role(Enum):
    """Which end of the stream this is."""

    CALLER = auto()
    CALLEE = auto()


class State(Enum):
    """Of one call, as one end sees it."""

    IDLE = auto()  # not begun
    OPEN = auto()
    CANCELLED = auto()  # Cancel was sent or received; the end is still to come
    DONE = auto()


SENDER: Mapping[Kind, Role] = {
    Call: Role.CALLER,
    Cancel: Role.CALLER,
    Credit: Role.CALLER,
    Item: Role.CALLEE,
    End: Role.CALLEE,
    Error: Role.CALLEE,
}

TRANSITIONS: Mapping[State, Mapping[Kind, State]] = {
    State.IDLE: {Call: State.OPEN},
    State.OPEN: {
        Credit: State.OPEN,
        Item: State.OPEN,
        Cancel: State.CANCELLED,
        End: State.DONE,
        Error: State.DONE,
    },
    State.CANCELLED: {End: State.DONE, Error: State.DONE},
    State.DONE: {},
}

# Sent before the sender knew of the change: received and ignored, never sent.
CROSSED: Mapping[State, frozenset[Kind]] = {
    State.IDLE: frozenset(),
    State.OPEN: frozenset(),
    State.CANCELLED: frozenset((Item,)),
    State.DONE: frozenset((Cancel, Credit)),
}


def units_of(raw: bytes) -> int:
    """What an Item with this frame costs."""
    return (len(raw) + UNIT_BYTES - 1) // UNIT_BYTES


def encode_frame(frame: Frame, limits: Limits = CONTROL) -> bytes:
    """The bytes of a frame. Raises LocalProtocolError: the body is not plain values, or the frame is too large."""
    fields = msgspec.structs.astuple(frame)
    try:
        raw = encode([frame.__struct_config__.tag, *fields])
    except BadEncoding as exc:
        raise LocalProtocolError(f"the body of {_name(frame)} is not made of plain values: {exc}") from exc
    if len(raw) > limits.bytes_max:
        raise LocalProtocolError(
            f"{_name(frame)} has {len(raw)} bytes; a frame here holds at most {limits.bytes_max}: send it in pieces"
        )
    return raw


def decode_frame(raw: bytes, limits: Limits = CONTROL) -> Frame:
    """The frame in these bytes. Raises RemoteProtocolError for any others, and nothing else."""
    try:
        value = decode(raw, limits)
        if not isinstance(value, list) or not value or not isinstance(value[0], str) or value[0] not in _TAGS:
            raise BadEncoding("its first element is no kind of frame")  # msgspec would repeat it, however long it is
        return msgspec.convert((value,), _Boxed, strict=True).frame
    except (BadEncoding, msgspec.ValidationError) as exc:
        raise RemoteProtocolError(f"a frame of {len(raw)} bytes is not an rpc frame: {str(exc)[:200]}") from exc


def _sendable(text: str) -> str:
    """The text without what has no UTF-8, such as odd bytes of a file's name."""
    return text.encode(errors="replace").decode()


def _name(frame: Frame) -> str:
    return f"{type(frame).__name__} of call {frame.id}"


@dataclass(slots=True)
class _Call:
    """One unfinished call. `credit`: units the callee may still send; `freed`: units read and not yet given back."""

    state: State
    credit: int = WINDOW
    freed: int = 0


class Rpc:
    """One end of one stream. The methods give frames to send, in that order, or None where there is nothing to send."""

    def __init__(self, role: Role, limits: Limits = CONTROL) -> None:
        """limits: of every frame of the protocol, in both directions."""
        self.role = role
        self._limits = limits
        self._calls: dict[int, _Call] = {}
        self._last_id = 0

    @property
    def unfinished(self) -> int:
        """Calls begun and not ended."""
        return len(self._calls)

    def state(self, call_id: int) -> State:
        """Where a call stands."""
        call = self._calls.get(call_id)
        if call is not None:
            return call.state
        return State.DONE if call_id <= self._last_id else State.IDLE

    def credit(self, call_id: int) -> int:
        """Units that the callee may still send on an unfinished call; 0 when it is done."""
        call = self._calls.get(call_id)
        return call.credit if call is not None else 0

    # -- the caller ---------------------------------------------------------------------------------------------

    def call(self, method: str, body: Value) -> tuple[CallId, bytes]:
        """Begin a call. Raises LocalProtocolError; the caller asks `unfinished` first."""
        if len(self._calls) >= CALLS_MAX:
            raise LocalProtocolError(f"{CALLS_MAX} calls of this stream are unfinished")
        if not 0 < len(method) <= METHOD_CHARS_MAX:
            raise LocalProtocolError(f"a method's name has 1 to {METHOD_CHARS_MAX} characters, not {len(method)}")
        call_id = CallId(self._last_id + 1)
        return call_id, self._send(Call(call_id, method, body))

    def cancel(self, call_id: CallId) -> bytes | None:
        """Stop a call; None when it is cancelled or done already."""
        return self._send(Cancel(call_id)) if self.state(call_id) is State.OPEN else None

    def consumed(self, call_id: CallId, units: int) -> bytes | None:
        """The program took an item of `units`: give them back, half a window at a time."""
        call = self._calls.get(call_id)
        if call is None or call.state is not State.OPEN:
            return None
        call.freed += units
        if call.freed < WINDOW // 2:
            return None
        freed, call.freed = call.freed, 0
        return self._send(Credit(call_id, freed))

    # -- the callee ---------------------------------------------------------------------------------------------

    def item(self, call_id: CallId, body: Value) -> bytes | None:
        """Send an item; None when there is too little credit now. Raises LocalProtocolError."""
        frame = Item(call_id, body)
        raw = encode_frame(frame, self._limits)
        units = units_of(raw)
        if units > ITEM_UNITS_MAX:
            raise LocalProtocolError(
                f"{_name(frame)} has {len(raw)} bytes; it may have {ITEM_UNITS_MAX * UNIT_BYTES}: send it in pieces"
            )
        call = self._calls.get(call_id)
        if call is not None and call.state is State.OPEN and call.credit < units:
            return None
        return self._send(frame, raw)

    def end(self, call_id: CallId, body: Value) -> bytes:
        """End a call with its result. Raises LocalProtocolError, and the call is then still to be ended."""
        return self._send(End(call_id, body))

    def error(self, call_id: CallId, error: RemoteError) -> bytes:
        """End a call with an error; its texts are made to fit."""
        code = _sendable(error.code[:CODE_CHARS_MAX]) or "error"
        message = _sendable(error.message[:MESSAGE_CHARS_MAX])
        return self._send(Error(call_id, code, message, error.retryable))

    # -- both ---------------------------------------------------------------------------------------------------

    def receive(self, raw: bytes) -> Frame | None:
        """Take a frame from the other side; None for one that crossed. Raises RemoteProtocolError."""
        frame = decode_frame(raw, self._limits)
        kind, state = type(frame), self.state(frame.id)
        if SENDER[kind] is self.role:
            raise RemoteProtocolError(f"{_name(frame)} is for the {self.role.name.lower()} alone to send")
        self._account(frame, units_of(raw))
        if kind in CROSSED[state]:
            return None
        if kind not in TRANSITIONS[state]:
            raise RemoteProtocolError(f"{_name(frame)} came while that call was {state.name.lower()}")
        if kind is Call and len(self._calls) >= CALLS_MAX:
            raise RemoteProtocolError(f"{_name(frame)} came while {CALLS_MAX} calls of its stream were unfinished")
        self._step(frame)
        return frame

    def _send(self, frame: Frame, raw: bytes | None = None) -> bytes:
        state = self.state(frame.id)
        if SENDER[type(frame)] is not self.role or type(frame) not in TRANSITIONS[state]:
            raise LocalProtocolError(f"the {self.role.name.lower()} cannot send {_name(frame)}: it is {state.name}")
        if raw is None:
            raw = encode_frame(frame, self._limits)
        self._account(frame, units_of(raw))
        self._step(frame)
        return raw

    def _step(self, frame: Frame) -> None:
        """Change the state of the frame's call, by the table."""
        after = TRANSITIONS[self.state(frame.id)][type(frame)]
        if after is State.DONE:
            del self._calls[frame.id]
        elif isinstance(frame, Call):
            self._last_id = frame.id
            self._calls[frame.id] = _Call(after)
        else:
            self._calls[frame.id].state = after

    def _account(self, frame: Frame, units: int) -> None:
        """Move credit. Both ends do the same sums over the same bytes, so each can hold the other to them."""
        call = self._calls.get(frame.id)
        if call is None:
            return
        if isinstance(frame, Item):
            if units > call.credit:
                raise RemoteProtocolError(f"{_name(frame)} costs {units} units of {call.credit} left")
            call.credit -= units
        elif isinstance(frame, Credit):
            if call.credit + frame.units > WINDOW:
                raise RemoteProtocolError(f"{_name(frame)} lifts the credit over the window of {WINDOW}")
            call.credit += frame.units
