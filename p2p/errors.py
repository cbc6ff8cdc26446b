"""What can go wrong between peers.

P2PError
|- LocalProtocolError     we broke our own rules: a bug
|- RemoteProtocolError    they broke the rules: drop, lower standing
|  `- StreamBreach         and the stream's owner has told of it: it costs nothing more
|- Unreachable            nobody answers there: try another
|- StreamClosed           the other side ended the stream cleanly
|- Refused                policy, theirs or ours: says which and why
|- CannotListen           nothing to listen on (exit 69)
|- BadAddress             an address that cannot be dialled: says what is wrong with it
|- BadFile                a bootstrap file or address book that cannot be read: says where and why
`- RemoteError            the peer's handler answered with an error; code, retryable
"""

from __future__ import annotations


class P2PError(Exception):
    """Base of all errors of this package."""


class LocalProtocolError(P2PError):
    """This node used the protocol wrongly: a bug of ours."""


class RemoteProtocolError(P2PError):
    """The peer sent what the protocol forbids."""


class StreamBreach(RemoteProtocolError):
    """The peer broke a rule of the stream that this call was on; whoever heeds such breaches has been told once."""


class Unreachable(P2PError):
    """The peer cannot be reached, or the connection to it broke."""


class StreamClosed(P2PError):
    """The peer ended the stream in order; no frame was cut."""


class Refused(P2PError):
    """Policy says no: another network, another version, a ban, too many connections."""


class CannotListen(P2PError):
    """No listen address could be bound."""


class BadAddress(P2PError):
    """A multiaddr is malformed, names no peer, or cannot be dialled."""


class BadFile(P2PError):
    """A bootstrap file or an address book cannot be used; names the file, the entry and the reason."""


class RemoteError(P2PError):
    """The peer's handler answered with an error.

    `code` is a short stable word, `retryable` says whether another peer may succeed.
    """

    def __init__(self, code: str, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable
