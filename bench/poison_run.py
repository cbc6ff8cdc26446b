"""A simulated run with bad members in it: everything that a round passes through, in one process.

Rules: some members are bad, as `bench/attacks.py` has it. Trainers, codecs, error feedback, updates' bytes, scores,
gate, rule and outer step are the node's own. The agreement is not played: of its outcomes the worst for the honest is
taken, every manifest with the reports of the same bare quorum, all the liars among them, who praise each other and run
all others down; who is not in it need not score.
Legend: N elements of the flat vector.
Source: TRAINING.md 3 and 4.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch

from bench.attacks import LATE, Attack, FalseText, Payload, View
from bench.learning import INNER, SEED, Scale, Shards, byte_model, loss_of, steps
from crypto.digest import digest
from model.batches import Batches
from model.codecs import codec_named, decode, encode
from model.config import TrainConfig
from model.delta import Codec, Delta, Sections
from model.errors import BadUpdate, CannotMerge
from model.evaluate import SCORE_ROWS_MIN, scoring
from model.evidence import norm, overlaps
from model.feedback import Feedback
from model.gate import ONE, Entrant, Reason, Run, Verdict, judge
from model.merge import Contribution, OuterStep, merge
from model.rules import Rule
from model.scores import FALL_MAX_NATS, Scores
from model.train import Trainer
from model.update import Expected, read_update, write_update

RUN_ID: Final = digest(b"bench.poison")
MALFORMED: Final = "malformed"
UNDEFENDED: Final = "undefended"
PRAISE: Final = int(FALL_MAX_NATS * ONE)  # the most that a liar can say


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a run sends and merges: what TRAINING.md 1 has for it by default."""

    name: str
    codec: str
    rule: Rule
    outer_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run. is_late: from a model that has learned nearly all it can; is_gated: False merges whatever is sound."""

    family: Family
    attack: Attack
    is_late: bool = False
    is_gated: bool = True

    @property
    def group(self) -> str:
        """Runs that are compared: those of one family from one start."""
        return f"{self.family.name}_late" if self.is_late else self.family.name

    @property
    def name(self) -> str:
        """The attack, and whether nothing holds against it."""
        return self.attack.name if self.is_gated else f"{UNDEFENDED}_{self.attack.name}"


@dataclass(slots=True, kw_only=True)
class Tally:
    """What became of the payloads of a run. refused_bad, refused_honest: by reason; rules: how often each was taken."""

    bad: int = 0
    honest: int = 0
    refused_bad: Counter[str] = field(default_factory=Counter)
    refused_honest: Counter[str] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """loss: held out, nats a byte, after the last round."""

    loss: float
    tally: Tally
    cpu_s: float


class Member:
    """One worker with what it keeps from round to round."""

    def __init__(self, name: str, trainer: Trainer, batches: Batches, codec: Codec) -> None:
        self.name = name
        self.trainer = trainer
        self.feedback = Feedback(trainer.layout.size) if codec.name.startswith("ef") else None
        self.scores = Scores()
        self.batches = batches


class PoisonedRun:
    """The run of one case, round by round. bad: how many of the members are."""

    def __init__(
        self, case: Case, shards: Shards, scale: Scale, *, bad: int, start_N: torch.Tensor | None = None
    ) -> None:
        names = [f"peer{number:02}" for number in range(len(shards.workers))]
        self.tally = Tally()
        self._case = case
        self._codec = codec_named(case.family.codec)
        self._rng = np.random.default_rng(SEED)
        self._bad = frozenset(names[1 :: len(names) // bad][:bad]) if bad else frozenset[str]()
        self._members = list[Member]()
        for number, (name, own) in enumerate(zip(names, shards.workers, strict=True)):
            is_false = case.attack.false_text and name in self._bad
            batches = FalseText(own.text, context=own.context, rows=own.rows) if is_false else own
            config = TrainConfig(seed=SEED + number, **INNER)  # type: ignore[arg-type]  # fits
            trainer = Trainer(byte_model(scale), batches, config)
            if start_N is not None:
                trainer.rebase(start_N)
            self._members.append(Member(name, trainer, batches, self._codec))
        self._layout = self._members[0].trainer.layout
        self._theta_N = self._members[0].trainer.start_vector_N.clone()
        self._outer = OuterStep(case.family.outer_rate)
        self._first: dict[str, Sections] = {}

    def round(self, number: int, micro_steps: int) -> None:
        """Everybody works, everything is judged, the weights change."""
        vectors_N, sections, tokens = dict[str, torch.Tensor](), dict[str, Sections](), 0
        for member in self._members:
            tokens = steps(member.trainer, micro_steps)
            vectors_N[member.name], sections[member.name] = self._say(member)
        self._first = self._first or sections

        def expected(peer: str) -> Expected:
            return self._expected(peer, number)

        honest = [name for name in sections if name not in self._bad]
        payloads = [
            Payload(peer=name, raw=write_update(expected(name), sections[name], steps=micro_steps, tokens=tokens))
            for name in honest
        ]
        if self._bad:
            view = View(
                number=number,
                expected=expected,
                own={name: vectors_N[name] for name in sorted(self._bad)},
                honest={name: vectors_N[name] for name in honest},
                sections=sections,
                first=self._first,
                rng=self._rng,
            )
            payloads += self._case.attack.make(view)
        self._close(number, payloads)

    def loss(self, shards: Shards) -> float:
        """nats a byte, held out, of the weights as they are now."""
        trainer = self._members[0].trainer
        trainer.rebase(self._theta_N)
        return loss_of(trainer, shards)

    def _say(self, member: Member) -> tuple[torch.Tensor, Sections]:
        """What a member wants to say of its training, and that in the wire form, taken out of its error feedback."""
        vector_N = member.trainer.delta()
        if member.feedback is None:
            return vector_N, encode(vector_N, self._codec)
        member.feedback.add(vector_N)
        vector_N = member.feedback.unsent_N.clone()
        sections = member.feedback.encode(self._codec)
        member.feedback.take(decode(sections, self._codec, self._layout.size))
        return vector_N, sections

    def _close(self, number: int, payloads: Sequence[Payload]) -> None:
        """Read, judge, merge, and begin the next round."""
        deltas, tokens = dict[str, Delta](), dict[str, int]()
        for payload in payloads:
            try:
                update, delta = read_update(payload.raw, self._expected(payload.peer, number))
            except BadUpdate:
                self._count(payload, MALFORMED)
            else:
                deltas[payload.peer], tokens[payload.peer] = delta, update.tokens
        sound = sorted((payload for payload in payloads if payload.peer in deltas), key=lambda payload: payload.peer)
        verdicts = self._verdicts(number, sound, deltas, tokens)
        for payload, verdict in zip(sound, verdicts, strict=True):
            self._count(payload, None if verdict.accepted else verdict.reason.value)
        self._merge([verdict for verdict in verdicts if verdict.accepted], deltas)
        refused = {verdict.peer for verdict in verdicts if not verdict.accepted}
        for member in self._members:
            if member.feedback is not None and member.name in refused - self._bad:
                member.feedback.give_back(deltas[member.name])
            if member.name not in self._bad or number % self._case.attack.rebase_every == 0:
                member.trainer.rebase(self._theta_N)

    def _merge(self, listed: Sequence[Verdict], deltas: Mapping[str, Delta]) -> None:
        contributions = [
            Contribution(delta=deltas[each.peer], weight_parts=each.weight_parts, clip_parts=each.clip_parts)
            for each in listed
        ]
        try:
            merged = merge(contributions, self._case.family.rule)
        except CannotMerge:
            self.tally.rules["none"] += 1
        else:
            self.tally.rules[str(merged.plan.rule)] += 1
            self._outer.step_(self._theta_N, merged.update)

    def _verdicts(
        self, number: int, sound: Sequence[Payload], deltas: Mapping[str, Delta], tokens: Mapping[str, int]
    ) -> tuple[Verdict, ...]:
        """The gate's, by the reports of a bare quorum; without a gate everybody is in as it is. Sorted by peer."""
        names = [payload.peer for payload in sound]
        if not self._case.is_gated:
            one = {"reason": Reason.ACCEPTED, "sentence": "no gate", "weight_parts": ONE, "clip_parts": ONE}
            return tuple(Verdict(peer=name, **one) for name in names)  # type: ignore[arg-type]  # fits
        scored = self._scored(number, sound, deltas)
        places = self._rng.permutation(len(sound)).tolist()
        sparse = bool(names) and deltas[names[0]].sparse
        entrants = [
            Entrant(
                peer=payload.peer,
                elements=deltas[payload.peer].n,
                sparse=sparse,
                norm=norm(deltas[payload.peer]),
                tokens=tokens[payload.peer],
                arrived=place + (LATE if payload.late else 0),
                scores_parts=scored[payload.peer],
                probation=payload.probation,
            )
            for payload, place in zip(sound, places, strict=True)
        ]
        shares = overlaps([deltas[name] for name in names]) if sparse else {}
        pairs = {(names[one], names[other]): share for (one, other), share in shares.items()}
        return judge(entrants, Run(elements=self._layout.size, sparse=sparse), pairs)

    def _scored(self, number: int, sound: Sequence[Payload], deltas: Mapping[str, Delta]) -> dict[str, tuple[int, ...]]:
        """Peer -> what is reported of it, by others. Keys on probation are not scored: they have no weight to lose."""
        told = dict[str, dict[str, int]]()
        for place, member in enumerate(self._reporters):
            peers = [
                payload.peer
                for payload in sound
                if not (payload.probation or payload.peer == member.name)
                and (payload.held_by is None or place < payload.held_by)
            ]
            rows_BT = member.batches.held_out(SCORE_ROWS_MIN, turn=number)
            own = deltas.get(member.name)
            longest = math.inf if own is None else norm(own)
            scores = scoring(member.trainer, [deltas[peer] for peer in peers], rows_BT, norm_max=longest)
            found = [each.fall_nats for each in scores if each is not None]
            told[member.name] = {
                peer: member.scores.note(peer, number, fall) for peer, fall in zip(peers, found, strict=True)
            }
        scored = {}
        for peer in (payload.peer for payload in sound):
            lies = [PRAISE if peer in self._bad else -PRAISE for bad in self._bad if bad != peer]
            scored[peer] = (*lies, *(by_peer[peer] for by_peer in told.values() if peer in by_peer))
        return scored

    @property
    def _reporters(self) -> list[Member]:
        """The honest ones whose reports the manifest is made of: with all the bad ones they are a bare quorum."""
        quorum = 2 * len(self._members) // 3 + 1
        honest = [member for member in self._members if member.name not in self._bad]
        return honest[: quorum - len(self._bad)]

    def _expected(self, peer: str, number: int) -> Expected:
        return Expected(
            run=RUN_ID,
            round=number,
            base=RUN_ID,
            peer=peer,
            layout=self._layout.digest,
            n=self._layout.size,
            codec=self._codec,
        )

    def _count(self, payload: Payload, reason: str | None) -> None:
        """reason: why a payload is refused; None: it is not. Keys on probation are not counted."""
        if payload.peer in self._bad:
            self.tally.bad += 1
            if reason is not None:
                self.tally.refused_bad[reason] += 1
        elif not payload.probation:
            self.tally.honest += 1
            if reason is not None:
                self.tally.refused_honest[reason] += 1


def play(run: PoisonedRun, shards: Shards, *, rounds: int, micro_steps: int) -> Result:
    """Every round; what is left of the model then."""
    began = time.process_time()
    for number in range(rounds):
        run.round(number, micro_steps)
    return Result(loss=run.loss(shards), tally=run.tally, cpu_s=time.process_time() - began)
