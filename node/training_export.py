"""A run's weights, from what a node keeps on disk to a folder that `python -m node run --model FOLDER` loads.

Rules: sync, for a command's own process, which may take seconds and the memory of the model twice. It asks no node: it
reads what the node keeps, so it does the same while the node runs, while it does not, and after it has left the run.
The folder is whole or absent: it is written beside, flushed, renamed. Nothing that is there is written over.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crypto.digest import Digest
from crypto.disk import whole_folder, write_whole
from gossip.errors import CannotStore
from model.errors import NotFound
from model.export import trained, write_adapters, write_model
from model.load import Loaded, load, resolve
from node.errors import BadRequest
from node.training_build import adapter_config, root_of, root_of_files
from node.training_kept import KeptRun, Reached, find_run, reached
from node.training_plan import Plan

FACTS, CARD = "training.json", "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """run: name or id. to: the folder. data_dir: the node's. model: where the base model is; None: where it was when
    the node trained. adapters: these alone, of a run that trains some."""

    run: str
    to: Path
    data_dir: Path
    model: str | None = None
    adapters: bool = False


def export(wanted: Wanted, today: str) -> dict[str, Any]:
    """Write the folder; gives what its training.json says. today: a date, for people.

    Raises BadRequest (no such run, a folder that may not be written to), NotReady (no committed round yet), CannotStore
    (the disk), ModelError (the base model, the weights, the disk).
    """
    target = _target(wanted)
    kept = find_run(wanted.data_dir / "training", wanted.run)
    plan = kept.plan
    if wanted.adapters and plan.adapters is None:
        raise BadRequest(f"run {plan.name} trains the whole model and has no adapters: leave out --adapters")
    now = reached(kept)
    loaded = _base(kept, wanted.model)
    adapters = None if plan.adapters is None else (adapter_config(plan.adapters), plan.id)
    what = trained(loaded, now.state, Digest(plan.layout), adapters)
    facts = _facts(plan, now, today, only_adapters=wanted.adapters)
    try:
        with whole_folder(target) as folder:
            if wanted.adapters:
                write_adapters(folder, what, plan.model)
            else:
                write_model(folder, what)
            for name, text in ((FACTS, json.dumps(facts, indent=2) + "\n"), (CARD, _card(facts))):
                write_whole(folder / name, text.encode(), over=False, mode=0o644)
    except OSError as exc:
        raise CannotStore(f"{target} cannot be written: {exc.strerror}; make room, or name another folder") from exc
    return facts


def _target(wanted: Wanted) -> Path:
    """Raises BadRequest."""
    try:
        target = wanted.to.expanduser().resolve()
        home = wanted.data_dir.resolve()
        if target.is_relative_to(home) or home.is_relative_to(target):
            raise BadRequest(f"{target} and the node's own data folder {home} lie in each other: name another folder")
        if target.is_dir() and any(target.iterdir()):
            raise BadRequest(f"{target} is not empty, and nothing is written over: name a new folder")
        if target.exists() and not target.is_dir():
            raise BadRequest(f"{target} is there and no folder: name a new folder")
    except (OSError, RuntimeError, ValueError) as exc:
        raise BadRequest(f"{str(wanted.to)[:200]!r} cannot be a folder: {exc}") from exc
    return target


def _base(kept: KeptRun, model: str | None) -> Loaded:
    """The model that the run starts from, to the bit. Raises BadRequest, ModelError."""
    plan, elsewhere = kept.plan, "say where it is now by --model"
    if model is None and not kept.found.path.is_dir():
        raise NotFound(f"{plan.model}, from which run {plan.name} starts, is not at {kept.found.path}: {elsewhere}")
    loaded = load(kept.found if model is None else resolve(model), device="cpu", dtype="float32")
    if root_of_files(loaded) != plan.start:
        raise BadRequest(
            f"run {plan.name} starts from {plan.model} at revision {plan.revision}, and {loaded.found.path} holds "
            f"{loaded.facts.revision}: {elsewhere}"
        )
    return loaded


def _facts(plan: Plan, now: Reached, today: str, *, only_adapters: bool) -> dict[str, Any]:
    return {
        "run": plan.name,
        "run_id": plan.id.hex(),
        "network": plan.network,
        "rounds": now.round,
        "rounds_committed": now.committed,
        "revision": plan.revision_at(now.round, now.base),
        "root": root_of(now.state).hex(),
        "base_model": plan.model,
        "base_revision": plan.revision,
        "trained_parameters": plan.elements,
        "holds": "adapters" if only_adapters else "model",
        "lora_rank": None if plan.adapters is None else plan.adapters.rank,
        "exported": today,
    }


def _card(facts: dict[str, Any]) -> str:
    """For people. Names in it were written by peers."""
    told = {key: "".join(each if each.isprintable() and each != "`" else "?" for each in str(value))
            for key, value in facts.items()}  # fmt: skip
    use = (
        "These are LoRA adapters alone: `peft.PeftModel.from_pretrained(BASE, FOLDER)` puts them over the base model."
        if facts["holds"] == "adapters"
        else "`python -m node run --model FOLDER` serves it, `AutoModelForCausalLM.from_pretrained(FOLDER)` loads it."
    )
    return (
        f"# {told['run']}, {told['rounds']} rounds\n\n"
        f"What the members of the run `{told['run']}` have learnt together, in fp32, on top of `{told['base_model']}`\n"
        f"(revision `{told['base_revision']}`), whose licence holds for it too. Every member that stood at this round\n"
        "has the same numbers: `root` in `training.json` names them, and `train status --json` told it there.\n\n"
        f"{use}\n\n"
        f"| what | value |\n| --- | --- |\n"
        + "".join(f"| {key.replace('_', ' ')} | `{told[key]}` |\n" for key in facts if facts[key] is not None)
    )
