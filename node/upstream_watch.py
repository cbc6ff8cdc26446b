"""Keeps an eye on a server behind this node: what it is, whether it can be asked, how much it takes.

Rules: shell of node/upstream_health.py, which says when to look and what a look means, and of node/upstream_look.py,
which asks. A server that does one thing at a time is asked what it is only when it comes back, and then no request of
ours is there: the look takes their place.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import trio

from node.errors import ConfigError
from node.upstream_answer import REFUSED_KEY
from node.upstream_facts import Unfit
from node.upstream_health import Health, Room, State
from node.upstream_http import Answered, Server, Trouble, Unreached
from node.upstream_look import TRY_LATER, Identity, identified, load, look
from node.upstream_stream import Garbled

_log = logging.getLogger("node.upstream")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamConfig:
    """model, embedding_model: names there; None: the only one, none of its own. slots None: as the server says."""

    model: str | None = None
    embedding_model: str | None = None
    slots: int | None = None


class Watch:
    """The looks at one server, and what they told. `on_look` is called (sync) after each."""

    def __init__(self, server: Server, config: UpstreamConfig, peer: str, on_look: Callable[[], None]) -> None:
        self.server = server
        self.health = Health()
        self.room = Room(config.slots)
        self.places = trio.CapacityLimiter(self.room.slots)
        self.identity: Identity | None = None
        self._config = config
        self._peer = peer
        self._on_look = on_look
        self._steps_seen = 0  # of the room, at the last look
        self._wake = trio.Event()

    @property
    def found(self) -> Identity:
        """What the server is."""
        assert self.identity is not None, "used before it was found"
        return self.identity

    def look_soon(self) -> None:
        """Something happened that a look may explain."""
        self._wake.set()

    async def find(self) -> None:
        """Wait for the server, as long as it takes. Raises ConfigError when it cannot be used as it is set."""
        base = self.server.base
        while self.identity is None:
            began = trio.current_time()
            try:
                self.identity = await self._identify()
            except Unfit as exc:
                raise ConfigError(f"the server at {base} cannot stand behind this node: {exc}") from exc
            except (Trouble, Garbled) as exc:
                if isinstance(exc, Answered) and exc.status < 500 and exc.status not in TRY_LATER:
                    said = REFUSED_KEY if exc.status in (401, 403) else f"it answers {exc}; is this its address?"
                    raise ConfigError(f"the server at {base} cannot stand behind this node: {said}") from exc
                self._note(exc)
                _log.warning("waiting for the server at %s: %s", base, exc)
                await trio.sleep_until(self.health.look_at(began, trio.current_time(), is_busy=False))
        self.health.answered(trio.current_time())

    async def _identify(self) -> Identity:
        """What the server is now; what its models can do is tried once for each. Raises Trouble, Garbled, Unfit."""
        config, before = self._config, self.identity
        main, vectors = await look(self.server, config.model, config.embedding_model, self._peer)
        has_answered = self.health.state in (State.UP, State.FULL)  # else it may be another version now
        if before is not None and has_answered and before.is_same(main, vectors):
            identity = before.at(main)
        else:
            identity = await identified(self.server, main, vectors)
        self.room.of(identity.main)
        self.places.total_tokens = self.room.slots
        return identity

    async def run(self) -> None:
        """Look now and then."""
        looked, was_up = -math.inf, False
        while True:
            is_busy = self.places.borrowed_tokens > 0
            with trio.move_on_at(self.health.look_at(looked, trio.current_time(), is_busy=is_busy)):
                await self._wake.wait()
                self._wake = trio.Event()
                continue
            looked = trio.current_time()
            is_alone = self.found.main.dialect.is_alone
            await self._look(is_whole=not (is_busy or is_alone) or not self.health.is_up)
            is_up = self.health.is_up
            if is_up != was_up:
                _log.log(
                    logging.INFO if is_up else logging.WARNING,
                    "the server at %s %s",
                    self.server.base,
                    "answers" if is_up else f"is {self.health.state.value}: {self.health.why}",
                )
            was_up = is_up
            self._on_look()

    async def _look(self, *, is_whole: bool) -> None:
        """Ask how it is, and, when is_whole, what it is."""
        steps, self._steps_seen = self._steps_seen, self.room.steps
        try:
            async with self.places if is_whole and self.found.main.dialect.is_alone else nullcontext():
                if is_whole:
                    self.identity = await self._identify()
                own = self.places.borrowed_tokens
                self.room.told(await load(self.server, self.found.main), own)
            self.health.answered(trio.current_time())
        except (Trouble, Garbled, Unfit) as exc:
            is_silent = isinstance(exc, Unreached) and not exc.is_gone
            if not is_silent or self.room.steps == steps:  # answers that flow say more than a look that does not
                self._note(exc)

    def _note(self, trouble: Trouble | Garbled | Unfit) -> None:
        """A look failed."""
        health, now = self.health, trio.current_time()
        if isinstance(trouble, Answered) and trouble.status in (401, 403):
            health.refused(REFUSED_KEY, now)
        elif isinstance(trouble, Unfit):
            health.failed("unfit", str(trouble), now, is_gone=True)
        elif isinstance(trouble, Unreached):
            health.failed("unreached", str(trouble), now, is_gone=trouble.is_gone)
        else:
            health.failed("look", str(trouble), now, is_gone=False)
