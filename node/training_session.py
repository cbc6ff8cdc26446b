"""One run at this node, from its text and weights to its last round: reads, trains, keeps members near, saves.

Rules: a shell. Own work is one micro-batch a loan of the engine's thread. A round that is over meanwhile, or that the
others wait to end, is not trained any further: what was done counts in it, or is carried into the next. When too many
are away for a round to end, this member trains ahead, up to a bound, for its next updates; what it announced stays.
While training is paused, each round that others work in is sat out, and said so, that nobody waits. Moments and what
was not sent are saved now and then and at the end: a kill costs them, never a round that was committed.
Source: TRAINING.md 1, 3, 6.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import trio

from crypto.digest import Digest
from crypto.disk import write_whole
from crypto.identity import PeerId
from gossip.errors import CannotStore
from gossip.round_service import RoundService, Work
from gossip.round_state import Chain
from gossip.transfer import manifest_of
from model.errors import BadState, BudgetSpent, ModelError
from model.train import MicroStep
from model.train_state import SavedState
from node.hosting import Hosting
from node.training_away import AHEAD_ROUNDS, Absence
from node.training_pause import LoadRoom, PausePolicy
from node.training_weights import Weights

MOMENTS, NUMBERS, UNSENT = "moments.safetensors", "moments.state", "unsent.safetensors"
SAVE_EVERY_S = 300.0
SAVE_S_MAX = 20.0  # at the end
LEAVE_S_MAX = 20.0  # for the others to hear that this member leaves
LOAN_S_MAX = 1.0  # for the engine's thread to be free, before others may work on the weights
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
    step: int = 0  # of the round, the one under way counted
    loss: float | None = None
    steps: int = 0  # since start
    tokens: int = 0
    skipped: int = 0
    late: int = 0  # rounds that were over before our work was
    ahead: int = 0  # steps in this round that its update has not got: they are for the next


@dataclass(slots=True, kw_only=True)
class Wishes:
    """What the operator wants of this run. load: what the load that the policy expects leaves room for."""

    policy: PausePolicy = field(default_factory=PausePolicy)
    is_paused: bool = False
    leaves: bool = False
    load: LoadRoom = field(default_factory=LoadRoom)


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
        self._done: tuple[bytes, Work] | None = None  # what was written, and after which history
        self._left = trio.Event()  # said, and the round in which it was is over
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
                nursery.start_soon(self._work)
                nursery.start_soon(self._leave_in_time, nursery.cancel_scope)
                await self.service.run()
                nursery.cancel_scope.cancel()
        finally:
            with trio.move_on_after(SAVE_S_MAX, shield=True):
                await self._save()

    @property
    def doing(self) -> str:
        """In a word."""
        return "leaving" if self.wishes.leaves else self.told.doing

    @property
    def why(self) -> str:
        """Of what it does now: a reason for people; '' when it needs none."""
        if self.doing == "leaving":
            return "until the others have heard it"
        if self.doing != "waiting":
            return self.told.why
        is_near = self.service.statistics() is not None
        return self.told.why or ("until the round ends" if is_near else "for the run's records and weights")

    # ---- work ----

    async def _work(self) -> None:
        while True:
            self._says("waiting")
            chain = await self._opened()
            self.told.ahead = 0
            self.weights.told.voters = tuple(map(str, chain.electors.voters))
            self.told.step = 0
            if self.wishes.leaves:
                await self.service.contribute(chain, None, leaves=True)
                await self._while(partial(self.service.is_open, chain))
                return self._left.set()
            if why := self._why_paused():
                await self._sit_out(chain, why)
                continue
            await self.weights.judge()
            await self._contribute(chain)
            await self._save_in_time()

    async def _opened(self) -> Chain:
        """Wait for a round to work in. Raises as `_train_ahead`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._train_ahead)
            chain = await self.service.opened()
            nursery.cancel_scope.cancel()
        self._says("waiting")
        return chain

    async def _train_ahead(self) -> None:
        """While the round cannot end: steps for the updates after this round's, AHEAD_ROUNDS of a round's at most.

        Not further: see node/training_away.py. Raises ModelError.
        """
        absence, steps_max = Absence(), AHEAD_ROUNDS * self.weights.plan.steps
        while not self.wishes.leaves:
            chain, transport, now_s = self.service.history.chain, self.service.transport, trio.current_time()
            absence.look(chain.electors, transport.peers() | {transport.peer_id}, now_s)
            is_open, why = self.service.is_open(chain), f"until others are back: {absence.why}"
            is_long = is_open and absence.is_long(now_s, self.weights.told.round_s_median)
            if not is_long or self.told.ahead >= steps_max or self._why_paused():
                self._says("waiting", why if is_open and absence.why else "")
                await trio.sleep(LOOK_S)
                continue
            self._says("training", f"ahead of the round {why}")
            try:
                self.told.ahead += await self._step(chain)
            except BudgetSpent as exc:  # what was announced may count yet, and needs this member's vote
                return self._says("waiting", f"{why}; {exc}")
            await self._save_in_time()

    async def _contribute(self, chain: Chain) -> None:
        """Train, unless that was done before in this round, and say what came of it."""
        is_done = self._done is not None and self._done[0] == chain.base and self.weights.participant.is_written
        if not is_done and not await self._write_update(chain, await self._train(chain)):
            self.told.late += not self.wishes.leaves
            return
        assert self._done is not None
        if not await self.service.contribute(chain, self._done[1]):
            self.told.late += 1
            await trio.sleep(LOOK_S)

    async def _write_update(self, chain: Chain, steps: int) -> bool:
        """False: nothing was trained, or the round is over. Raises CannotStore, ComputeFailed."""
        weights, payloads = self.weights, self.service.history.payloads
        tokens, base = weights.tokens_of(steps), Digest(chain.base)
        async with weights.lock:
            if not steps or weights.round != chain.round or not self.service.is_open(chain):
                return False
            raw = await trio.to_thread.run_sync(
                lambda: weights.participant.write(chain.round, base, steps=steps, tokens=tokens)
            )
            written = await trio.to_thread.run_sync(lambda: weights.participant.own(steps=steps, tokens=tokens))
        try:
            await trio.to_thread.run_sync(lambda: write_whole(payloads.own_path(chain.round), raw, over=True))
        except OSError as exc:
            raise CannotStore(f"the update cannot be written to {self._folder}: {exc.strerror}") from exc
        made_of = await trio.to_thread.run_sync(manifest_of, raw)
        await weights.add_own(made_of.blob, chain.round, written)
        self._done = chain.base, Work(steps=steps, tokens=tokens, made_of=made_of)
        return True

    async def _train(self, chain: Chain) -> int:
        """How many steps of this round were done here."""
        plan = self.weights.plan
        is_proven = chain.electors.is_proven(self.service.transport.peer_id)
        wanted = plan.steps if is_proven else max(1, plan.steps // PROBATION_SHARE)
        for step in range(wanted):
            self.told.step = step + 1
            self._says("training")
            if not await self._step(chain):
                return 0
            if step + 1 < wanted and (self.service.is_waited_for(chain) or self._why_paused()):
                return step + 1
        return wanted

    async def _step(self, chain: Chain) -> bool:
        """One of the optimiser, a skipped one too. False: the round is over, or this member leaves."""
        is_over = False
        while not is_over:  # a private step has as many micro-batches as its draw of rows needs
            done = await self._micro_step(chain)
            if done is None:
                return False
            is_over = done.stepped or done.skipped
            self._learnt(done.loss, done.tokens, skipped=done.skipped)
        self.told.steps += 1
        return True

    async def _micro_step(self, chain: Chain) -> MicroStep | None:
        """None: the round is over, or this member leaves. However long requests run, a round is never held up."""
        weights, done = self.weights, list[MicroStep]()
        while not done:
            async with weights.lock:
                if weights.round != chain.round or not self.service.is_open(chain) or self.wishes.leaves:
                    return None
                with trio.move_on_after(LOAN_S_MAX):
                    await self._hosting.borrow(lambda: done.append(weights.participant.step()))
        return done[0]

    def _learnt(self, loss: float, tokens: int, *, skipped: bool) -> None:
        told = self.told
        told.tokens += tokens
        told.skipped += skipped
        if self.weights.is_private or not math.isfinite(loss):
            return  # it is computed from the text without noise, and the status is read by others
        told.loss = loss if told.loss is None else told.loss + LOSS_WEIGHT * (loss - told.loss)

    async def _sit_out(self, chain: Chain, why: str) -> None:
        """Say so as soon as somebody else has worked: a run in which everybody rests makes no rounds."""
        self._says("paused", why)
        await self._while(
            lambda: (
                bool(self._why_paused())
                and not self.wishes.leaves
                and self.service.is_open(chain)
                and not self.service.has_others_work(chain)
            )
        )
        if self._why_paused() and not self.wishes.leaves:
            await self.service.contribute(chain, None)

    async def _leave_in_time(self, scope: trio.CancelScope) -> None:
        """The end of a session that is to end: when the others have heard it, or there is nobody to hear it."""
        await self._while(lambda: not self.wishes.leaves)
        with trio.move_on_after(LEAVE_S_MAX):
            await self._left.wait()
        scope.cancel()

    async def _while(self, is_so: Callable[[], bool]) -> None:
        """Look now and then: the operator, the clock and the battery tell nobody."""
        for _ in itertools.takewhile(lambda _: is_so(), itertools.repeat(None)):
            await trio.sleep(LOOK_S)

    def _why_paused(self) -> str:
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        plugged = None if battery is None else bool(battery.power_plugged)
        wishes = self.wishes
        load = wishes.load.why(wishes.policy.expects(), trio.current_time())
        return wishes.policy.why(paused=wishes.is_paused, hour=time.localtime().tm_hour, plugged=plugged, load=load)

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
        """Moments, and what was not sent, each if it fits; without them training begins afresh from the round's
        weights."""
        for read in (self._read_moments, self._read_unsent):
            try:
                await trio.to_thread.run_sync(read)
            except FileNotFoundError:
                continue
            except (BadState, OSError) as exc:
                _log.warning("training goes on without what was saved of it: %s", exc)

    def _read_moments(self) -> None:
        trainer = self.weights.participant.trainer
        saved = SavedState(numbers=(self._folder / NUMBERS).read_bytes(), vectors=(self._folder / MOMENTS).read_bytes())
        theta_N = trainer.start_vector_N
        trainer.restore(saved)
        trainer.rebase(theta_N)  # the run's weights, which may be newer than what was saved

    def _read_unsent(self) -> None:
        self.weights.participant.restore_unsent((self._folder / UNSENT).read_bytes())

    async def _save_in_time(self) -> None:
        if trio.current_time() - self._saved_at > SAVE_EVERY_S:
            await self._save()

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
