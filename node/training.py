"""Training at this node: the one run that it is in, from the operator's wish to the session that lives it.

Rules: a shell. Text is read and models are copied in threads, with what is done told all the while. A run that cannot
go on here (text, memory, numbers that are not finite, a disk) ends with one sentence in the status, and the node goes
on serving; the operator's next word begins it anew. What is asked over HTTP is checked before it is kept.
Source: TRAINING.md; INTERFACES.md (`train`, GET /api/v1/training).
"""

from __future__ import annotations

import logging
import random
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio
from msgspec import structs

from crypto.identity import Identity, PeerId
from gossip.blobs import Blobs
from gossip.errors import CannotStore, RemoteProtocolError
from gossip.round_door import RoundDoor
from gossip.round_history import RoundHistory, RunPlace
from gossip.round_payloads import Payloads
from gossip.round_service import RoundService
from gossip.round_store import RoundStore
from model.config import SEED_MAX
from model.data import Reading, TrainingText, find_texts, read_texts
from model.errors import BadText, ModelError
from model.load import Loaded
from node.backend import Backend
from node.errors import BadRequest, NotReady
from node.facts import Merged
from node.hosting import Hosting
from node.inference import Inference
from node.training_build import CannotTrain, Own, ledger_of, participant_of, planned
from node.training_kept import keep_run
from node.training_merges import Merges
from node.training_pause import PausePolicy
from node.training_plan import Plan, fault_of, plan_of
from node.training_session import Session, Wishes
from node.training_told import told_run
from node.training_weights import Weights
from node.training_wish import Begin, Join, Privacy, Wish, Wished, absolute
from p2p.errors import P2PError
from p2p.peering import Peering
from p2p.transport import Transport

SEEK_EVERY_S: Final = 3.0
ANSWER_S_MAX: Final = 5.0  # for peers to say which run they are in
READY_EVERY_S: Final = 0.5
PAYLOADS_KEPT: Final = (2, 64)  # rounds, at least and at most

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingParts:
    """What training needs of the node. folder: everything of it on disk."""

    identity: Identity
    network: str
    transport: Transport
    peering: Peering
    inference: Inference
    blobs: Blobs
    door: RoundDoor
    folder: Path
    policy: PausePolicy


class Training:
    """See the module. `run` it once; the other methods are the operator's."""

    def __init__(self, parts: TrainingParts, wish: Wish | None) -> None:
        """wish: what the node was started with; None: what was wanted before."""
        self._parts = parts
        self._wished = Wished(parts.folder / "wish.state")
        self._wish = _renewed(wish, self._wished.read())
        self._wishes = Wishes(policy=parts.policy, is_paused=self._wish is not None and self._wish.paused)
        self._session: Session | None = None
        self._scope: trio.CancelScope | None = None
        self._changed = trio.Event()
        self._doing, self._why, self._problem = "idle", "", ""
        self._merges = Merges()

    # ---- the operator's ----

    async def begin(self, asked: Begin) -> dict[str, Any]:
        """Begin a run, with this node as a founder. Raises BadRequest, NotReady."""
        self._check_idle()
        hosting = self._hosting()
        data = await self._checked(asked.data)
        own, network = self._parts.identity.peer_id, self._parts.network
        try:
            plan = await trio.to_thread.run_sync(planned, asked, _loaded(hosting), own, network)
            if fault := fault_of(plan):
                raise BadRequest(f"such a run cannot be: {fault}")
            plan_of(plan.raw)  # what every other member will find of it
        except (ModelError, CannotTrain, RemoteProtocolError) as exc:
            raise BadRequest(f"such a run cannot be: {exc}") from exc
        await self._want(Wish(run=plan.id.hex(), data=data, seed=_seed(), plan=plan.raw, privacy=asked.privacy))
        return {**self.status(), "name": plan.name, "id": plan.id.hex()}

    async def join(self, asked: Join) -> dict[str, Any]:
        """Join a run that a peer is in. Raises BadRequest."""
        self._check_idle()
        data = await self._checked(asked.data)
        fresh = Wish(run=asked.run, data=data, seed=_seed(), privacy=asked.privacy)
        again = _renewed(fresh, self._wish)  # it may have stopped here
        await self._want(structs.replace(again or fresh, paused=False))
        return self.status()

    async def pause(self, *, is_paused: bool) -> dict[str, Any]:
        """Train no more until told to, or again. Raises BadRequest."""
        if self._wish is None:
            raise BadRequest("this node is in no run: `python -m node train start` or `join`")
        self._wish = structs.replace(self._wish, paused=is_paused)
        await trio.to_thread.run_sync(self._wished.write, self._wish)
        self._wishes.is_paused = is_paused
        if self._problem and not is_paused:
            self._tell_changed()  # it begins anew
        return self.status()

    async def leave(self) -> dict[str, Any]:
        """Leave the run, and tell the others. The weights that serve stay until the node ends. Raises BadRequest."""
        if self._wish is None:
            raise BadRequest("this node is in no run")
        self._wish, self._problem = None, ""
        await trio.to_thread.run_sync(self._wished.write, None)
        self._wishes.leaves = self._session is not None
        if self._session is None and self._scope is not None:
            self._scope.cancel()  # it has not begun: there is nobody to tell
        self._tell_changed()
        return self.status()

    def status(self) -> dict[str, Any]:
        """JSON for GET /api/v1/training."""
        session = self._session
        told: dict[str, Any] = {
            "state": self.doing,
            "why": (session.service.history.trouble or session.why) if session is not None else self._why,
            "problem": self._problem or self._wished.file.status().problem,
            "paused": self._wishes.is_paused,
            "wanted": None if self._wish is None else {"run": _name(self._wish), "data": list(self._wish.data)},
            "run": None,
        }
        if session is not None:
            told |= told_run(session, self._parts.door.drops)
        return told

    @property
    def doing(self) -> str:
        """In a word."""
        return self._doing if self._session is None else self._session.doing

    def merged(self, *, is_last: bool = False) -> list[Merged]:
        """Rounds that changed the model here since the last call. is_last: there is no later one."""
        return [] if self._session is None else self._merges.since(self._session.weights, is_last=is_last)

    # ---- the life of it ----

    async def run(self) -> None:
        """For as long as the node lives."""
        while True:
            changed = self._changed
            if self._wish is None:
                self._says("idle", "")
                await changed.wait()
                continue
            self._problem, self._wishes.leaves = "", False
            with trio.CancelScope() as self._scope:
                try:
                    await self._live(self._wish)
                    if self._wish is not None:
                        self._fail("the run is over: all its members have left")
                except* (ModelError, CannotStore, CannotTrain) as group:
                    self._fail(str(_leaves(group)[0]))
            self._session = self._scope = None
            if self._problem and not changed.is_set():
                self._says("stopped", "")
                await changed.wait()

    def _fail(self, why: str) -> None:
        self._problem = why
        _log.error("training ends here: %s", why)

    async def _live(self, wish: Wish) -> None:
        """Raises ModelError, CannotStore, CannotTrain."""
        parts = self._parts
        hosting = await self._hosted()
        loaded = _loaded(hosting)
        plan = _kept_plan(wish) or await self._sought(wish)
        if self._wish is not None and self._wish.plan is None:  # it may have been paused meanwhile
            self._wish = structs.replace(self._wish, plan=plan.raw)
            await trio.to_thread.run_sync(self._wished.write, self._wish)
        if plan.network != parts.network:
            raise CannotTrain(f"run {plan.name} is of network {plan.network}, this node is in {parts.network}")
        text = await self._read(wish, loaded)
        self._says("preparing", "the model is copied")
        ledger = None if wish.privacy is None else ledger_of(parts.folder, text)
        own = Own(peer=parts.identity.peer_id, seed=wish.seed, privacy=wish.privacy, ledger=ledger)
        participant = await trio.to_thread.run_sync(participant_of, plan, loaded, text, own)
        folder = parts.folder / plan.id.hex()[:16]
        weights = Weights(participant, plan, hosting, parts.identity.peer_id, folder)
        store = await trio.to_thread.run_sync(RoundStore, folder, parts.network)
        try:
            await trio.to_thread.run_sync(keep_run, folder, plan, loaded.found)
            service = self._service(plan, weights, store, folder)
            manifests = service.history.manifests
            await weights.restore(
                store.count,
                lambda number: manifests(number - 1, 1)[0].next_base if number else plan.genesis.base,
                lambda number: manifests(number, 1)[0].root if number < store.count else None,
            )
            self._session = Session(weights, service, hosting, self._wishes, folder, self._connect)
            await self._session.run()
        finally:
            store.close()

    def _service(self, plan: Plan, weights: Weights, store: RoundStore, folder: Path) -> RoundService:
        parts, door = self._parts, self._parts.door
        place = RunPlace(
            identity=parts.identity,
            transport=parts.transport,
            network=parts.network,
            door=door,
            genesis=plan.genesis,
            plan=plan.raw,
            members=frozenset(map(PeerId, plan.members)),
        )
        least, most = PAYLOADS_KEPT
        kept = weights.state_bytes // (max(1, len(plan.founders)) * weights.payload_bytes_max)
        rounds = max(min(most, max(least, kept)), 2 * plan.named_every)
        payloads = Payloads(parts.blobs, folder, rounds, place.admits, states_kept=weights.states_offered)
        return RoundService(place, RoundHistory(place, weights, store, payloads), weights.choice)

    # ---- before it ----

    async def _hosted(self) -> Hosting:
        """Wait for the model. Raises CannotTrain."""
        self._says("waiting", "for the model to load")
        while self._parts.inference.hosting is None:  # noqa: ASYNC110  # the node tells readiness by its phase alone
            await trio.sleep(READY_EVERY_S)
        return _own(self._parts.inference.hosting)

    async def _sought(self, wish: Wish) -> Plan:
        """Ask peers until one is in the run. Raises CannotTrain when two runs fit."""
        self._says("seeking", f"no peer that is connected is in a run {wish.run!r} yet")
        while True:
            found = {plan.id: plan for plan in await self._plans() if plan.is_called(wish.run)}
            if len(found) > 1:
                ids = ", ".join(sorted(each.hex()[:16] for each in found))
                raise CannotTrain(f"there are {len(found)} runs {wish.run!r}: join one by its id ({ids})")
            if found:
                return next(iter(found.values()))
            await trio.sleep(SEEK_EVERY_S)

    async def _plans(self) -> list[Plan]:
        """Of all peers that answer soon."""
        found: list[Plan] = []

        async def ask(peer: PeerId) -> None:
            with suppress(P2PError, RemoteProtocolError):  # it is of an older kind, or busy
                found.extend([plan_of(raw) for raw in await self._parts.door.plans(peer)])

        with trio.move_on_after(ANSWER_S_MAX):
            async with trio.open_nursery() as nursery:
                for peer in self._parts.transport.peers():
                    nursery.start_soon(ask, peer)
        return found

    async def _read(self, wish: Wish, loaded: Loaded) -> TrainingText:
        """The operator's text as token ids. Raises BadText."""
        sources = await trio.to_thread.run_sync(find_texts, [Path(each) for each in wish.data])
        reading = read_texts(sources, loaded.tokens)

        def some() -> Reading | TrainingText:
            last: Reading | None = None
            try:
                for _ in range(20):
                    last = next(reading)
            except StopIteration as end:
                text: TrainingText = end.value
                return text
            assert last is not None
            return last

        while True:
            step = await trio.to_thread.run_sync(some)
            if isinstance(step, TrainingText):
                return step
            share = 100 * step.bytes_read // max(1, step.bytes_total)
            self._says("reading", f"{share} % of {step.files_total} files, {step.tokens:,} tokens")

    # ---- parts ----

    async def _checked(self, data: tuple[str, ...]) -> tuple[str, ...]:
        """Paths that have text. Raises BadRequest."""
        paths = absolute(data)
        try:
            await trio.to_thread.run_sync(find_texts, [Path(each) for each in paths])
        except BadText as exc:
            raise BadRequest(str(exc), param="data") from exc
        return paths

    def _check_idle(self) -> None:
        if self._wish is not None and not self._problem:
            raise BadRequest(f"this node is in run {_name(self._wish)} already: `python -m node train leave` first")
        if self._session is not None:
            raise NotReady("this node is leaving a run", retry_after_s=READY_EVERY_S)

    async def _want(self, wish: Wish) -> None:
        self._wish = wish
        await trio.to_thread.run_sync(self._wished.write, wish)
        self._wishes.is_paused = False
        self._tell_changed()

    def _hosting(self) -> Hosting:
        hosting = self._parts.inference.hosting
        if hosting is None:
            raise NotReady("this node hosts no model yet, and a run starts from one", retry_after_s=READY_EVERY_S)
        return _own(hosting)

    async def _connect(self, peer: PeerId) -> None:
        try:
            await self._parts.peering.connect(peer)
        except P2PError as exc:
            _log.debug("member %s is not near: %s", peer, exc)

    def _tell_changed(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _says(self, doing: str, why: str) -> None:
        self._doing, self._why = doing, why


def first_wish(run: str, data: tuple[Path, ...], epsilon: float | None) -> Wish:
    """What --train, --data and --train-epsilon say."""
    privacy = None if epsilon is None else Privacy(epsilon=epsilon)
    return Wish(run=run, data=absolute(tuple(map(str, data))), seed=_seed(), privacy=privacy)


def _renewed(wish: Wish | None, before: Wish | None) -> Wish | None:
    """The same run goes on with its plan and its order of rows, whatever text it gets now."""
    if wish is None or before is None:
        return wish or before
    with suppress(CannotTrain):
        plan = _kept_plan(before)
        if plan is not None and plan.is_called(wish.run):
            return structs.replace(before, data=wish.data, privacy=wish.privacy)
    return wish


def _kept_plan(wish: Wish) -> Plan | None:
    """The plan of a wish, if it is known. Raises CannotTrain: another version of this program kept it."""
    try:
        return None if wish.plan is None else plan_of(wish.plan)
    except RemoteProtocolError as exc:
        raise CannotTrain(f"the run that this node was in cannot be gone on with: {exc}; leave it") from exc


def _name(wish: Wish) -> str:
    """What people call the run."""
    with suppress(CannotTrain):
        plan = _kept_plan(wish)
        return wish.run if plan is None else plan.name
    return wish.run


def _seed() -> int:
    return random.Random(secrets.randbits(64)).randrange(SEED_MAX)


def _own(backend: Backend) -> Hosting:
    """The model in this process. Raises CannotTrain where a server behind the node answers."""
    if not isinstance(backend, Hosting):
        raise CannotTrain("a server behind this node answers, and its weights are not here to train")
    return backend


def _loaded(hosting: Hosting) -> Loaded:
    """The model of an engine. Raises CannotTrain for a kind that has none here."""
    loaded: object = getattr(hosting.runtime, "loaded", None)
    if not isinstance(loaded, Loaded):
        raise CannotTrain(f"{hosting.runtime.facts.name} is served by a backend that cannot train")
    return loaded


def _leaves(group: BaseExceptionGroup[Exception]) -> list[BaseException]:
    found = list[BaseException]()
    for each in group.exceptions:
        found += _leaves(each) if isinstance(each, BaseExceptionGroup) else [each]
    return found
