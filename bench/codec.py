"""`python -m bench.codec`: what it costs to say what a model has learnt, in bytes, CPU-seconds and lost precision.

Rules: one thread; a vector of 25.5 million elements (2.5 with --quick) whose values are heavy-tailed as deltas are: a
normal number, cubed. A figure is the least CPU time of the turns: what another process takes is not counted. Encoding
is a vector to the bytes of an update; decoding is those bytes, checked, to all values, slice by slice. The error is
||decoded - given|| / ||given||, for sparse codecs over the coordinates that were sent; `_kept` is the share of the
given energy that these hold. Error feedback sends the rest in later rounds.

Beside it: TRAINING.md 2's figures, where it has them, measured on this machine before this code was written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from bench.harness import Options, Row, options, report
from crypto.digest import digest
from model.codecs import CODECS, encode
from model.delta import Codec, Delta, slices
from model.update import Expected, read_update, write_update

ELEMENTS: Final = 25_500_000
NAMES: Final = {"ef64.2b": "sparse", "ef256.2b": "sparse256"}  # in figures; the others go by their own
PLANNED: Final = {
    "sparse_bytes": 0.522, "sparse_encode_cpu_s": 0.38, "sparse_decode_cpu_s": 0.08, "int8_encode_cpu_s": 0.17,
    "int8_decode_cpu_s": 0.11, "fp32_encode_cpu_s": 0.24, "fp32_decode_cpu_s": 0.08,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one codec."""

    size_bytes: int
    encode_s: float
    decode_s: float
    error: float
    kept: float


def main() -> None:
    """Measure and report."""
    chosen = options(__doc__)
    torch.set_num_threads(1)
    report("codec", measure(chosen), chosen)


def measure(chosen: Options) -> list[Row]:
    """The figures of every codec."""
    n, turns = (ELEMENTS // 10, 3) if chosen.quick else (ELEMENTS, 5)
    given_N = torch.from_numpy(np.random.default_rng(0).standard_normal(n, np.float32) ** 3 * np.float32(1e-3))
    rows: list[Row] = []
    for codec in CODECS.values():
        name, cost = NAMES.get(codec.name, codec.name), cost_of(codec, given_N, turns)
        rows += [
            row(f"{name}_bytes", cost.size_bytes / 1e6, "MB"),
            row(f"{name}_encode_cpu_s", cost.encode_s, "CPU-s"),
            row(f"{name}_decode_cpu_s", cost.decode_s, "CPU-s"),
            row(f"{name}_error", cost.error, "of norm"),
        ]
        if cost.kept < 1:
            rows.append(Row(figure=f"{name}_kept", value=cost.kept, unit="of energy", better="higher"))
    return rows if not chosen.quick else [without_rival(each) for each in rows]


def row(figure: str, value: float, unit: str) -> Row:
    """One figure, and the plan's beside it."""
    planned = PLANNED.get(figure)
    return Row(
        figure=figure,
        value=value,
        unit=unit,
        better="lower",
        rival=None if planned is None else "TRAINING.md",
        rival_value=planned,
    )


def without_rival(each: Row) -> Row:
    """A tenth of the elements is not to be compared with all."""
    return Row(figure=each.figure, value=each.value, unit=each.unit, better=each.better)


def cost_of(codec: Codec, given_N: torch.Tensor, turns: int) -> Cost:
    """There and back."""
    none = digest(b"")
    expected = Expected(
        run=none, round=0, base=none, peer="12D3KooW" + "1" * 44, layout=none, n=len(given_N), codec=codec
    )
    raw = b""

    def write() -> None:
        nonlocal raw
        raw = write_update(expected, encode(given_N, codec), steps=1, tokens=1)

    def read() -> None:
        delta = read_update(raw, expected)[1]
        for start, stop in slices(delta.n):
            delta.dense(start, stop)

    encode_s, decode_s = least_cpu_s(write, turns), least_cpu_s(read, turns)
    error, kept = loss(read_update(raw, expected)[1], given_N)
    return Cost(size_bytes=len(raw), encode_s=encode_s, decode_s=decode_s, error=error, kept=kept)


def least_cpu_s(act: Callable[[], None], turns: int) -> float:
    """CPU-seconds of this process, user and system; the first turn, which warms up, is not counted."""
    spent: list[float] = []
    for _ in range(turns + 1):
        began = time.process_time()
        act()
        spent.append(time.process_time() - began)
    return min(spent[1:])


def loss(delta: Delta, given_N: torch.Tensor) -> tuple[float, float]:
    """(error, kept): the relative error over what was sent, and the share of the energy that stands there."""
    sums: list[Sequence[float]] = []
    for start, stop in slices(delta.n):
        given_S, got_S = given_N[start:stop].double(), delta.dense(start, stop).double()
        sent_S = delta.sent(start, stop)
        squares = [((got_S - given_S)[sent_S] ** 2).sum(), (given_S[sent_S] ** 2).sum(), (given_S**2).sum()]
        sums.append([float(each) for each in squares])
    missed, sent, whole = (sum(parts) for parts in zip(*sums, strict=True))
    return (missed / sent) ** 0.5, sent / whole


if __name__ == "__main__":
    main()
