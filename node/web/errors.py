"""How every failure looks over HTTP: one table from kinds of error to status and type, one shape of body.

Rules: each RequestError kind has its row, a kind without one is a bug of ours and so a 500. 499 and 422 are never
sent. The body is OpenAI's error object, with request_id and retryable beside its fields.

Source: docs of the OpenAI API, "Error codes"; RFC 9110 section 10.2.3 (Retry-After).
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


def error_answer(error: errors.RequestError, request_id: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a failed request."""
    headers = {"content-type": "application/json"}
    wait_s = retry_after_s(error)
    if wait_s is not None:
        headers["retry-after"] = str(wait_s)
    if row_of(error).authenticate:
        headers["www-authenticate"] = AUTHENTICATE
    return row_of(error).status, headers, msgspec.json.encode(error_object(error, request_id))
