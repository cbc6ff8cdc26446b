"""What a node keeps of a run on disk, for who looks at it while no session of it lives here: `train export`.

Rules: beside records and states (gossip/round_store.py, training_weights.py) stands run.json, whole or absent: the
plan, and where the model is that the run starts from. Who reads here only reads: the node may be writing at the same
time, and stands at round N when N records are whole and state-N is there; what is of a later round is not proven yet.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from crypto.disk import SYSTEM, write_whole
from gossip.errors import CannotStore, RemoteProtocolError
from gossip.round_store import read_records
from gossip.rounds import recorded_manifest
from model.load import Found
from node.errors import BadRequest, NotReady
from node.training_plan import PLAN_BYTES_MAX, Plan, plan_of

FILE = "run.json"
STATE = "state-"  # and the number of the round that begins with it
FILE_BYTES_MAX = 2 * PLAN_BYTES_MAX  # the plan in base64, and paths
READY_AFTER_S = 10.0  # about a round of the model that comes with the node
TRIES = 3  # a state may go while it is looked for: rounds go on


class _Kept(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """name, path, inside: of model.load.Found."""

    plan: bytes
    name: str
    path: str
    inside: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptRun:
    """One run's folder. found: the model that it starts from, where the node last had it."""

    folder: Path
    plan: Plan
    found: Found


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """Where a run stands on this node's disk. round: how many rounds the weights have in them; committed: how many
    there are: large weights are written in some rounds only (Plan.named_every). state: see model/participant.py."""

    round: int
    committed: int
    base: bytes
    state: bytes


def keep_run(folder: Path, plan: Plan, found: Found) -> None:
    """Write down what a run is. Blocks for the disk. Raises CannotStore."""
    kept = _Kept(plan=plan.raw, name=found.name, path=str(found.path.absolute()), inside=str(found.inside.absolute()))
    try:
        write_whole(folder / FILE, msgspec.json.encode(kept), over=True)
    except OSError as exc:
        raise CannotStore(f"the run cannot be kept in {folder}: {exc.strerror}") from exc


def find_run(folder: Path, run: str) -> KeptRun:
    """The run of this name, or of an id that begins so, among those that a node has kept. Raises BadRequest."""
    runs = [kept for path in sorted(folder.glob(f"*/{FILE}")) if (kept := _read(path)) is not None]
    fitting = [kept for kept in runs if kept.plan.is_called(run)]
    if len(fitting) == 1:
        return fitting[0]
    told = ", ".join(f"{kept.plan.name} ({kept.plan.id.hex()[:16]})" for kept in fitting or runs)
    if fitting:
        raise BadRequest(f"there are {len(fitting)} runs {run!r} in {folder}: say which by its id: {told}")
    raise BadRequest(
        f"there is no run {run!r} in {folder}, but {told}: say one of these, or --data-dir with the folder of the node "
        "that trained it"
        if runs
        else f"no run is kept in {folder}: say --data-dir with the folder of a node that has trained"
    )


def reached(kept: KeptRun) -> Reached:
    """The newest weights of committed rounds. Raises NotReady before the first, CannotStore."""
    for _ in range(TRIES):
        states = set(states_in(kept.folder)) - {0}
        newest: tuple[int, bytes] | None = None
        committed = 0
        for committed, record in enumerate(read_records(kept.folder), 1):
            if committed in states:
                newest = committed, record
        if newest is None:
            rounds = f"{committed or 'no'} committed round{'s' * (committed > 1)}"
            first = kept.plan.named_every
            raise NotReady(
                f"run {kept.plan.name} has {rounds} at this node, and its weights are on the disk after round {first}: "
                f"wait until `python -m node train status` shows round {first}",
                retry_after_s=READY_AFTER_S,
            )
        number, record = newest
        path = kept.folder / f"{STATE}{number}"
        try:
            base = recorded_manifest(record).next_base
            return Reached(round=number, committed=committed, base=base, state=path.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, RemoteProtocolError) as exc:
            raise CannotStore(f"the weights of round {number} cannot be read from {kept.folder}: {exc}") from exc
    raise NotReady(f"rounds of {kept.plan.name} end faster than they can be read: try again", retry_after_s=1.0)


def states_in(folder: Path) -> list[int]:
    """The rounds that begin with the states that are there."""
    found = (re.fullmatch(rf"{STATE}([0-9]{{1,9}})", path.name) for path in folder.glob(f"{STATE}*"))
    return [int(each[1]) for each in found if each is not None]


def _read(path: Path) -> KeptRun | None:
    """None: it is not of a run that this program can go on with; the others are told by name."""
    try:
        kept = msgspec.json.decode(SYSTEM.read(path, FILE_BYTES_MAX + 1), type=_Kept)
        plan = plan_of(kept.plan)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RemoteProtocolError):
        return None
    found = Found(kept.name, Path(kept.path), Path(kept.inside))
    return KeptRun(folder=path.parent, plan=plan, found=found) if path.parent.name == plan.id.hex()[:16] else None
