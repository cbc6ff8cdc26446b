"""What the operator wants trained: checked when it is said, kept over a restart.

Rules: a path is kept as it was given, absolute. A wish is of one run: it begins one (then its plan is known at once),
or joins one by name or id (then a peer gives the plan).
Source: INTERFACES.md (`train`); PRODUCT.md ("safe defaults").
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from crypto.disk import StateFile
from crypto.errors import BadState
from model.config import SEED_MAX

FILE_BYTES_MAX = 1 << 20
PATHS_MAX = 1024
PATH_CHARS_MAX = 4096
Path_ = Annotated[str, Meta(min_length=1, max_length=PATH_CHARS_MAX)]
RunName = Annotated[str, Meta(min_length=1, max_length=80)]


class Privacy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Train so that deltas tell little of any one row (docs/PRIVACY.md), and no more than this epsilon in all."""

    epsilon: Annotated[float, Meta(gt=0.0, le=1000.0)]
    delta: Annotated[float, Meta(gt=0.0, lt=1.0)] = 1e-6
    noise: Annotated[float, Meta(gt=0.0, le=1000.0)] = 0.8
    clip: Annotated[float, Meta(gt=0.0, le=1e6)] = 1.0


class Wish(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """run: name, or the first hex digits of an id. plan: the run's, once it is known. seed: this node's own order."""

    run: RunName
    data: Annotated[tuple[Path_, ...], Meta(min_length=1, max_length=PATHS_MAX)]
    seed: Annotated[int, Meta(ge=0, le=SEED_MAX)]
    plan: bytes | None = None
    paused: bool = False
    privacy: Privacy | None = None


class Begin(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`train start`: what may be said of a new run; what is left out has a default that fits the model."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,31}$")]
    data: Annotated[tuple[Path_, ...], Meta(min_length=1, max_length=PATHS_MAX)]
    founders: Annotated[tuple[str, ...], Meta(max_length=63)] = ()  # beside this node
    members: Annotated[tuple[str, ...], Meta(max_length=256)] = ()
    codec: str | None = None
    rule: str = "adaptive"
    outer_rate: Annotated[float, Meta(gt=0.0, le=16.0)] | None = None
    momentum: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    steps: Annotated[int, Meta(ge=1, le=1 << 20)] = 20
    rows: Annotated[int, Meta(ge=1, le=4096)] = 2
    context: Annotated[int, Meta(ge=8, le=1 << 20)] = 128
    accumulation: Annotated[int, Meta(ge=1, le=4096)] = 4
    rate: Annotated[float, Meta(gt=0.0, lt=1.0)] = 3e-4
    warmup_steps: Annotated[int, Meta(ge=0, le=1 << 20)] = 20
    probation: Annotated[int, Meta(ge=1, le=1000)] = 3
    absent_max: Annotated[int, Meta(ge=1, le=1000)] = 2
    lora_rank: Annotated[int, Meta(ge=1, le=256)] | None = None  # train adapters of this rank, and nothing else
    lora_alpha: Annotated[int, Meta(ge=1, le=1 << 16)] = 16
    lora_targets: Annotated[tuple[str, ...], Meta(max_length=32)] = ()
    privacy: Privacy | None = None


class Join(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`train join`."""

    run: RunName
    data: Annotated[tuple[Path_, ...], Meta(min_length=1, max_length=PATHS_MAX)]
    privacy: Privacy | None = None


class Wished:
    """The wish on disk, for which it blocks; a disk that takes nothing is told in the status."""

    def __init__(self, path: Path) -> None:
        self.file = StateFile(path, kind="training_wish", version=1, bytes_max=FILE_BYTES_MAX)

    def read(self) -> Wish | None:
        """What was wanted before; None: nothing."""
        return self.file.read(_decode)

    def write(self, wish: Wish | None) -> None:
        """Keep it, or that there is none."""
        self.file.write(msgspec.json.encode(wish))


def absolute(paths: tuple[str, ...]) -> tuple[str, ...]:
    """As they are found from anywhere."""
    return tuple(str(Path(path).expanduser().absolute()) for path in paths)


def _decode(raw: bytes) -> Wish | None:
    try:
        return msgspec.json.decode(raw, type=Wish | None)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise BadState(str(exc)) from exc
