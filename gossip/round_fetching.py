"""The fetches of one session: payloads that others announced, each looked at by the owner.

Rules: a shell. A task each, at most one for a header, none for a round that is over. Each has a time, since a donor may
give just enough not to be dropped; what came stays for the next try. Whoever is no voter has few places, so that
strangers, who cost nothing, keep nobody's work from being heard. What everybody would refuse is refused and blamed.
Source: TRAINING.md 3 (1, 3), 4.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from crypto.digest import Digest
from crypto.identity import PeerId
from gossip.averaging import Averaging
from gossip.errors import CannotStore, RemoteProtocolError, TooLarge, Unavailable
from gossip.round_effects import Effect
from gossip.round_history import RoundHistory, RunPlace, Unsound
from gossip.round_state import OPEN
from gossip.rounds import Contribution, Header, Statement
from gossip.standing import Fault

STRANGERS_AT_ONCE = 2  # of blobs' places
FETCH_S_MIN, FETCH_BYTES_PER_S_MIN = 60.0, 1_000_000.0

_log = logging.getLogger(__name__)


class Fetching:
    """One session's. Make it inside trio."""

    def __init__(
        self, place: RunPlace, history: RoundHistory, averaging: Averaging, take: Callable[[list[Effect]], None]
    ) -> None:
        """take: is given what follows, in order."""
        self._place, self._history, self._averaging, self._take = place, history, averaging, take
        self._scopes: dict[Digest, trio.CancelScope] = {}
        self._strangers = trio.CapacityLimiter(STRANGERS_AT_ONCE)

    async def fetch(self, header: Statement, holders: tuple[PeerId, ...]) -> None:
        """Until it is held, or refused, or this try has failed; at once when there is one already."""
        averaging, body = self._averaging, header.body
        assert isinstance(body, Header)
        assert body.contribution is not None
        if header.id in self._scopes or averaging.phase not in OPEN or not averaging.chain.names(body):
            return
        is_stranger = not averaging.chain.electors.is_voter(header.sender)
        with trio.CancelScope() as scope:
            self._scopes[header.id] = scope
            try:
                if is_stranger:
                    async with self._strangers:
                        await self._look(header, body.contribution, holders)
                else:
                    await self._look(header, body.contribution, holders)
            finally:
                del self._scopes[header.id]

    def over(self) -> None:
        """The round is decided: what is still on its way is of no use, or is fetched by who changes the weights."""
        for scope in self._scopes.values():
            scope.cancel()

    async def _look(self, header: Statement, contribution: Contribution, holders: tuple[PeerId, ...]) -> None:
        history, averaging, number = self._history, self._averaging, header.body.round
        try:
            history.owner.check(header)
            try:
                with trio.fail_after(FETCH_S_MIN + contribution.payload_bytes / FETCH_BYTES_PER_S_MIN):
                    path = await history.payloads.get(
                        number, Digest(contribution.blob), holders, contribution.payload_bytes
                    )
            except trio.TooSlowError as exc:
                raise Unavailable(f"{header.sender}'s payload takes too long") from exc
            if (size := path.stat().st_size) != contribution.payload_bytes:
                raise Unsound(f"it has {size} bytes, {contribution.payload_bytes} were announced")
            score = await history.owner.examine(header, path)
        except (Unsound, TooLarge, RemoteProtocolError) as exc:
            history.counts["refused"] += 1
            self._place.blame(header.sender, Fault.MALFORMED, f"its payload of round {number} is refused: {exc}")
            self._take(averaging.refused(header.id, str(exc), trio.current_time()))
        except (Unavailable, CannotStore) as exc:  # it is asked for again
            history.counts["fetch_failed"] += 1
            _log.info("round %d: %s", number, exc)
        else:
            self._take(averaging.held(header.id, score, trio.current_time()))
