"""The simulator's blobs: fetched from several peers at once, through gossip/donors.py and gossip/transfer.py.

Rules: what is asked of whom, and what is stored, is decided by these cores; the frames are gossip/blob_wire.py's. A
fetch ends once: with the blob's bytes, or because it is hopeless, or with its process. Black holes and stallers say
that they have it and give nothing; liars give other bytes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

from crypto.digest import Digest, digest
from crypto.identity import PeerId
from gossip.blob_wire import (
    BlobAsk,
    Here,
    Piece,
    RangeAsk,
    ask_frame,
    decode_answer,
    decode_ask,
    here_frame,
    piece_head,
)
from gossip.donors import Donors, DonorsConfig
from gossip.errors import RemoteProtocolError
from gossip.standing import Fault
from gossip.transfer import Ask, Drop, Effect, Store, Transfer, TransferConfig, decode_manifest, manifest_of
from tests.simulator_net import Link, Timer

if TYPE_CHECKING:
    from tests.simulator_node import Process

CONTENT = random.Random(7).randbytes(300_000)
MANIFEST = manifest_of(CONTENT, 16_384)
BLOB: Digest = digest(MANIFEST.encode())
ANSWER_S = 5.0
DONORS = DonorsConfig(patience_s=20.0)
TRANSFER = TransferConfig(answer_s=4.0)


class Conversation:
    """One fetch with one donor over one link."""

    def __init__(self, fetch: Fetch, donor: PeerId) -> None:
        self.fetch, self.donor = fetch, donor
        self.link: Link | None = None
        self.is_over = False
        self.timer: Timer | None = None

    def end(self) -> None:
        self.is_over = True
        if self.timer is not None:
            self.timer.cancel()


class Fetch:
    """One blob on its way to one process."""

    def __init__(self, process: Process, number: int, peers: Iterable[PeerId]) -> None:
        self.process, self.number = process, number
        self.outcome: str | None = None
        self._donors = Donors(peers, DONORS, process.now)
        self._talks: dict[PeerId, Conversation] = {}
        self._transfer: Transfer | None = None
        self._chunks: dict[int, bytes] = {}
        self._timer: Timer | None = None

    def go(self) -> None:
        """Do what is due, and come again when something is."""
        now = self.process.now
        if self.outcome is not None:
            return
        for donor in self._donors.due(now):
            self._try(donor)
        if self._donors.hopeless(now):
            return self._end("unavailable")
        if self._transfer is not None:
            self._perform(self._transfer.tick(now))
        if self.outcome is not None:
            return
        due = min(self._donors.deadline(), self._transfer.deadline() if self._transfer is not None else float("inf"))
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.process.after(max(0.0, due - now), self.go)

    def died(self) -> None:
        """The process is gone."""
        if self.outcome is None:
            self.outcome = "door_died"

    def answered(self, talk: Conversation, raw: bytes) -> None:
        """A donor's frame."""
        if talk.is_over or self.outcome is not None:
            return
        if talk.timer is not None:
            talk.timer.cancel()
        now = self.process.now
        try:
            match decode_answer(raw):
                case Here(manifest):
                    if self._transfer is None:
                        self._transfer = Transfer(decode_manifest(manifest, BLOB), TRANSFER)
                    self._perform(self._transfer.joined(talk.donor, now))
                case Piece(start, content):
                    assert self._transfer is not None
                    effects = self._transfer.received(talk.donor, start // MANIFEST.chunk_bytes, content, now)
                    if any(isinstance(effect, Store) for effect in effects):
                        self._donors.stored(talk.donor, now)
                    self._perform(effects)
        except RemoteProtocolError as exc:
            self._out(talk.donor, str(exc), lied=True)
        self.go()

    def left(self, donor: PeerId, reason: str) -> None:
        """A donor is gone; it may come back."""
        if (talk := self._talks.pop(donor, None)) is None or self.outcome is not None:
            return
        talk.end()
        self._donors.failed(donor, reason, self.process.now)
        if self._transfer is not None:
            self._perform(self._transfer.left(donor, self.process.now))
        self.go()

    def _try(self, donor: PeerId) -> None:
        talk = self._talks[donor] = Conversation(self, donor)
        talk.timer = self.process.after(ANSWER_S, lambda: self.left(donor, "no answer"))

        def dialled(link: Link | None) -> None:
            if talk.is_over:
                return
            if link is None:
                return self.left(donor, "no connection")
            talk.link = link
            self.process.net.send(link, self.process, "blob_ask", ask_frame(BlobAsk(blob=BLOB, manifest=True)), talk)

        self.process.net.dial(self.process, donor, dialled)

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Ask():
                    link = self._talks[effect.donor].link
                    assert link is not None
                    ask = ask_frame(RangeAsk(start=effect.start, length=effect.length))
                    self.process.net.send(link, self.process, "blob_range", ask, self._talks[effect.donor])
                case Store():
                    self._chunks[effect.index] = bytes(effect.content)
                case Drop():
                    self._out(effect.donor, effect.reason, lied=effect.lied)
                case _:
                    self._end("finished")

    def _out(self, donor: PeerId, reason: str, *, lied: bool) -> None:
        if (talk := self._talks.pop(donor, None)) is not None:
            talk.end()
        if self._donors.out(donor, reason):
            fault = Fault.MALFORMED if lied else Fault.TIMEOUT
            self.process.hearing.blame(donor, fault, reason, self.process.now)

    def _end(self, outcome: str) -> None:
        if outcome == "finished" and b"".join(self._chunks[index] for index in range(MANIFEST.count)) != CONTENT:
            self.process.violations.append(f"fetch {self.number} has other bytes")
        self.outcome = outcome
        self.process.net.history.note("fetched", self.number, outcome, len(self._chunks))
        for talk in self._talks.values():
            talk.end()
        if self._timer is not None:
            self._timer.cancel()


def serve_blob(process: Process, link: Link, kind: str, raw: bytes, talk: object) -> None:
    """A donor's part."""
    if not process.peer.serves:
        return
    if kind == "blob_ask":
        decode_ask(raw, BlobAsk)
        return process.net.send(link, process, "blob_answer", here_frame(MANIFEST.encode()), talk)
    if process.peer.actor in ("black_hole", "staller", "sybil"):
        return
    ask = decode_ask(raw, RangeAsk)
    content = CONTENT[ask.start : ask.start + ask.length]
    if process.peer.actor == "liar":
        content = bytes([content[0] ^ 1]) + content[1:]
    process.net.send(link, process, "blob_answer", piece_head(ask.start) + content, talk)
