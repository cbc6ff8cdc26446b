"""A run from a model, and a member from a run: plans are made here, and models copied to be trained.

Rules: sync, and takes seconds: call it in a worker thread. The model that serves is read and never touched. A run
starts from what stands in a model's files, so that everybody who has these can join, and go on after a restart.
Source: TRAINING.md 1.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path

from crypto.digest import Digest, digest
from crypto.disk import StateFile
from crypto.identity import PeerId
from gossip.transfer import manifest_of
from model.adapters import AdapterConfig, add_adapters, trainable
from model.budget import Budget
from model.codecs import codec_named
from model.config import PrivacyConfig, TrainConfig
from model.data import TrainingText
from model.layout import Layout, layout_of
from model.load import Loaded, as_in_files
from model.participant import Course, Participant, Shape, make_trainer, state_of
from model.rules import Rule
from node.training_plan import PARTS, Adapters, Plan, default_codec, default_outer_rate, in_order
from node.training_wish import Begin, Privacy

LEDGER_BYTES_MAX = 1 << 20


class CannotTrain(Exception):
    """Training cannot begin, or go on: one sentence for the operator."""


def planned(asked: Begin, loaded: Loaded, own: PeerId, network: str) -> Plan:
    """The plan of a new run from a model as its files have it. Raises ModelError."""
    loaded = as_in_files(loaded)
    adapters = None
    if asked.lora_rank is not None:
        adapters = Adapters(rank=asked.lora_rank, alpha=asked.lora_alpha, targets=asked.lora_targets)
    layout = _layout(loaded, adapters)
    codec = asked.codec or default_codec(layout.size)
    codec_named(codec)
    return Plan(
        name=asked.name,
        network=network,
        model=loaded.facts.name,
        revision=loaded.facts.revision,
        layout=layout.digest,
        elements=layout.size,
        start=root_of_files(loaded),
        adapters=adapters,
        codec=codec,
        rule=asked.rule,
        outer_rate=default_outer_rate(codec) if asked.outer_rate is None else round(asked.outer_rate * PARTS),
        momentum=round(asked.momentum * PARTS),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """What a member brings. ledger: of a text that is trained on privately, with `privacy`."""

    peer: PeerId
    seed: int
    privacy: Privacy | None = None
    ledger: StateFile | None = None


def participant_of(plan: Plan, loaded: Loaded, text: TrainingText, own: Own) -> Participant:
    """This node's member of a run. Raises ModelError, CannotTrain (it has other weights, a ledger that is damaged)."""
    config = TrainConfig(
        seed=own.seed, rate=plan.rate / 1e9, warmup_steps=plan.warmup_steps, accumulation=plan.accumulation
    )
    loaded = as_in_files(loaded)
    if root_of_files(loaded) != plan.start:
        raise CannotTrain(
            f"run {plan.name} starts from the model {plan.model} at revision {plan.revision}, and this node hosts "
            f"{loaded.facts.name} at {loaded.facts.revision}: start it with --model {plan.model}"
        )
    trainer = make_trainer(
        loaded,
        text,
        Shape(context=plan.context, rows=plan.rows),
        config,
        adapters=None if plan.adapters is None else (adapter_config(plan.adapters), plan.id),
        budget=_budget(plan, own),
    )
    if trainer.layout.digest != plan.layout:
        raise CannotTrain(
            f"run {plan.name} trains {plan.elements:,} numbers of {plan.model}, here are {trainer.layout.size:,} or "
            "others; have the same releases of transformers and peft as who began it"
        )
    course = Course(
        run=plan.id,
        codec=codec_named(plan.codec),
        rule=Rule(plan.rule),
        outer_rate=plan.outer_rate / PARTS,
        momentum=plan.momentum / PARTS,
        has_adapters=plan.adapters is not None,
    )
    return Participant(trainer, course, own.peer)


def ledger_of(folder: Path, text: TrainingText) -> StateFile:
    """Where it is kept what private training of a text has spent, whatever run it was for."""
    path = folder / f"privacy-{text.digest.hex()[:32]}.state"
    return StateFile(path, kind="privacy_ledger", version=1, bytes_max=LEDGER_BYTES_MAX)


def _budget(plan: Plan, own: Own) -> Budget | None:
    """Raises BadInput, BadState, CannotTrain."""
    if own.privacy is None:
        return None
    assert own.ledger is not None
    ledger = own.ledger.read(lambda raw: raw)
    if set_aside := own.ledger.status().set_aside:
        raise CannotTrain(f"what was spent on this text cannot be known any more, so it is not trained on: {set_aside}")
    config = PrivacyConfig(
        noise_multiplier=own.privacy.noise,
        clip_norm=own.privacy.clip,
        delta=own.privacy.delta,
        epsilon_max=own.privacy.epsilon,
    )
    return Budget(config, context=plan.context, save=own.ledger.write, ledger=ledger)


def adapter_config(adapters: Adapters) -> AdapterConfig:
    """A plan's, as model/ has it."""
    return AdapterConfig(rank=adapters.rank, alpha=adapters.alpha, targets=adapters.targets)


def _layout(loaded: Loaded, adapters: Adapters | None) -> Layout:
    """Of what is trained. Raises BadInput, BadModel."""
    if adapters is None:
        return layout_of(dict(loaded.model.named_parameters()))
    model = copy.deepcopy(loaded.model)
    add_adapters(model, adapter_config(adapters), Digest(bytes(32)))  # of another run: names and shapes are the same
    return layout_of(trainable(model))


def root_of_files(loaded: Loaded) -> Digest:
    """The name of all weights of a model."""
    named = dict(loaded.model.named_parameters())
    plain = Course(run=Digest(bytes(32)), codec=codec_named("fp32"), rule=Rule.MEAN)
    return root_of(state_of(layout_of(named).flatten(named), None, plain))


def root_of(state: bytes | memoryview) -> Digest:
    """The name of a state, as its blob has it."""
    return digest(manifest_of(state).encode())
