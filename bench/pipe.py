"""`python -m bench.pipe`: what a byte costs between two peers, over TCP on loopback.

Rules: sender and receiver are processes of their own; a round moves the same bytes over each path, path by path in the
same run. A figure is a median over the rounds of payload bytes over CPU time (user and system) of the end that spent
more, in MB of 10^6 bytes. The rival is libp2p as it comes, with none of our guards. A late joiner fetches JOIN_MB from
three donors, and one of them is killed when half has come.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from bench.harness import Row, options, report

PAYLOAD_MIB = 64
JOIN_MB = 100
JOIN_DONORS = 3
MB = 1_000_000
PATHS = ("libp2p", "direct", "blob", "plain")
PLAIN = "libp2p 0.8.1 plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One transfer: CPU seconds of both ends, and the sender's seconds from the first byte to the last answer."""

    send_cpu_s: float
    receive_cpu_s: float
    wall_s: float


@dataclass(frozen=True, slots=True)
class Ends:
    """The two processes of one path, connected, waiting for the word."""

    sender: subprocess.Popen[str]
    receiver: subprocess.Popen[str]

    def measure(self) -> Round:
        """Move the payload once."""
        assert self.sender.stdin is not None
        self.sender.stdin.write("go\n")
        self.sender.stdin.flush()
        sent, got = read_line(self.sender), read_line(self.receiver)
        return Round(send_cpu_s=sent["cpu_s"], receive_cpu_s=got["cpu_s"], wall_s=sent["wall_s"])


def main() -> None:
    """Measure and report."""
    chosen = options(__doc__)
    rounds = 5 if chosen.quick else 15
    with ExitStack() as stack:
        ends = {path: stack.enter_context(open_ends(path)) for path in PATHS}
        for each in ends.values():
            each.measure()  # windows grow, buffers are taken from the system
        measured: dict[str, list[Round]] = {path: [] for path in PATHS}
        for _ in range(rounds):
            for path in PATHS:
                measured[path].append(ends[path].measure())
    joins = [join() for _ in range(3 if chosen.quick else 9)]
    report("pipe", rows_of(measured) + rows_of_joins(joins), chosen)


def join() -> Round:
    """A late joiner, once: three donors, and one dies when half has come."""
    with ExitStack() as stack:
        donors = []
        for _ in range(JOIN_DONORS):
            donors.append(start("join", JOIN_MB * MB, "receive"))
            stack.callback(stop, donors[-1])
        told = [read_line(donor) for donor in donors]
        addresses = ",".join([told[0]["blob"], *(each["address"] for each in told)])
        joiner = start("join", JOIN_MB * MB, "send", addresses)
        stack.callback(stop, joiner)
        read_line(joiner)
        assert joiner.stdin is not None
        joiner.stdin.write("go\n")
        joiner.stdin.flush()
        read_line(joiner)
        donors[0].kill()
        cost = read_line(joiner)
        return Round(send_cpu_s=0.0, receive_cpu_s=cost["cpu_s"], wall_s=cost["wall_s"])


@contextmanager
def open_ends(path: str) -> Iterator[Ends]:
    """Start both ends of a path; end them when the block is left."""
    receiver = start(path, PAYLOAD_MIB << 20, "receive")
    try:
        address = read_line(receiver)["address"]
        sender = start(path, PAYLOAD_MIB << 20, "send", address)
        try:
            read_line(sender)
            yield Ends(sender, receiver)
        finally:
            stop(sender)
    finally:
        stop(receiver)


def start(path: str, size: int, *role: str) -> subprocess.Popen[str]:
    """One end as a process that speaks JSON lines on its standard output."""
    command = [sys.executable, "-m", "bench.pipe_end", path, str(size), *role]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def stop(process: subprocess.Popen[str]) -> None:
    """End a process of ours."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


def read_line(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What an end says next. Ends the benchmark when the end is gone."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args!r} ended with {process.wait()}")
    found: dict[str, Any] = json.loads(line)
    return found


def rows_of(measured: Mapping[str, Sequence[Round]]) -> list[Row]:
    """The figures: per CPU-second of the worse end, of each end, and per second on the wall."""
    payload_mb = (PAYLOAD_MIB << 20) / MB
    kinds: tuple[tuple[str, str, Callable[[Round], float]], ...] = (
        ("mb_per_cpu_s", "MB/CPU-s", lambda each: max(each.send_cpu_s, each.receive_cpu_s)),
        ("send_mb_per_cpu_s", "MB/CPU-s", lambda each: each.send_cpu_s),
        ("receive_mb_per_cpu_s", "MB/CPU-s", lambda each: each.receive_cpu_s),
        ("mb_per_s", "MB/s", lambda each: each.wall_s),
    )
    rows = []
    for path in (name for name in measured if name != "plain"):
        for kind, unit, cost in kinds:
            value, rival = (
                statistics.median(payload_mb / cost(each) for each in measured[name]) for name in (path, "plain")
            )
            figure = f"{path}_{kind}"
            rows.append(Row(figure=figure, value=value, unit=unit, better="higher", rival=PLAIN, rival_value=rival))
    return rows


def rows_of_joins(joins: Sequence[Round]) -> list[Row]:
    """The figures of a late joiner."""
    figures = (
        ("late_join_mb_per_s", "MB/s", [JOIN_MB / each.wall_s for each in joins]),
        ("late_join_mb_per_cpu_s", "MB/CPU-s", [JOIN_MB / each.receive_cpu_s for each in joins]),
    )
    return [
        Row(figure=figure, value=statistics.median(values), unit=unit, better="higher")
        for figure, unit, values in figures
    ]


if __name__ == "__main__":
    main()
