"""Statements of a made-up round: members, headers, reports, votes, signed by nobody but told apart as if they were."""

from __future__ import annotations

from collections.abc import Iterable

from crypto.canonical import encode_struct
from crypto.digest import Digest, digest
from crypto.identity import PeerId
from gossip.electors import Electors, Terms
from gossip.gathering import Candidate
from gossip.round_state import Chain
from gossip.rounds import WEIGHT_ONE, Body, Contribution, Header, Held, Report, Statement

RUN, BASE = bytes(32), digest(b"base")
MEMBERS = [PeerId(f"m{number:02}") for number in range(4)]
ELECTORS = Electors.of_founders(MEMBERS, Terms())
CHAIN = Chain(run=RUN, round=0, base=BASE, electors=ELECTORS)


class Equal:
    """Who is proven counts, all the same; what was asked is kept."""

    def __init__(self) -> None:
        self.asked: list[tuple[Candidate, ...]] = []

    def choose(self, candidates: tuple[Candidate, ...]) -> tuple[tuple[int, int], ...]:
        self.asked.append(candidates)
        return tuple((WEIGHT_ONE if each.is_proven else 0, WEIGHT_ONE) for each in candidates)


def signed(sender: PeerId, body: Body, again: int = 0) -> Statement:
    """As if `sender` had signed it; `again` for another envelope of the same body."""
    raw = encode_struct(body) + sender.encode() + bytes([again])
    return Statement(sender=sender, body=body, raw=raw, id=digest(raw))


def contribution(name: str, tokens: int = 10) -> Contribution:
    return Contribution(blob=digest(name.encode()), payload_bytes=100, steps=5, tokens=tokens)


def header(sender: PeerId, what: str | None = "", *, chain: Chain = CHAIN, **more: object) -> Statement:
    """what: a name for the contribution, the sender's by default; None: it sits the round out."""
    made = None if what is None else contribution(what or sender)
    return signed(
        sender,
        Header(run=chain.run, round=chain.round, base=chain.base, contribution=made, **more),  # type: ignore[arg-type]
    )


def report(
    sender: PeerId,
    held: Iterable[Statement],
    present: Iterable[Statement] = (),
    *,
    score: int | None = 0,
    chain: Chain = CHAIN,
) -> Statement:
    names = tuple(Held(header=each.id, score=score) for each in held)
    return signed(
        sender,
        Report(
            run=chain.run,
            round=chain.round,
            base=chain.base,
            held=names,
            present=tuple(each.id for each in present),
        ),
    )


def ids(statements: Iterable[Statement]) -> list[Digest]:
    return sorted(each.id for each in statements)
