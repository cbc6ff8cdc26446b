"""What a serving peer sends, judged: is it what was asked, is it in time, and whose fault is a failure.

Rules: core. A peer is judged by work: tokens must come, or the progress that it reports must grow, or after its
patience of waiting it counts as frozen, however open its connection is. Time spent waiting for our own client does not
count. And it has FIRST_TOKEN_SHARE of the request's time for its first token, whatever progress it reports, so that
time is left for another peer. A breach of the protocol, and letting down a request after its start, are the peer's
fault; that it is full, or that the request is wrong, is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from crypto.identity import PeerId
from gossip.messages import Capacity
from gossip.standing import Fault
from node.errors import (
    NO_ROOM_RETRY_S,
    REQUEST_ERRORS,
    BadRequest,
    NoRoom,
    NotReady,
    PeerFailed,
    RequestError,
    TooMany,
)
from node.work import AnswerItem, Finished, GenerateWork, Piece, Progress, Started
from p2p.errors import LocalProtocolError, P2PError, Refused, RemoteError, RemoteProtocolError, StreamBreach

ACCEPT_S = 2.0  # before the first token neither word nor progress for so long: nobody works there, ...
STALL_S = 5.0  # after it neither token nor progress for so long: frozen, if its speed is known and lets it do better
STALL_UNMEASURED_S = 20.0  # before its first request; the transport finds a dead connection in half that time
STALL_S_MAX = 60.0  # whatever speed it claims
PREFILL_CHUNK = 256  # tokens of prompt that an engine reads in one step (model/config.py)
FIRST_TOKEN_SHARE = 0.75
TOKEN_CHARS_MAX = 1024  # the longest tokens of common vocabularies are 128 spaces
# by the code of a peer's error; that we ask it for too much is no fault of our client's
ANSWERED: dict[str, type[RequestError]] = {**REQUEST_ERRORS, "busy": NoRoom, TooMany.code: NoRoom}

WORDS = frozenset({*ANSWERED, "cancelled", "unknown_method"})  # what an honest peer answers in place of a result


class LetDown(PeerFailed):
    """The peer had accepted the request, and then stopped working on it."""


class Judge:
    """One peer's answer to one request. Times are seconds of one clock."""

    def __init__(self, peer: PeerId, capacity: Capacity, work: GenerateWork, began: float) -> None:
        """capacity: what the peer says of its speed. began: when it was asked."""
        self._peer = peer
        self._accept_s, self._stall_s = accept_s(capacity), stall_s(capacity)
        self._work = work
        self._began = began
        self._patience_s = self._accept_s
        self._seen: Progress | None = None
        self._started: Started | None = None
        self._tokens = len(work.delivered)
        self._chars = work.delivered_chars
        self.first_token_s: float | None = None

    @property
    def tokens_received(self) -> int:
        """Tokens that this peer made, without those delivered before."""
        return self._tokens - len(self._work.delivered)

    @property
    def is_cached(self) -> bool:
        """Whether the peer says that it made the answer earlier."""
        return self._started is not None and self._started.cached

    def waits_until(self, now: float) -> float:
        """Until when to wait for the next item, if the waiting begins now."""
        return min(now + self._patience_s, self._first_by)

    def waited(self, seconds: float) -> None:
        """An item came after so long; only an advance gives the patience back."""
        self._patience_s -= seconds

    def late(self, now: float) -> PeerFailed:
        """Nothing came in time: why that is the end."""
        kind = PeerFailed if self._started is None else LetDown
        if now >= self._first_by:
            share_s = self._first_by - self._began
            return kind(f"no token within {share_s:.0f} s, {FIRST_TOKEN_SHARE:.0%} of the request's time")
        silent_s = self._accept_s if self.first_token_s is None else self._stall_s
        return kind(f"no token and no progress for {silent_s:.0f} s: the peer is frozen or cut off")

    def take(self, item: AnswerItem, now: float) -> bool:
        """Check an item that precedes the end; whether it tells the client anything. Raises RemoteProtocolError."""
        if (self._started is not None) is isinstance(item, Started):
            raise RemoteProtocolError("an answer must open with Started, once")
        match item:
            case Started():
                self._check_server(item)
                self._started = item
                self._advance()
            case Progress():
                return self._is_further(item)
            case Piece():
                self._check_amount(item)
                if item.tokens:
                    if self.first_token_s is None:
                        self.first_token_s = now - self._began
                    self._advance()
                return bool(item.tokens or item.text)
            case Finished():
                raise RemoteProtocolError("the last record came as one of the items before it")
        return True

    def end(self, item: Finished) -> None:
        """Check the end. Raises RemoteProtocolError."""
        if self._started is None:
            raise RemoteProtocolError("an answer must open with Started, once")
        if item.completion_tokens != self._tokens:
            raise RemoteProtocolError(f"{self._tokens} tokens came, the record says {item.completion_tokens}")
        if self._started.prompt_tokens not in (0, item.prompt_tokens):
            raise RemoteProtocolError(f"the prompt had {self._started.prompt_tokens} tokens, now {item.prompt_tokens}")

    @property
    def _first_by(self) -> float:
        if self.first_token_s is not None:
            return math.inf
        return self._began + FIRST_TOKEN_SHARE * self._work.remaining_ms / 1000

    def _check_server(self, item: Started) -> None:
        if item.served_by != self._peer:
            raise RemoteProtocolError(f"it says that {item.served_by} serves")
        if item.cached and not self._work.may_be_kept:
            raise RemoteProtocolError("it gave what was kept of an earlier answer, and was asked not to")
        if item.calls is not None and self._work.tools is None:
            raise RemoteProtocolError("it tells how tools are called, and was given none")
        if self._work.model not in (None, item.model):
            raise RemoteProtocolError(f"asked for {self._work.model}, got {item.model}")
        if self._work.revision not in (None, item.revision):
            raise RemoteProtocolError(f"asked for revision {self._work.revision}, got {item.revision}")

    def _check_amount(self, item: Piece) -> None:
        self._tokens += len(item.tokens)
        self._chars += len(item.text)
        if self._tokens > self._work.sampling.max_tokens:
            raise RemoteProtocolError(f"over the {self._work.sampling.max_tokens} tokens that were asked for")
        if self._chars > TOKEN_CHARS_MAX * self._tokens:
            raise RemoteProtocolError(f"{self._chars} characters for {self._tokens} tokens")

    def _is_further(self, item: Progress) -> bool:
        """Whether work was done. Once all is prefilled the next thing is a token: steps alone prove nothing then.

        Of a prompt that is not counted nobody can say that all is prefilled: steps count until its first token.
        """
        assert self._started is not None
        whole = self._started.prompt_tokens + len(self._work.delivered)
        if item.prefilled_tokens > whole:
            raise RemoteProtocolError(f"{item.prefilled_tokens} tokens prefilled of {whole}")
        before, self._seen = self._seen, item
        if before is not None and not _grown(before, item):
            self._seen = before
            return False
        if before is None or before.prefilled_tokens < whole or not self._started.prompt_tokens:
            self._advance()
        return True

    def _advance(self) -> None:
        """It did something. Before its first token little is lost by asking another."""
        self._patience_s = self._accept_s if self.first_token_s is None else self._stall_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a failed attempt means: for the request, for routing (a stable code), for the peer's standing."""

    error: RequestError
    reason: str
    fault: Fault | None = None


def judged(failure: P2PError | PeerFailed, peer: PeerId) -> Verdict:
    """Why an attempt at a peer failed. Its own word for it is kept only if it is one of ours: it is counted by."""
    match failure:
        case RemoteError():
            kind = ANSWERED.get(failure.code, PeerFailed)
            retry_after_s = NO_ROOM_RETRY_S if kind in (NoRoom, NotReady) else None
            error = kind(f"{peer} answered: {failure.message}", retry_after_s=retry_after_s)
            return Verdict(error=error, reason=failure.code if failure.code in WORDS else "another_word")
        case RemoteProtocolError():
            error = PeerFailed(f"{peer} broke the protocol: {failure}")
            fault = None if isinstance(failure, StreamBreach) else Fault.MALFORMED  # node/run.py was told of that one
            return Verdict(error=error, reason="protocol", fault=fault)
        case LocalProtocolError():
            error = BadRequest(f"the request cannot be sent to a peer: {failure}; make it smaller")
            return Verdict(error=error, reason=BadRequest.code)
        case Refused():
            error = NoRoom(f"{peer} takes no more: {failure}", retry_after_s=NO_ROOM_RETRY_S)
            return Verdict(error=error, reason="busy")
        case PeerFailed():
            stalled = Fault.TIMEOUT if isinstance(failure, LetDown) else None
            return Verdict(error=PeerFailed(f"{peer}: {failure.message}"), reason="stalled", fault=stalled)
        case _:
            return Verdict(error=PeerFailed(f"{peer} cannot be reached: {failure}"), reason="unreachable")


def stall_s(capacity: Capacity) -> float:
    """How long a peer with these speeds may show neither token nor progress: its longest honest step, and a half."""
    step_s = _step_s(capacity)
    return STALL_UNMEASURED_S if step_s is None else min(STALL_S_MAX, max(STALL_S, 1.5 * step_s))


def accept_s(capacity: Capacity) -> float:
    """How long its first words, and then its progress, may take: the step under way, one more, and the network."""
    step_s = _step_s(capacity)
    return stall_s(capacity) if step_s is None else min(stall_s(capacity), max(ACCEPT_S, 2.5 * step_s))


def _step_s(capacity: Capacity) -> float | None:
    """The longest step of an engine with these speeds; None when they are not known yet."""
    if not capacity.prefill_tok_s or not capacity.decode_tok_s:
        return None
    return max(PREFILL_CHUNK / capacity.prefill_tok_s, 1 / capacity.decode_tok_s)


def _grown(before: Progress, after: Progress) -> bool:
    return after.engine_steps > before.engine_steps or after.prefilled_tokens > before.prefilled_tokens
