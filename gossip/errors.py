"""What can go wrong when peers tell each other things.

GossipError
|- LocalProtocolError     we tried to say what the protocol forbids: a bug or a wrong setting of ours
|- RemoteProtocolError    a peer said what the protocol forbids: drop it, lower its standing
|- Unavailable            nobody gave what was asked for: says what each peer did
`- CannotStore            what peers gave cannot be kept here: says what to do
   `- TooLarge            it is larger than it may be, and always will be
"""

from __future__ import annotations


class GossipError(Exception):
    """Base of all errors of this package."""


class LocalProtocolError(GossipError):
    """This node tried to send what no peer would accept."""


class RemoteProtocolError(GossipError):
    """A peer's message breaks the protocol."""


class Unavailable(GossipError):
    """Nobody gave it; another time, or other peers, may."""


class CannotStore(GossipError):
    """The disk, or a bound of this node, does not let it be kept."""


class TooLarge(CannotStore):
    """It has more bytes than whoever asked for it allows."""
