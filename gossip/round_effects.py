"""What a member of a run wants done: said, asked, fetched, kept, applied. gossip/averaging.py makes them, in order.

Rules: core. A Keep is on disk before the effects after it are carried out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from crypto.identity import PeerId
from gossip.agreement import Saved
from gossip.rounds import Committed, Statement


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a restart needs of a round that is not over: own statements, and where the agreement stood.

    heard: what others said. Reports and votes of ours rest on it, and who made it may be a liar that says it no more.
    """

    round: int
    base: bytes
    said: tuple[Statement, ...] = ()
    heard: tuple[Statement, ...] = ()
    agreement: Saved = field(default_factory=Saved)


@dataclass(frozen=True, slots=True)
class Tell:
    """Say it to everybody."""

    statement: Statement


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask this peer for records from this round on, and for what it knows of its own round."""

    peer: PeerId
    round: int


@dataclass(frozen=True, slots=True)
class Behind:
    """This peer speaks of a round that is over: give it the records from there on, if it has not had them just now."""

    peer: PeerId
    round: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get this header's payload from one of these, look at it, and say `held` or `refused`. It may be asked again."""

    header: Statement
    holders: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Keep:
    """Have this on disk before what follows."""

    kept: Kept


@dataclass(frozen=True, slots=True)
class Apply:
    """Keep the record, change the weights by it, then say `applied`."""

    committed: Committed


@dataclass(frozen=True, slots=True)
class Accuse:
    """A member signed two statements of which it may sign one only."""

    peer: PeerId
    first: Statement
    second: Statement


Effect = Tell | Ask | Behind | Fetch | Keep | Apply | Accuse
