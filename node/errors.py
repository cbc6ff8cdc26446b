"""What a request can end in, other than an answer. node/web/errors.py maps each to an HTTP status.

RequestError(code, message, retryable)
|- BadRequest        the caller's input: say what came, what was wanted, what to do      400
|  `- TooLong         prompt and answer are longer than the context of who was asked       400
|- TooLarge          the input is over a bound with a name                                413
|- UnknownModel      no live peer serves it; lists those that are served                  404
|- NoRoom            every peer that serves it is full: try later                         503 + Retry-After
|  `- TooMany        the caller has as many waiting as one may: wait for one to end       429 + Retry-After
|- NotReady          starting, loading or draining                                        503 + Retry-After
|- DeadlinePassed    the request's own time is over                                       408
|- UnknownPeer       neither connected nor heard of                                      404
|- SealBroken        the serving peer cannot open a sealed request                       400
|- SealReplayed      it opened it before                                                 409
|- WrongSealingKey   it is sealed to another key; carries the present one                409
|- PeerFailed        the serving peer died or broke the protocol; another may do          503
`- InternalError     a bug                                                                500

ConfigError (exit 2), DataDirLocked (exit 75), StoreLocked (exit 75): problems found at start.
StoreUnavailable: the memory's file cannot be written now, and the caller must know.
BadFigure: a figure of the node's own state that is no number or out of its bounds: a bug of whoever measured it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

NO_ROOM_RETRY_S = 1.0  # what a client is told to wait, when nothing better is known


class RequestError(Exception):
    """A request's clear end without an answer. `code` is stable, `param` names the field at fault."""

    code: str = "error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        more: Mapping[str, object] | None = None,
    ) -> None:
        """more: JSON beside the other fields of the error's body: `loading`; `is_possible` and `models`."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.more: Mapping[str, object] = more or {}


class BadRequest(RequestError):
    """The caller's input is wrong."""

    code = "bad_request"


class TooLong(BadRequest):
    """Prompt and answer together are longer than the model's context at who was asked; another's may be longer."""

    code = "context_length_exceeded"  # OpenAI's own, which clients look for


class TooLarge(RequestError):
    """The input is larger than a stated bound."""

    code = "too_large"


class UnknownModel(RequestError):
    """No live peer serves the model."""

    code = "unknown_model"


class NoRoom(RequestError):
    """Every peer that serves the model is full."""

    code = "no_room"
    retryable = True


class TooMany(NoRoom):
    """The caller alone takes all that one caller may; others are served. A peer is told NoRoom."""

    code = "too_many"


class NotReady(RequestError):
    """The node is starting, loading or draining."""

    code = "not_ready"
    retryable = True


class DeadlinePassed(RequestError):
    """The request's time ran out."""

    code = "deadline"


class UnknownPeer(RequestError):
    """The peer asked for is neither connected nor heard of."""

    code = "unknown_peer"


class SealBroken(RequestError):
    """What came sealed does not open at its peer."""

    code = "bad_seal"


class SealReplayed(RequestError):
    """The peer has opened this very request before; sealed anew it would be another."""

    code = "replayed"


class WrongSealingKey(RequestError):
    """A sealed request is for a key that its peer does not have (any more). statement: its present key, signed."""

    code = "sealing_key"
    retryable = True

    def __init__(self, peer: str, statement: bytes) -> None:
        super().__init__(
            f"it is sealed to a key that {peer} does not have, or not any more: seal it anew to the one in sealing_key",
            param="key",
        )
        self.statement = statement


class PeerFailed(RequestError):
    """The serving peer died, froze or broke the protocol."""

    code = "peer_failed"
    retryable = True


class InternalError(RequestError):
    """A bug of ours; the log has the traceback under the request id."""

    code = "internal"


REQUEST_ERRORS: dict[str, type[RequestError]] = {
    kind.code: kind
    for kind in (
        BadRequest,
        TooLong,
        TooLarge,
        UnknownModel,
        NoRoom,
        TooMany,
        NotReady,
        DeadlinePassed,
        PeerFailed,
        InternalError,
    )
}

# what the caller got wrong, and no fault of the node or of its peers
CALLERS_FAULT = frozenset(
    kind.code for kind in (BadRequest, TooLong, TooLarge, UnknownModel, UnknownPeer, TooMany, SealBroken, SealReplayed)
)


class ConfigError(Exception):
    """A flag, environment variable, file or key is wrong: exit 2."""


class DataDirLocked(Exception):
    """Another node holds the data directory: exit 75."""


class StoreLocked(Exception):
    """Another process has the memory's file open: says which file and what to do."""


class StoreUnavailable(Exception):
    """The memory's file cannot be written now, so that what was asked for is not done: says why and what to do."""


class BadFigure(ValueError):
    """A figure of the node's own state that is no number or out of its bounds: a bug of whoever measured it."""
