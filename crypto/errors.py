"""What can go wrong with keys, signatures and bytes.

CryptoError
|- BadKey                   a key or peer id is malformed, missing, truncated or in the way
|  `- UnsafePermissions     the key file can be read or was made by others (exit 78)
|- BadSignature             not signed by whom it names, for this domain
|- BadState                 a state file's content cannot be used
|  `- NewerState            a newer node wrote it
|- BadSeal                  sealed bytes that do not open
|  `- Replayed              they did, once
|- UnknownSealingKey        sealed to a key that is not held, or not any more
|- BadEncoding              bytes that are no canonical value, or a value that has no canonical bytes
|- Expired                  outside its time: too old, or from the future
`- WrongNetwork             signed for another network than ours
"""

from __future__ import annotations


class CryptoError(Exception):
    """Base of all errors of this package."""


class BadKey(CryptoError):
    """A key or a peer id cannot be used: says which and why."""


class UnsafePermissions(BadKey):
    """The key file is not ours alone: says the path, what was found and what to do."""


class BadSignature(CryptoError):
    """The signature does not belong to this sender, domain and content."""


class BadState(CryptoError):
    """A state file on disk does not hold what was written: says what was found."""


class NewerState(BadState):
    """A state file of a version that this node does not know."""


class BadSeal(CryptoError):
    """Sealed bytes that were changed, cut or moved, or that are for somebody else."""


class Replayed(BadSeal):
    """These sealed bytes were opened before."""


class UnknownSealingKey(CryptoError):
    """Sealed to a key that is not held, or not any more: the present one is wanted."""


class BadEncoding(CryptoError):
    """These bytes are not what the wire format allows."""


class Expired(CryptoError):
    """The statement's time is over, or has not come yet by our clock."""


class WrongNetwork(CryptoError):
    """The statement is for another network."""
