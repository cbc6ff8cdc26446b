"""`python -m bench.together`: four real nodes train the embedded model, each on books of its own; one is killed, and
killed again.

Rules: node processes as users start them, over libp2p on loopback. The text that losses are taken on is nobody's: the
last book and every 20th 8 KiB of the others. `alone` is what one node reaches by itself in as many steps as it did in
the run, mean over the nodes. A kill is SIGKILL in mid-round; it counts until the survivors have committed that round,
over the median round without a kill, and the round must name who is missing. Afterwards the node is started again, and
must be a voter again before the next kill. `--quick`: fewer rounds and kills.
Source: MEASURE.md (averaging: kill_one_ratio; learning); TRAINING.md 3.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from bench.harness import Options, Row, report
from bench.learning import TEXT
from model.config import TrainConfig
from model.corpus import BOOK_BREAK, read_text, split_corpus
from model.data import find_texts, finish, read_texts
from model.evaluate import held_out_loss
from model.load import Loaded, load, resolve
from model.participant import Shape, make_trainer
from node.commands.processes import Cluster, NodeProcess

NODES = 4
RUN = "together"
LOOK_S = 0.1
HANG_S = 900.0
HELD_OUT_ROWS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """rounds: measured without a kill; kills: afterwards."""

    rounds: int = 10
    kills: int = 20
    steps: int = 8
    rows: int = 2
    context: int = 128
    accumulation: int = 2
    rate: float = 3e-4


@dataclass(slots=True, kw_only=True)
class Outcome:
    """roots: rounds in which all nodes had one root; kills: ratio to the median round, and whether it was named."""

    loss: float
    alone: float
    before: float
    round_s: float
    roots_equal: int
    rounds: int
    kills: list[tuple[float, bool]] = field(default_factory=list)
    served: str = ""


class Watch:
    """What the nodes say of their rounds, kept by round as it comes."""

    def __init__(self) -> None:
        self.roots: dict[int, dict[str, str]] = {}

    def look(self, node: NodeProcess) -> dict[str, Any]:
        """A node's training; empty when it does not answer."""
        try:
            told: dict[str, Any] = httpx.get(f"{node.url}/api/v1/training", timeout=30).json()
        except (httpx.HTTPError, ValueError):
            return {}
        for each in told.get("rounds", ()):
            self.roots.setdefault(each["round"], {})[node.peer_id] = each["root"]
        return told


def until(what: str, check: Callable[[], object], seconds: float = HANG_S) -> None:
    """Wait until it is so. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(LOOK_S)


def shares_of(text: str) -> list[str]:
    """Each node's books, without what is held out."""
    *given, last = [book for book in text.split(BOOK_BREAK) if book.strip()]
    return ["".join(split_corpus(BOOK_BREAK.join((*given[n::NODES], last))).train) for n in range(NODES)]


def measure(text: str, scale: Scale, root: Path) -> Outcome:
    """Start, train, kill, stop."""
    paths = []
    for number, share in enumerate(shares_of(text)):
        paths.append(root / f"books-{number}.txt")
        paths[-1].write_text(share)
    watch = Watch()
    with Cluster(root) as cluster:
        nodes = _started(cluster, paths, scale)
        until("the run's rounds", lambda: watch.look(nodes[0]).get("round", 0) >= scale.rounds)
        for node in nodes:
            until("every node's rounds", lambda node=node: watch.look(node).get("round", 0) >= scale.rounds)  # type: ignore[misc]
        told = watch.look(nodes[0])
        state = _state(cluster, nodes[0], scale.rounds)
        rounds = [each["seconds"] for each in told["rounds"][1 : scale.rounds]]
        full = [n for n in range(scale.rounds) if len(watch.roots.get(n, {})) == NODES]
        outcome = Outcome(
            loss=0.0,
            alone=0.0,
            before=0.0,
            round_s=statistics.median(rounds),
            roots_equal=sum(len(set(watch.roots[n].values())) == 1 for n in full),
            rounds=len(full),
            served=_served(nodes[1]),
        )
        for number in range(scale.kills):
            outcome.kills.append(_kill(cluster, nodes, paths, 1 + number % (NODES - 1), watch))
            ratio, is_named = outcome.kills[-1]
            print(f"kill {number + 1}: {ratio:.2f} x the median round, named: {is_named}", flush=True)
    _judge(outcome, state, paths, text, scale)
    return outcome


def _started(cluster: Cluster, paths: list[Path], scale: Scale) -> list[NodeProcess]:
    first = cluster.start("node-0").wait_ready()
    others = [
        cluster.start(f"node-{n}", "--train", RUN, "--data", str(paths[n]), join=[first]) for n in range(1, NODES)
    ]
    for node in others:
        node.wait_ready()
    answer = httpx.post(
        f"{first.url}/api/v1/training/start",
        json={
            "name": RUN,
            "data": [str(paths[0])],
            "founders": [node.peer_id for node in others],
            "steps": scale.steps,
            "rows": scale.rows,
            "context": scale.context,
            "accumulation": scale.accumulation,
            "rate": scale.rate,
        },
        timeout=60,
    )
    answer.raise_for_status()
    return [first, *others]


def _state(cluster: Cluster, node: NodeProcess, number: int) -> torch.Tensor:
    """The weights before a round, or those of the newest one that is still there."""
    folder = next((cluster.root / node.name / "training").glob("*/records.log")).parent
    states = {int(path.name.removeprefix("state-")): path for path in folder.glob("state-*")}
    path = states.get(number) or states[min(states)]
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)


def _served(node: NodeProcess) -> str:
    """The revision that answers."""
    answer = httpx.post(f"{node.url}/v1/completions", json={"prompt": "Once upon a time", "max_tokens": 4}, timeout=60)
    answer.raise_for_status()
    return answer.headers["x-model-revision"]


def _kill(
    cluster: Cluster, nodes: list[NodeProcess], paths: list[Path], number: int, watch: Watch
) -> tuple[float, bool]:
    """Kill a node in mid-round; how long its round took over the median, and whether it was named; then it is back."""
    victim, survivors = nodes[number], [node for node in nodes if node is not nodes[number]]
    until("all are voters", lambda: _votes(watch.look(survivors[0])) == NODES)
    told = watch.look(survivors[0])
    begun, seconds = told["round"], [each["seconds"] for each in told["rounds"] if not each["missing"]]
    until("a round to begin", lambda: watch.look(survivors[0]).get("round", 0) > begun)
    open_round = watch.look(survivors[0])["round"]
    time.sleep(statistics.median(seconds) / 2)
    victim.process.kill()
    victim.process.wait()
    for node in survivors:
        until("the survivors commit", lambda node=node: open_round in _rows(watch.look(node)))  # type: ignore[misc]
    rows = _rows(watch.look(survivors[0]))
    if victim.peer_id not in rows[open_round]["missing"]:  # it had done its work already: the next one misses it
        open_round += 1
        until("the survivors commit", lambda: open_round in _rows(watch.look(survivors[0])))
        rows = _rows(watch.look(survivors[0]))
    is_named = victim.peer_id in rows[open_round]["missing"]
    nodes[number] = cluster.start(
        victim.name, "--train", RUN, "--data", str(paths[number]), join=[survivors[0]]
    ).wait_ready()
    until("it is back", lambda: watch.look(nodes[number]).get("round", 0) >= watch.look(survivors[0]).get("round", 1))
    return rows[open_round]["seconds"] / statistics.median(seconds), is_named


def _rows(told: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Rounds that were applied."""
    return {each["round"]: each for each in told.get("rounds", ())}


def _votes(told: dict[str, Any]) -> int:
    return sum(each["votes"] for each in told.get("members", ()))


def _judge(outcome: Outcome, state: torch.Tensor, paths: list[Path], text: str, scale: Scale) -> None:
    """The losses, in this process."""
    loaded = load(resolve("default"), device="cpu", dtype="float32")
    rows = _held_out(loaded, text, scale)
    outcome.before = finish(held_out_loss(loaded.model, rows)).nats_per_token
    losses = []
    for number, path in enumerate(paths):
        config = TrainConfig(seed=number, rate=scale.rate, warmup_steps=20, accumulation=scale.accumulation)
        share = finish(read_texts(find_texts([path]), loaded.tokens))
        trainer = make_trainer(loaded, share, Shape(context=scale.context, rows=scale.rows), config)
        for _ in range(scale.rounds * scale.steps * scale.accumulation):
            trainer.micro_step()
        losses.append(finish(held_out_loss(trainer.model, rows)).nats_per_token)
        if number == 0:
            trainer.layout.load_into(trainer.named, state)
            outcome.loss = finish(held_out_loss(trainer.model, rows)).nats_per_token
    outcome.alone = statistics.mean(losses)


def _held_out(loaded: Loaded, text: str, scale: Scale) -> torch.Tensor:
    ids = loaded.tokens.encode_piece("".join(split_corpus(text).held_out))
    length = scale.context + 1
    starts = [place * (len(ids) // length) // HELD_OUT_ROWS * length for place in range(HELD_OUT_ROWS)]
    return torch.tensor([list(ids[begin : begin + length]) for begin in starts], dtype=torch.int64)


def rows_of(outcome: Outcome) -> list[Row]:
    """The figures."""
    rows = [
        Row(figure="together_loss", value=outcome.loss, unit="nats a token, held out", better="lower", rival="alone",
            rival_value=outcome.alone),
        Row(figure="before_loss", value=outcome.before, unit="nats a token, held out", better="lower"),
        Row(figure="round_s", value=outcome.round_s, unit="s, median", better="lower"),
        Row(figure="roots_equal", value=outcome.roots_equal / max(1, outcome.rounds), unit="share of rounds",
            better="higher"),
    ]  # fmt: skip
    if outcome.kills:
        ratios = sorted(ratio for ratio, _ in outcome.kills)
        named = sum(is_named for _, is_named in outcome.kills)
        rows += [
            Row(figure="kill_one_ratio", value=ratios[-1], unit="x the median round, worst", better="lower"),
            Row(figure="kill_one_within_2", value=sum(ratio <= 2 for ratio in ratios), unit=f"of {len(ratios)}",
                better="higher"),
            Row(figure="kill_one_named", value=named, unit=f"of {len(ratios)}", better="higher"),
        ]  # fmt: skip
    return rows


def main() -> int:
    """Run it, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds, one kill")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--text", type=Path, metavar="FILE", default=TEXT, help="books, by two blank lines")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds before the first kill")
    parser.add_argument("--kills", type=int, metavar="N", help="how many")
    chosen = parser.parse_args()
    if not chosen.text.is_file():
        print(f"there is no text at {chosen.text}; give one: python -m bench.together --text FILE", file=sys.stderr)
        return 2
    usual = Scale(rounds=3, kills=1, steps=2) if chosen.quick else Scale()
    scale = Scale(
        rounds=chosen.rounds or usual.rounds,
        kills=usual.kills if chosen.kills is None else chosen.kills,
        steps=usual.steps,
    )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        outcome = measure(read_text(chosen.text), scale, Path(folder))
    print(f"serving {outcome.served} after {scale.rounds} rounds")
    report("together", rows_of(outcome), Options(quick=chosen.quick, json_path=chosen.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
