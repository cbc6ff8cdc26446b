"""One run at this node, from its text and weights to its last round: reads, trains, keeps members near, saves.

Rules: a shell. Own work is one micro-batch a loan of the engine's thread. A round that is over meanwhile, or that the
others wait to end, is not trained any further: what was done counts in it, or is carried into the next. While training
is paused, each round that others work in is sat out, and said so, that nobody waits. Moments and what was not sent are
saved now and then and at the end: a kill costs them, never a round that was committed.
Source: TRAINING.md 1, 3, 6.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import trio

from crypto.digest import Digest, digest
from crypto.disk import write_whole
from crypto.identity import PeerId
from gossip.errors import CannotStore
from gossip.round_service import RoundService, Work
from gossip.round_state import Chain
from gossip.transfer import manifest_of
from model.errors import BadState, ModelError
from model.train_state import SavedState
from node.hosting import Hosting
from node.training_pause import PausePolicy
from node.training_weights import Weights

MOMENTS, NUMBERS, UNSENT = "moments.safetensors", "moments.state", "unsent.safetensors"
SAVE_EVERY_S = 300.0
SAVE_S_MAX = 20.0  # at the end
LEAVE_S_MAX = 20.0  # for the others to hear that this member leaves
LOOK_S = 0.2
PROBATION_SHARE = 4  # of a round's steps: on probation work counts nothing, and nobody waits for who does it
NEAR_EVERY_S = 15.0
LOSS_WEIGHT = 0.1  # of the newest step in the loss that is told

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class SessionTold:
    """Where the work stands, for people. loss: of training, smoothed, nats a token."""

    doing: str = "starting"
    why: str = ""
    step: int = 0
    loss: float | None = None
    steps: int = 0  # since start
    tokens: int = 0
    skipped: int = 0
    late: int = 0  # rounds that were over before our work was


@dataclass(slots=True, kw_only=True)
class Wishes:
    """What the operator wants of this run."""

    policy: PausePolicy = field(default_factory=PausePolicy)
    is_paused: bool = False
    leaves: bool = False


class Session:
    """See the module. `run` it once."""

    def __init__(
        self,
        weights: Weights,
        service: RoundService,
        hosting: Hosting,
        wishes: Wishes,
        folder: Path,
        connect: Callable[[PeerId], Any],
    ) -> None:
        """connect: awaits a connection to a peer whose address is known, or raises P2PError."""
        self.weights, self.service, self.wishes = weights, service, wishes
        self._hosting, self._folder, self._connect = hosting, folder, connect
        self.told = SessionTold()
        self._saved_at = trio.current_time()

    async def run(self) -> None:
        """Take part until cancelled, or until this member has left and the round that says so is over.

        Raises ModelError, CannotStore: training here cannot go on.
        """
        await self._restore()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.weights.serve_newest)
                nursery.start_soon(self._keep_near)
                nursery.start_soon(self._work, nursery.cancel_scope)
                await self.service.run()
                nursery.cancel_scope.cancel()
        finally:
            with trio.move_on_after(SAVE_S_MAX, shield=True):
                await self._save()

    # ---- work ----

    async def _work(self, scope: trio.CancelScope) -> None:
        while True:
            self._says("waiting", "for the round to end" if self.told.steps else "for the run's records and weights")
            chain = await self.service.opened()
            self.weights.voters = tuple(map(str, chain.electors.voters))
            if self.wishes.leaves:
                await self.service.contribute(chain, None, leaves=True)
                await self._until_over(chain)
                return scope.cancel()
            if why := self._why_paused():
                await self._sit_out(chain, why)
                continue
            await self.weights.judge()
            await self._contribute(chain)
            if trio.current_time() - self._saved_at > SAVE_EVERY_S:
                await self._save()

    async def _contribute(self, chain: Chain) -> None:
        """Train, and say what came of it."""
        steps = await self._train(chain)
        weights, payloads = self.weights, self.service.history.payloads
        if not steps or not self.service.is_open(chain):
            self.told.late += 1
            return
        tokens, base = weights.tokens_of(steps), Digest(chain.base)
        async with weights.lock:
            if weights.round != chain.round:
                self.told.late += 1
                return
            raw = await trio.to_thread.run_sync(
                lambda: weights.participant.write(chain.round, base, steps=steps, tokens=tokens)
            )
        try:
            await trio.to_thread.run_sync(lambda: write_whole(payloads.own_path(chain.round), raw, over=True))
        except OSError as exc:
            raise CannotStore(f"the update cannot be written to {self._folder}: {exc.strerror}") from exc
        await weights.add_own(_blob_of(raw), raw, chain.round, base)
        if not await self.service.contribute(chain, Work(steps=steps, tokens=tokens)):
            self.told.late += 1

    async def _train(self, chain: Chain) -> int:
        """How many steps of this round were done here."""
        weights, plan = self.weights, self.weights.plan
        is_proven = chain.electors.is_proven(self.service.transport.peer_id)
        wanted = plan.steps if is_proven else max(1, plan.steps // PROBATION_SHARE)
        for step in range(wanted):
            self.told.step = step
            self._says("training")
            for _ in range(plan.accumulation):
                async with weights.lock:
                    if weights.round != chain.round or not self.service.is_open(chain):
                        return 0
                    done = await self._hosting.borrow(weights.participant.step)
                self._learnt(done.loss, done.tokens, skipped=done.skipped)
            self.told.steps += 1
            if step + 1 < wanted and (self.service.is_waited_for(chain) or self._why_paused()):
                return step + 1
        return wanted

    def _learnt(self, loss: float, tokens: int, *, skipped: bool) -> None:
        told = self.told
        told.tokens += tokens
        told.skipped += skipped
        told.loss = loss if told.loss is None else told.loss + LOSS_WEIGHT * (loss - told.loss)

    async def _sit_out(self, chain: Chain, why: str) -> None:
        """Say so as soon as somebody else has worked: a run in which everybody rests makes no rounds."""
        self._says("paused", why)
        await self._while(
            lambda: bool(self._why_paused()) and self.service.is_open(chain) and not self.service.has_others_work(chain)
        )
        if self._why_paused():
            await self.service.contribute(chain, None)

    async def _until_over(self, chain: Chain) -> None:
        self._says("leaving", "when the others have heard it")
        with trio.move_on_after(LEAVE_S_MAX):
            await self._while(lambda: self.service.is_open(chain))

    async def _while(self, is_so: Callable[[], bool]) -> None:
        """Look now and then: the operator, the clock and the battery tell nobody."""
        for _ in itertools.takewhile(lambda _: is_so(), itertools.repeat(None)):
            await trio.sleep(LOOK_S)

    def _why_paused(self) -> str:
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        plugged = None if battery is None else bool(battery.power_plugged)
        return self.wishes.policy.why(paused=self.wishes.is_paused, hour=time.localtime().tm_hour, plugged=plugged)

    def _says(self, doing: str, why: str = "") -> None:
        self.told.doing, self.told.why = doing, why

    # ---- members ----

    async def _keep_near(self) -> None:
        """Be connected to those who vote; whose address is not known is met through others."""
        while True:
            transport = self.service.transport
            far = set(self.service.history.chain.electors.voters) - transport.peers() - {transport.peer_id}
            for peer in sorted(far):
                await self._connect(peer)
            await trio.sleep(NEAR_EVERY_S)

    # ---- what outlives a restart ----

    async def _restore(self) -> None:
        """Moments and what was not sent, if they fit; without them training begins afresh from the round's weights."""
        try:
            await trio.to_thread.run_sync(self._read)
        except FileNotFoundError:
            return
        except (BadState, OSError) as exc:
            _log.warning("training goes on without what was saved of it: %s", exc)

    def _read(self) -> None:
        participant = self.weights.participant
        saved = SavedState(numbers=(self._folder / NUMBERS).read_bytes(), vectors=(self._folder / MOMENTS).read_bytes())
        theta_N = participant.trainer.start_vector_N
        participant.trainer.restore(saved)
        participant.trainer.rebase(theta_N)  # the run's weights, which may be newer than what was saved
        participant.restore_unsent((self._folder / UNSENT).read_bytes())

    async def _save(self) -> None:
        self._saved_at = trio.current_time()
        async with self.weights.lock:
            try:
                await trio.to_thread.run_sync(self._write)
            except (OSError, ModelError) as exc:
                _log.warning("the state of training cannot be saved: %s", exc)

    def _write(self) -> None:
        participant = self.weights.participant
        state = participant.trainer.state()
        for name, content in (
            (MOMENTS, state.vectors), (NUMBERS, state.numbers), (UNSENT, participant.unsent())
        ):  # fmt: skip
            write_whole(self._folder / name, content, over=True)


def _blob_of(raw: bytes) -> Digest:
    """The digest under which a payload is offered."""
    return digest(manifest_of(raw).encode())
