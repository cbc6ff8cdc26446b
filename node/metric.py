"""What a metric is, and the few ways in which one is read out of what the node tells of itself.

Rules: core. A metric has one source; what is not known is left out, never made up. A label's value is a word of this
code, the name of a model that is served, a peer's id of a bounded list, or a drop's reason: nothing that a client
sends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from model.histogram import Distribution
from node.front import Measured
from node.tallies import RowStatistics, revision_label

REASONED = frozenset({"drops", "dropped", "faults", "outcomes", "errors", "failures", "left_out"})
NOT_DROPPED = frozenset({"accepted"})
PEERS_MAX = 32  # of a metric that has a label for each
MODEL = ("model", "revision")
PREFIX = "openagi_"

Number = int | float
Value = Number | Distribution
Sample = tuple[tuple[str, ...], Value]  # the labels' values, in their order, and what was counted


@dataclass(frozen=True, slots=True)
class Told:
    """All that the node tells: the status, and what is measured beside it."""

    status: Mapping[str, Any]
    measured: Measured = field(default_factory=Measured)


Reader = Callable[[Told], Iterable[Sample]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric. source: for people, who counts it; unit: "" for a plain count."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    help: str
    unit: str
    source: str
    labels: tuple[str, ...] = ()
    read: Reader


def _maker(type: Literal["counter", "gauge", "histogram"]) -> Callable[..., Metric]:
    def make(name: str, help: str, source: str, read: Reader, *labels: str, unit: str = "") -> Metric:
        return Metric(name=PREFIX + name, type=type, help=help, unit=unit, source=source, labels=labels, read=read)

    return make


count, gauge, spread = _maker("counter"), _maker("gauge"), _maker("histogram")


def found(told: Mapping[str, Any], way: str) -> Any:
    """What stands at a dotted way, None where nothing does."""
    value: Any = told
    for name in way.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def counted(told: Mapping[str, Any], way: str) -> Number | None:
    """The count at a dotted way: what is not yet in a table of counts has not happened. None: there is no table."""
    table, _, name = way.rpartition(".")
    counts = found(told, table)
    return number(counts.get(name, 0)) if isinstance(counts, Mapping) else None


def number(value: object) -> Number | None:
    """The value if it is a number, a yes or a no."""
    return value if isinstance(value, int | float) else None


def at(way: str, *, scale: float = 1) -> Reader:
    """The number at a dotted way in the status. scale: what it is multiplied by, to be in the metric's unit."""

    def read(told: Told) -> Iterator[Sample]:
        if (value := number(found(told.status, way))) is not None:
            yield (), value if scale == 1 else value * scale

    return read


def by_kind(way: str, *words: str) -> Reader:
    """The numbers of a table at a dotted way in the status, by their names there; those of `words` also while they are
    not in it, since a counter begins at zero."""

    def read(told: Told) -> Iterator[Sample]:
        if (table := found(told.status, way)) is None:
            return
        for kind, value in (dict.fromkeys(words, 0) | table).items():
            if (known := number(value)) is not None:
                yield (str(kind),), known

    return read


def each(**ways: str) -> Reader:
    """Several counts of the status as one metric, each under a word of ours."""

    def read(told: Told) -> Iterator[Sample]:
        for word, way in ways.items():
            if (known := counted(told.status, way)) is not None:
                yield (word,), known

    return read


def counts(*words: str, prefix: str) -> Reader:
    """Of the counts of requests those that begin with a prefix, by what follows it; those of `words` also while they
    are zero."""

    def read(told: Told) -> Iterator[Sample]:
        if (known := found(told.status, "inference.counts")) is None:
            return
        rows = dict.fromkeys(words, 0) | dict(_after(prefix, known))
        yield from (((word,), count) for word, count in rows.items())

    return read


def of_models(what: Callable[[RowStatistics], Iterable[Sample]]) -> Reader:
    """A row for each model that answered this node's own clients. what: further labels' values, and the value."""

    def read(told: Told) -> Iterator[Sample]:
        for row in told.measured.models:
            yield from (((row.model, row.revision, *labels), value) for labels, value in what(row))

    return read


def of_engine(what: Callable[[Told, Mapping[str, Any]], Value | None]) -> Reader:
    """A figure of the engine in this process, by the model that it serves. what: of its part of the status."""

    def read(told: Told) -> Iterator[Sample]:
        model = told.status.get("model")
        if not isinstance(model, Mapping) or not model.get("linears") or not model["engine"]["slots_total"]:
            return  # no model, a server behind this node, which has metrics of its own, or one that makes vectors only
        if (value := what(told, model)) is not None:
            facts = model["models"][0]
            yield (str(facts["name"]), revision_label(str(facts["revision"]))), value

    return read


def engine_count(name: str) -> Reader:
    """A number of EngineStatistics."""
    return of_engine(lambda _, model: number(model["engine"][name]))


def in_training(what: Callable[[Mapping[str, Any]], Value | None]) -> Reader:
    """A figure of the run of training that this node is in, by its name. what: of what GET /api/v1/training tells."""

    def read(told: Told) -> Iterator[Sample]:
        run = told.measured.training.get("run")
        if isinstance(run, Mapping) and (value := what(told.measured.training)) is not None:
            yield (str(run["name"]),), value

    return read


def drops(status: Mapping[str, Any], part: str = "") -> Iterator[tuple[str, str, int]]:
    """(part, reason, count since start) of all that is counted by reason; `part` is the dotted way to it."""
    for name, value in status.items():
        if not isinstance(value, Mapping):
            continue
        way = f"{part}.{name}" if part else str(name)
        if name in REASONED:
            for reason, count in value.items():
                if isinstance(count, int) and reason not in NOT_DROPPED:
                    yield way, str(reason), count
        else:
            yield from drops(value, way)


def routes(told: Told) -> Iterator[Sample]:
    """Attempts to have a request answered: outcome, where, and the reason of a failure."""
    known = found(told.status, "inference.counts")
    if known is None:
        return
    for where in ("local", "peer"):
        yield (where, where, ""), known.get(f"route:{where}", 0)
        for reason, count in _after(f"{where}_failed:", known):
            yield ("failed", where, reason), count


def peer_rtts(told: Told) -> Iterator[Sample]:
    """Of PEERS_MAX connected peers: those asked most, then those connected longest."""
    busy = list(found(told.status, "inference.busiest_peers") or ())
    rows = [row for row in found(told.status, "peering.peers") or () if row["rtt_ms"] is not None]
    rank = {peer: place for place, peer in enumerate(busy)}
    rows.sort(key=lambda row: (rank.get(row["peer"], len(rank)), -row["connected_s"]))
    for row in rows[:PEERS_MAX]:
        yield (str(row["peer"]),), row["rtt_ms"] / 1000


def peer_requests(told: Told) -> Iterator[Sample]:
    """Of the busiest peers."""
    for peer, ends in (found(told.status, "inference.busiest_peers") or {}).items():
        yield from (((str(peer), outcome), count) for outcome, count in ends.items())


def backend_up(told: Told) -> Iterator[Sample]:
    """Nothing while there is no backend."""
    if isinstance(backend := told.status.get("backend"), Mapping):
        labels = str(backend.get("kind")), str(backend.get("server") or "")
        yield labels, int(not backend.get("problem"))


def node_facts(told: Told) -> Iterator[Sample]:
    """Always 1: what it says stands in the labels."""
    if (node := told.status.get("node")) and "version" in node:
        yield (str(node["version"]), str(node["network"])), 1


def _after(prefix: str, known: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    return ((name.removeprefix(prefix), count) for name, count in known.items() if name.startswith(prefix))
