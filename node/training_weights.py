"""A run's weights at this node: what came is looked at, committed rounds change them, the engine goes on under them.

Rules: implements gossip.round_history.Owner. Torch works in the engine's thread only while no request runs (each row of
a score is a loan of its own), and in a thread of its own for what touches the flat vector alone; one lock keeps
training, looking and changing apart. A state is a file that is whole or absent; the newest that fits is where a restart
begins. The engine is switched by a task of its own, since it waits for requests and a round does not.
Source: TRAINING.md 3 (8), 4, 6.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import trio

from crypto.digest import Digest
from crypto.disk import write_whole
from crypto.identity import PeerId
from gossip.errors import CannotStore
from gossip.round_history import Unsound
from gossip.rounds import Contribution, Header, Manifest, Statement
from gossip.transfer import Manifest as Made
from gossip.transfer import manifest_of
from model.errors import BadState, BadUpdate, Diverged
from model.gate import Run
from model.participant import Line, Participant, Payload, Settled
from model.private import PrivateTrainer
from model.scores import Scores
from node.hosting import Hosting
from node.training_choice import Choice
from node.training_kept import STATE, states_in
from node.training_plan import Plan
from node.training_round import RoundTold

STATES_BYTES_MAX = 256 << 20  # of those that are offered to who joins, if these are more than STATES_OFFERED[0]
STATES_OFFERED = (2, 8)  # at least and at most
SCORED_ROWS = 16
BUSY_S_MAX = 10.0  # in a round, for the engine's thread to be free; then this node has no scores to give in it
ROUNDS_TOLD = 200

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(slots=True, kw_only=True)
class WeightsTold:
    """What was found and done since start, for people."""

    rounds: deque[RoundTold] = field(default_factory=lambda: deque(maxlen=ROUNDS_TOLD))
    refused: dict[str, str] = field(default_factory=dict)  # peer -> why its payload was refused when it last was
    held_out_loss: float | None = None  # of the weights before the round to come
    revision: str = ""
    busy_s: float = 0.0  # for how long looks in this round have waited for the engine
    root: str = ""  # of the same weights, hex; '' for those that are not named
    own_norm: float | None = None  # of this node's last update
    voters: tuple[str, ...] = ()  # as the round began, to say who was missing; the session keeps it

    @property
    def round_s_median(self) -> float | None:
        """Of the rounds that were seen from begin to end; None: of none."""
        seconds = sorted(each.seconds for each in self.rounds if each.seconds > 0)
        return seconds[len(seconds) // 2] if seconds else None


class Weights:
    """One run's. `lock` is held by whoever touches the participant."""

    def __init__(self, participant: Participant, plan: Plan, hosting: Hosting, own: PeerId, folder: Path) -> None:
        self.participant, self.plan = participant, plan
        run = Run(elements=participant.layout.size, sparse=participant.course.codec.name.startswith("ef"))
        self.choice = Choice(run)
        self.lock = trio.Lock()
        self.told = WeightsTold()
        self.round = 0
        self._hosting, self._own, self._folder = hosting, own, folder
        self._payloads: dict[Digest, Payload] = {}  # by blob, of the round that is open
        self._scores = Scores()
        self._made_of: Made | None = None  # the file of the weights before this round, if they have one
        self._began_s = trio.current_time()
        self._newest: tuple[str, Mapping[str, object]] = ("", {})  # what the engine should go on under
        self._changed = trio.Event()

    # ---- see node.training_merges.Rounds ----

    @property
    def run(self) -> str:
        """Its id, hex."""
        return self.plan.id.hex()

    @property
    def rounds(self) -> Iterable[RoundTold]:
        """The newest, oldest first."""
        return self.told.rounds

    # ---- see gossip.round_history.Owner ----

    @property
    def state(self) -> tuple[Path, Made] | None:
        """The weights before this round as they lie on the disk."""
        return None if self._made_of is None else (self._folder / f"{STATE}{self.round}", self._made_of)

    def state_files(self) -> list[tuple[int, Path]]:
        """Weights of before that are on the disk, as many of the newest as are offered; the oldest first."""
        numbers = sorted(number for number in states_in(self._folder) if number)
        return [(number, self._folder / f"{STATE}{number}") for number in numbers[-self.states_offered :]]

    @property
    def state_bytes(self) -> int:
        """Of a state."""
        return self.participant.state_bytes

    @property
    def states_offered(self) -> int:
        """How many states are kept for who joins, beside the one that is worked on."""
        least, most = STATES_OFFERED
        return min(most, max(least, STATES_BYTES_MAX // self.state_bytes))

    @property
    def payload_bytes_max(self) -> int:
        """Of an update."""
        return self.participant.payload_bytes_max

    def check(self, header: Statement) -> None:
        """Raises Unsound for numbers that no member of this run can have."""
        contribution, plan = _contribution(header), self.plan
        size_max, tokens_max = self.payload_bytes_max, self.tokens_of(plan.steps)
        if contribution.payload_bytes > size_max:
            self._refuse(header, f"a payload of {contribution.payload_bytes:,} bytes, an update has {size_max:,}")
        if contribution.steps > plan.steps or contribution.tokens > tokens_max:
            self._refuse(
                header,
                f"it claims {contribution.steps:,} steps and {contribution.tokens:,} tokens, a round has at most "
                f"{plan.steps:,} and {tokens_max:,}",
            )

    async def examine(self, header: Statement, payload: Path) -> int | None:
        """Its score by this node's own held-out text. Raises Unsound, CannotStore."""
        contribution, body = _contribution(header), header.body
        try:
            raw = await _in_thread(payload.read_bytes)
        except OSError as exc:
            raise CannotStore(f"{payload} cannot be read: {exc.strerror}") from exc
        base = Digest(body.base)
        try:
            found = await _in_thread(self.participant.read, raw, body.round, base, str(header.sender))
        except BadUpdate as exc:
            self._refuse(header, str(exc))
        if (found.steps, found.tokens) != (contribution.steps, contribution.tokens):
            self._refuse(
                header,
                f"the header says {contribution.steps:,} steps and {contribution.tokens:,} tokens, the update "
                f"{found.steps:,} and {found.tokens:,}",
            )
        await self._note(body.round, Digest(contribution.blob), found)
        return None if header.sender == self._own else await self._score(str(header.sender), found, body.round)

    async def apply(self, manifest: Manifest, payloads: Mapping[Digest, Path]) -> None:
        """Change the weights by a committed round; they are on the disk when this returns. Raises CannotStore."""
        async with self.lock:
            lines = []
            for share in manifest.shares:
                if share.blob is not None and share.weight:
                    payload = await self._payload_of(manifest, share.peer, Digest(share.blob), payloads)
                    lines.append(Line(payload=payload, weight_parts=share.weight, clip_parts=share.clip))
            took_ours = any(share.peer == self._own and share.weight > 0 for share in manifest.shares)
            settled = await _in_thread(partial(self.participant.settle, lines, took_ours=took_ours))
            held_out_before = self.told.held_out_loss
            await self._begin(manifest.round + 1, manifest.next_base)
        self._tell(manifest, settled, held_out_before)

    async def adopt(self, manifest: Manifest, state: Path, *, passed: Manifest | None) -> None:
        """Take over the weights before a committed round. Raises Unsound, CannotStore."""
        shares = [] if passed is None else [share for share in passed.shares if share.weight > 0]
        took_ours = any(share.peer == self._own for share in shares) and self.participant.makes_update(len(shares))
        async with self.lock:
            try:
                await _in_thread(lambda: self.participant.adopt(state.read_bytes(), took_ours=took_ours))
            except (BadState, OSError) as exc:
                raise Unsound(str(exc)) from exc
            await self._begin(manifest.round, manifest.base)

    # ---- for the session ----

    @property
    def round_s(self) -> float:
        """How long this round has lasted here."""
        return trio.current_time() - self._began_s

    def tokens_of(self, steps: int) -> int:
        """How many tokens so many steps are."""
        return steps * self.plan.accumulation * self.plan.rows * self.plan.context

    async def restore(
        self, records: int, base_of: Callable[[int], bytes], root_of: Callable[[int], bytes | None] = lambda _: None
    ) -> None:
        """Begin where the newest state of at most so many rounds ends; there may be none. root_of: what a quorum has
        named the weights before a round, if it has. Raises CannotStore."""
        for number in sorted(states_in(self._folder), reverse=True):
            if 0 < number <= records:
                try:
                    raw = await _in_thread((self._folder / f"{STATE}{number}").read_bytes)
                    if (root := root_of(number)) not in (None, (found := (await _in_thread(manifest_of, raw)).blob)):
                        raise BadState(f"their name is {found.hex()[:16]}, a quorum named {Digest(root).hex()[:16]}")
                    await _in_thread(self.participant.adopt, raw)
                except (BadState, OSError) as exc:
                    _log.warning("the weights of round %d cannot be used: %s", number, exc)
                    continue
                return await self._begin(number, base_of(number), is_written=True)
        await self._begin(0, base_of(0))

    async def add_own(self, blob: Digest, number: int, written: Payload) -> None:
        """Own update, about to be announced; the round may be over by then."""
        self.told.own_norm = written.norm
        await self._note(number, blob, written)

    async def judge(self) -> None:
        """The held-out loss of the weights before this round, once."""
        if self.told.held_out_loss is None and not self.is_private:
            rows = self.participant.trainer.held_out(SCORED_ROWS)
            self.told.held_out_loss = loss = await self._lent(self.participant.judge(rows))
            if loss is not None and self.told.rounds and self.told.rounds[-1].round == self.round - 1:
                self.told.rounds[-1] = replace(self.told.rounds[-1], held_out_loss=loss)

    async def serve_newest(self) -> None:
        """Have the engine go on under the newest weights, as soon as requests let it, for ever. Raises ModelError."""
        while True:
            changed, (revision, weights) = self._changed, self._newest
            if revision and revision != self._hosting.runtime.facts.weights_revision:
                await self._hosting.switch(weights, revision)
                _log.info("serving %s at revision %s", self._hosting.runtime.facts.name, revision)
            else:
                await changed.wait()

    # ---- parts ----

    async def _note(self, number: int, blob: Digest, payload: Payload) -> None:
        """Compared with each that is here, also those that came while it was: no pair may be missing."""
        overlaps: dict[Digest, float] = {}
        while number == self.round:
            others = [each for each in self._payloads if each != blob and each not in overlaps]
            if not others:
                self._payloads[blob] = payload
                return self.choice.note(blob, payload.norm, overlaps)
            there = [self._payloads[each] for each in others]
            overlaps |= zip(others, await _in_thread(self.participant.overlaps, payload, there), strict=True)

    @property
    def is_private(self) -> bool:
        """Whether nothing may be told that is computed from this node's text without noise: scores, losses."""
        return isinstance(self.participant.trainer, PrivateTrainer)

    async def _score(self, peer: str, payload: Payload, number: int) -> int | None:
        if self.is_private:
            return None
        try:
            fall = await self._lent(self._scoring(payload, number))
        except Diverged as exc:
            _log.warning("round %d: %s", number, exc)
            return None
        return None if fall is None else self._scores.note(peer, number, fall)

    def _scoring(self, payload: Payload, number: int) -> Generator[None, None, float | None]:
        """In the engine's thread, under the lock: the round may be over by then, and its weights gone."""
        if number != self.round:
            return None
        rows = self.participant.trainer.held_out(SCORED_ROWS)
        norm_max = self.told.own_norm or math.inf  # what is far longer is cut by the merge, so it is judged cut
        return (yield from self.participant.score(payload, rows, self.told.held_out_loss, norm_max))

    async def _lent(self, work: Generator[None, None, _T]) -> _T | None:
        """All of it, a hop at a time in the engine's thread; None when requests leave it no room in this round."""
        ended: list[_T] = []

        def hop() -> None:
            began_s = time.perf_counter()
            try:
                next(work)
            except StopIteration as end:
                ended.append(end.value)
            finally:
                self.told.busy_s -= time.perf_counter() - began_s  # it is work, and no waiting

        async with self.lock:
            try:
                while not ended and self.told.busy_s < BUSY_S_MAX:
                    began_s = trio.current_time()
                    with trio.move_on_after(BUSY_S_MAX - self.told.busy_s):
                        await self._hosting.borrow(hop)
                    self.told.busy_s += trio.current_time() - began_s
            finally:
                with trio.CancelScope(shield=True):
                    await _in_thread(work.close)  # gives the weights back
        return ended[0] if ended else None

    async def _payload_of(self, manifest: Manifest, peer: str, blob: Digest, paths: Mapping[Digest, Path]) -> Payload:
        known = self._payloads.get(blob)
        if known is not None and manifest.round == self.round:
            return known
        try:
            raw = await _in_thread(paths[blob].read_bytes)
            return await _in_thread(self.participant.read, raw, manifest.round, Digest(manifest.base), peer)
        except (OSError, BadUpdate) as exc:
            raise CannotStore(f"the committed payload of {peer} cannot be used: {exc}") from exc

    async def _begin(self, number: int, base: bytes, *, is_written: bool = False) -> None:
        """The weights are those before this round. Raises CannotStore."""
        is_named = is_written or number % self.plan.named_every == 0
        try:
            self._made_of = await _in_thread(self._write, number, is_written) if is_named else None
        except OSError as exc:
            raise CannotStore(f"the weights cannot be kept in {self._folder}: {exc.strerror}") from exc
        self.round = number
        self.told.root = self._made_of.blob.hex() if self._made_of is not None else ""
        self._payloads.clear()
        self.choice.forget()
        self.told.busy_s = 0.0
        self.told.held_out_loss = None
        self.told.revision = self.plan.revision_at(number, base) if number else self.plan.revision
        self._newest = self.told.revision, self.participant.weights()
        self._changed.set()
        self._changed = trio.Event()

    def _write(self, number: int, is_written: bool) -> Made:
        """What the weights' file is made of. Raises OSError."""
        state = self.participant.state()
        made_of = manifest_of(state)
        if is_written:
            return made_of
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(self._folder / f"{STATE}{number}", state, over=True)
        states = sorted(states_in(self._folder))
        kept = [each for each in states if each <= number][
            -self.states_offered - 1 :
        ]  # what is of later rounds has no records
        for old in states:
            if old not in kept:
                (self._folder / f"{STATE}{old}").unlink(missing_ok=True)
        return made_of

    def _refuse(self, header: Statement, reason: str) -> NoReturn:
        self.told.refused[str(header.sender)] = reason
        raise Unsound(reason)

    def _tell(self, manifest: Manifest, settled: Settled, held_out_before: float | None) -> None:
        verdicts = {each.peer: each for each in self.choice.verdicts}
        out = [share.peer for share in manifest.shares if share.blob is not None and not share.weight]
        there = {share.peer for share in manifest.shares}
        now = trio.current_time()
        self.told.rounds.append(
            RoundTold(
                round=manifest.round,
                revision=self.told.revision,
                root=self.told.root,
                contributed=tuple(share.peer for share in manifest.shares if share.weight),
                sat_out=tuple(share.peer for share in manifest.shares if share.blob is None),
                missing=tuple(peer for peer in self.told.voters if peer not in there),
                not_counted={
                    peer: verdicts[peer].sentence if peer in verdicts else "by the votes of the others" for peer in out
                },
                reasons={peer: verdicts[peer].reason.value if peer in verdicts else "votes" for peer in out},
                held_out_before=held_out_before,
                rule=settled.rule,
                why=settled.why,
                moved=settled.moved,
                seconds=round(now - self._began_s, 3),
            )
        )
        self._began_s = now


def _contribution(header: Statement) -> Contribution:
    body = header.body
    assert isinstance(body, Header)
    assert body.contribution is not None
    return body.contribution


async def _in_thread(act: Callable[..., _T], *arguments: object) -> _T:
    """What works on a flat vector, or waits for a disk. A cancellation waits for it."""
    return await trio.to_thread.run_sync(act, *arguments)
