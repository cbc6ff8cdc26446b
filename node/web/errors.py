"""How every failure looks over HTTP: one table from kinds of error to status and type, one shape of body a protocol.

Rules: each RequestError kind has its row, a kind without one is a bug of ours and so a 500. 499 and 422 are never
sent. The body is OpenAI's error object, with request_id and retryable beside its fields; on the paths of Anthropic's
and Ollama's clients it is theirs, whatever went wrong there, a foreign Host and a missing route included.

Source: docs of the OpenAI API, "Error codes"; of the Claude API, "Errors"; of the Ollama API, "Errors"; RFC 9110
section 10.2.3 (Retry-After).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from node import errors

RETRY_AFTER_S_DEFAULT = 1.0  # a slot frees within about an answer; clients back off from here
RETRY_AFTER_S_MAX = 600.0
AUTHENTICATE = 'Bearer realm="openagi"'  # signatures have no scheme of their own (RFC 9421)


class Forbidden(errors.RequestError):
    """The request comes from where requests are not taken, or from who may not ask this. `code` says more."""

    code = "forbidden"

    def __init__(self, message: str, *, param: str | None = None, code: str = code) -> None:
        super().__init__(message, param=param)
        self.code = code


class Limited(errors.TooMany):
    """An account has taken what it may for now. `counter`: what it is counted as."""

    code = "rate_limited"

    def __init__(self, message: str, *, counter: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.counter = counter


class Unauthorized(errors.RequestError):
    """Who asks is not known, or not as they say. `code` says why."""

    code = "unauthorized"

    def __init__(self, message: str, *, param: str | None = None, code: str = code) -> None:
        super().__init__(message, param=param)
        self.code = code


class NotFound(errors.RequestError):
    """No such route, or no such thing on a route that lists things."""

    code = "not_found"


class MethodNotAllowed(errors.RequestError):
    """The route exists, for another method."""

    code = "method_not_allowed"


class SlowBody(errors.DeadlinePassed):
    """The request's own body did not arrive in time: the client is slow, or means harm."""

    code = "slow_body"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One kind's HTTP face. `type` is OpenAI's word for the family of errors."""

    status: int
    type: str
    retry_after: bool = False
    authenticate: bool = False


TABLE: dict[type[errors.RequestError], Row] = {
    errors.BadRequest: Row(status=400, type="invalid_request_error"),
    Unauthorized: Row(status=401, type="authentication_error", authenticate=True),
    Forbidden: Row(status=403, type="permission_error"),
    NotFound: Row(status=404, type="invalid_request_error"),
    errors.UnknownModel: Row(status=404, type="invalid_request_error"),
    errors.UnknownPeer: Row(status=404, type="invalid_request_error"),
    errors.SealBroken: Row(status=400, type="invalid_request_error"),
    errors.SealReplayed: Row(status=409, type="invalid_request_error"),
    errors.WrongSealingKey: Row(status=409, type="invalid_request_error"),
    MethodNotAllowed: Row(status=405, type="invalid_request_error"),
    errors.DeadlinePassed: Row(status=408, type="timeout_error"),
    SlowBody: Row(status=408, type="timeout_error"),
    errors.TooLarge: Row(status=413, type="invalid_request_error"),
    errors.NoRoom: Row(status=503, type="overloaded_error", retry_after=True),
    errors.TooMany: Row(status=429, type="rate_limit_error", retry_after=True),
    errors.NotReady: Row(status=503, type="unavailable_error", retry_after=True),
    errors.PeerFailed: Row(status=503, type="unavailable_error", retry_after=True),
    errors.InternalError: Row(status=500, type="server_error"),
}
_UNKNOWN = TABLE[errors.InternalError]

# which clients ask on which path
ANTHROPIC_PATH = "/v1/messages"
OLLAMA_PREFIX = "/api/"
OWN_PREFIX = "/api/v1/"
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


# the codes that each row stands for: its own, and those of kinds without a row
CODES: dict[type[errors.RequestError], list[str]] = {kind: [kind.code] for kind in TABLE}
for _kind in errors.REQUEST_ERRORS.values():
    if _kind not in TABLE:
        CODES[next(known for known in _kind.__mro__ if known in TABLE)].append(_kind.code)


def row_of(error: errors.RequestError) -> Row:
    """The nearest kind's row."""
    return next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), _UNKNOWN)


def error_object(error: errors.RequestError, request_id: str) -> dict[str, object]:
    """OpenAI's error object; the same over JSON and inside a stream."""
    return {
        "error": {
            "type": row_of(error).type,
            "code": error.code,
            "message": error.message,
            "param": error.param,
            "request_id": request_id,
            "retryable": error.retryable,
            **error.more,
        }
    }


def retry_after_s(error: errors.RequestError) -> int | None:
    """Whole seconds for the Retry-After header, None when the kind has none."""
    if not row_of(error).retry_after:
        return None
    wanted = RETRY_AFTER_S_DEFAULT if error.retry_after_s is None else error.retry_after_s
    if not math.isfinite(wanted):
        wanted = RETRY_AFTER_S_MAX
    most = wanted if isinstance(error, Limited) else RETRY_AFTER_S_MAX  # our own arithmetic is true however long it is
    return math.ceil(min(max(wanted, 1.0), max(most, 1.0)))


def anthropic_error(error: errors.RequestError, request_id: str) -> dict[str, object]:
    """Anthropic's error object; the same over JSON and inside a stream."""
    kind = ANTHROPIC_TYPES.get(row_of(error).status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}


def ollama_error(error: errors.RequestError, request_id: str) -> dict[str, object]:
    """Ollama's error object; the same over JSON and as a line of a stream."""
    return {"error": error.message, "code": error.code, "request_id": request_id}


def error_answer(error: errors.RequestError, request_id: str, path: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a failed request for `path`, in the shape that the path's clients read."""
    headers = {"content-type": "application/json"}
    wait_s = retry_after_s(error)
    if wait_s is not None:
        headers["retry-after"] = str(wait_s)
    if row_of(error).authenticate:
        headers["www-authenticate"] = AUTHENTICATE
    if path == ANTHROPIC_PATH or path.startswith(ANTHROPIC_PATH + "/"):
        told = anthropic_error(error, request_id)
        headers["request-id"] = request_id
    elif path.startswith(OLLAMA_PREFIX) and not path.startswith(OWN_PREFIX):
        told = ollama_error(error, request_id)
    else:
        told = error_object(error, request_id)
    return row_of(error).status, headers, msgspec.json.encode(told)
