"""A run from a model, and a member from a run: plans are made here, and models copied to be trained.

Rules: sync, and takes seconds: call it in a worker thread. The model that serves is read and never touched. A run
starts from what stands in a model's files, so that everybody who has these can join, and go on after a restart.
Source: TRAINING.md 1.
"""

from __future__ import annotations

import time

from crypto.digest import Digest, digest
from crypto.identity import PeerId
from gossip.transfer import manifest_of
from model.codecs import codec_named
from model.config import TrainConfig
from model.data import TrainingText
from model.layout import layout_of
from model.load import Loaded, as_in_files
from model.participant import Course, Participant, Shape, make_trainer, state_of
from model.rules import Rule
from node.training_plan import PARTS, Plan, default_codec, default_outer_rate, in_order
from node.training_wish import Begin


class CannotTrain(Exception):
    """Training cannot begin, or go on: one sentence for the operator."""


def planned(asked: Begin, loaded: Loaded, own: PeerId, network: str) -> Plan:
    """The plan of a new run from a model as its files have it. Raises ModelError."""
    loaded = as_in_files(loaded)
    named = dict(loaded.model.named_parameters())
    layout = layout_of(named)
    momentum = round(asked.momentum * PARTS)
    codec = asked.codec or default_codec(layout.size)
    course = Course(run=Digest(bytes(32)), codec=codec_named(codec), rule=Rule.MEAN, momentum=momentum / PARTS)
    return Plan(
        name=asked.name,
        network=network,
        model=loaded.facts.name,
        revision=loaded.facts.revision,
        layout=layout.digest,
        elements=layout.size,
        start=root_of(state_of(layout.flatten(named), None, course)),
        codec=codec,
        rule=asked.rule,
        outer_rate=default_outer_rate(codec) if asked.outer_rate is None else round(asked.outer_rate * PARTS),
        momentum=momentum,
        steps=asked.steps,
        rows=asked.rows,
        context=asked.context,
        accumulation=asked.accumulation,
        rate=max(1, round(asked.rate * 1e9)),
        warmup_steps=asked.warmup_steps,
        founders=in_order((*asked.founders, own)),
        members=in_order((*asked.members, *asked.founders, own)) if asked.members else (),
        probation=asked.probation,
        absent_max=asked.absent_max,
        created_ms=time.time_ns() // 1_000_000,
    )


def participant_of(plan: Plan, loaded: Loaded, text: TrainingText, seed: int, own: PeerId) -> Participant:
    """This node's member of a run. Raises ModelError, CannotTrain (it has other weights)."""
    config = TrainConfig(
        seed=seed, rate=plan.rate / 1e9, warmup_steps=plan.warmup_steps, accumulation=plan.accumulation
    )
    loaded = as_in_files(loaded)
    trainer = make_trainer(loaded, text, Shape(context=plan.context, rows=plan.rows), config)
    course = Course(
        run=plan.id,
        codec=codec_named(plan.codec),
        rule=Rule(plan.rule),
        outer_rate=plan.outer_rate / PARTS,
        momentum=plan.momentum / PARTS,
    )
    participant = Participant(trainer, course, own)
    if root_of(participant.state()) != plan.start:
        raise CannotTrain(
            f"run {plan.name} starts from the model {plan.model} at revision {plan.revision}, and this node hosts "
            f"{loaded.facts.name} at {loaded.facts.revision}: start it with --model {plan.model}"
        )
    return participant


def root_of(state: bytes) -> Digest:
    """The name of a state, as its blob has it."""
    return digest(manifest_of(state).encode())
