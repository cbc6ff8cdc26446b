"""`python -m bench.real_swarm`: real node processes under load, and what becomes of each request while they are killed.

Rules: clients ask through doors without a model, inside the door's own host, so that no fault stands between the two.
One node is killed (-9) every 5 s and started again later; meanwhile one node freezes, hosts are cut off, get a
narrow or a slow and lossy cable, in turn, as far as this machine lets us; what could not be done is printed. The exit
code is 1 when a request is unresolved, an answer was cut short, or a log holds a traceback.
Reroute: from a kill of the peer that serves to the end of the silence that it makes at the client.
`--quick`: 60 s. Bars of the third issue: 0 unresolved, reroute p95 < 2 s, recovery after a cut < 15 s.
"""

from __future__ import annotations

import argparse
import itertools
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bench.harness import Options, Row, quantile, report
from bench.real_clients import (
    DOOR_KILLED,
    ERROR,
    LEFT,
    REFUSED,
    REQUEST_S_MAX,
    RESULT,
    UNRESOLVED,
    Client,
    Request,
    differing,
)
from bench.real_faults import ALL, Faults, Member, Swarm, connected
from bench.real_net import Fabric, Host, enter, why_not, why_not_narrow, why_not_slow
from node.commands.processes import Cluster

SECONDS, SECONDS_QUICK = 600.0, 60.0
NODES, SERVERS, HOSTS, CLIENTS = 10, 3, 3, 4
KILL_EVERY_S = 5.0
LOOK_EVERY_S = 0.1
START_S_MAX = 600.0  # on a busy machine
SLOW_S, BESIDE_S = 1.5, 5.0  # a reroute that is told in words, with the faults that long before it
LATE_S = 0.05  # an answer that is whole so soon after the kill had left the peer before


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All that was seen."""

    requests: list[Request]
    members: list[Member]
    faults: Faults
    stuck: int  # requests that had not ended long after the last fault
    tracebacks: list[str]


def main() -> int:
    """Run, check, report; 0 when the contract held."""
    chosen = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nodes and namespaces are cleared away
    kinds, reasons = possible(frozenset(chosen.faults.split(",")))
    for kind, reason in reasons.items():
        print(f"not run: {kind}: {reason}", flush=True)
    print(f"faults: {', '.join(kind for kind in ALL if kind in kinds) or 'none'}; seed {chosen.seed}", flush=True)
    seconds = chosen.seconds or (SECONDS_QUICK if chosen.quick else SECONDS)
    with tempfile.TemporaryDirectory(prefix="openagi-swarm-") as place:
        cloth = Fabric(HOSTS) if kinds - {"kill", "freeze"} else None
        try:
            with Cluster(Path(place)) as cluster:
                hosts = cloth.hosts if cloth is not None else [loopback()]
                outcome = endured(cluster, hosts, cloth, kinds, chosen, seconds)
        finally:
            if cloth is not None:
                cloth.close()
    tell(outcome)
    report("real_swarm", rows(outcome), Options(quick=chosen.quick, json_path=chosen.json))
    wrong = outcome.stuck or outcome.tracebacks or any(one.end == UNRESOLVED for one in outcome.requests)
    return 1 if wrong else 0


def possible(asked: frozenset[str]) -> tuple[frozenset[str], dict[str, str]]:
    """Which faults can be made here, and why not the others."""
    reasons = dict.fromkeys(sorted(asked - {"kill", "freeze", ""}), why_not())
    if "slow" in asked:
        reasons["slow"] = reasons["slow"] or why_not_slow()
    if reasons.get("narrow") == "":
        with Fabric(1) as trial:
            reasons["narrow"] = why_not_narrow(trial)
    reasons = {kind: reason for kind, reason in reasons.items() if reason}
    return asked - reasons.keys() - {""}, reasons


def loopback() -> Host:
    """The one host where there are no namespaces."""
    return Host(0, "", "127.0.0.1", iter(_free_ports()))


def endured(
    cluster: Cluster,
    hosts: list[Host],
    fabric: Fabric | None,
    kinds: frozenset[str],
    chosen: argparse.Namespace,
    seconds: float,
) -> Outcome:
    """Start all, let the clients ask while things happen, and see every request to its end."""
    rng = random.Random(chosen.seed)
    swarm = Swarm(cluster, hosts, chosen.nodes, chosen.servers)
    faults = Faults(swarm, fabric, kinds, rng)
    await_all(swarm)
    done = threading.Event()
    clients, threads = [], []
    for number in range(CLIENTS):
        host = hosts[number % len(hosts)]
        client = Client(lambda host=host: swarm.doors(host), rng.randrange(1 << 30))  # type: ignore[misc]  # lambda
        clients.append(client)
        threads.append(threading.Thread(target=_in_host, args=(host, client, done), daemon=True))
    for thread in threads:
        thread.start()
    try:
        befall(swarm, faults, chosen.kill_every if "kill" in kinds else seconds, seconds)
    finally:
        faults.lift()
        done.set()
    until = time.monotonic() + REQUEST_S_MAX
    while any(thread.is_alive() for thread in threads) and time.monotonic() < until:
        swarm.look(time.monotonic())
        time.sleep(LOOK_EVERY_S)
    return Outcome(
        requests=[request for client in clients for request in client.requests],
        members=swarm.members,
        faults=faults,
        stuck=sum(thread.is_alive() for thread in threads),
        tracebacks=tracebacks(cluster.root),
    )


def _in_host(host: Host, client: Client, done: threading.Event) -> None:
    enter(host.namespace)
    client.run(done)


def await_all(swarm: Swarm) -> None:
    """Until every node is ready and every door knows all who serve. Raises TimeoutError."""
    until = time.monotonic() + START_S_MAX
    serving = {member.peer_id for member in swarm.members if member.serves}
    waiting = [member for member in swarm.members if not member.serves]
    while waiting:
        if time.monotonic() > until:
            raise TimeoutError(f"not all nodes were ready and joined within {START_S_MAX:.0f} s")
        swarm.look(time.monotonic())
        door = waiting[0].door()
        ready = all(member.healthy for member in swarm.members)
        if ready and door is not None and serving <= connected(waiting[0].host, door):
            waiting.pop(0)
        else:
            time.sleep(LOOK_EVERY_S)


def befall(swarm: Swarm, faults: Faults, kill_every_s: float, seconds: float) -> None:
    """Kill one every kill_every_s, and let the other faults take their turns."""
    began = time.monotonic()
    next_kill = began + kill_every_s
    others, next_other = faults.others(), began
    while (now := time.monotonic()) - began < seconds:
        swarm.look(now)
        if now >= next_kill:
            next_kill += kill_every_s
            faults.kill_one()
        if now >= next_other:
            next_other = time.monotonic() + next(others)
        time.sleep(LOOK_EVERY_S)


def tracebacks(root: Path) -> list[str]:
    """The logs' unexpected ends: name and last words of each traceback."""
    found = []
    for log in sorted(root.glob("*.log")):
        text = log.read_text(errors="replace")
        for piece in text.split("Traceback (most recent call last)")[1:]:
            found.append(f"{log.stem}: {piece[:3000]}")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Reroute:
    """Seconds from a kill (or freeze), at `at`, of the peer that served a stream to the end of the silence it made."""

    waited_s: float
    at: float
    server: str
    request: Request


def reroutes(outcome: Outcome, times: str) -> list[Reroute]:
    """Of all streams that were open at a kill (or freeze) of who served them.

    times: kills or freezes. Only requests whose serving peer was not touched before count: the client is told who
    serves at the start only.
    """
    by_id = {member.peer_id: member for member in outcome.members}
    found = []
    for one in outcome.requests:
        member = by_id.get(one.served_by)
        if member is None or one.end not in (RESULT, ERROR) or not one.arrivals:
            continue
        touched = sorted(at for at in (*member.kills, *member.freezes) if one.began < at < one.ended)
        if touched and touched[0] in getattr(member, times) and touched[0] > one.arrivals[0]:
            waited_s = silence_s([*one.arrivals, one.ended], touched[0])
            if waited_s is not None:
                found.append(Reroute(waited_s=waited_s, at=touched[0], server=member.name, request=one))
    return found


def silence_s(arrivals: list[float], at: float) -> float | None:
    """From `at` to the end of the longest silence that `at`, or the half second after it, lies in; None: it was over.

    What had left the peer before may come for a moment still.
    """
    if arrivals[-1] - at < LATE_S:
        return None
    gaps = [
        (after - before, after) for before, after in itertools.pairwise(arrivals) if after > at and before < at + 0.5
    ]
    return max(gaps)[1] - at


def rows(outcome: Outcome) -> list[Row]:
    """The figures."""
    requests = outcome.requests
    ends = Counter(one.end for one in requests)
    stayed = ends.total() - ends[DOOR_KILLED] - ends[LEFT]
    done_s = [one.ended - one.began for one in requests if one.end == RESULT]
    killed_s, frozen_s = ([one.waited_s for one in reroutes(outcome, times)] for times in ("kills", "freezes"))
    happened = Counter(one.what for one in outcome.faults.happened)
    accepted = sum(one.accepted for one in requests)
    found = [
        Row(figure="asked", value=ends.total(), unit="requests", better="higher"),
        Row(figure="accepted", value=accepted, unit="requests", better="higher"),
        Row(figure="unresolved", value=ends[UNRESOLVED] + outcome.stuck, unit="requests", better="lower"),
        Row(
            figure="success_ratio",
            value=ends[RESULT] / max(1, stayed),
            unit="of all asked whose client and door stayed",
            better="higher",
        ),
        Row(figure="refused", value=ends[REFUSED], unit="requests, in words", better="lower"),
        Row(figure="errors", value=ends[ERROR], unit="accepted requests", better="lower"),
        Row(figure="door_killed", value=ends[DOOR_KILLED], unit="requests", better="lower"),
        Row(figure="different_text", value=len(differing(requests)), unit="results", better="lower"),
        Row(figure="p50_s", value=quantile(done_s, 0.5), unit="s to completion", better="lower"),
        Row(figure="p95_s", value=quantile(done_s, 0.95), unit="s to completion", better="lower"),
        *_spread("reroute", "s from a kill to the next token", killed_s),
        *_spread("reroute_frozen", "s from a freeze to the next token", frozen_s),
        *_spread("recovery", "s from the end of a cut", outcome.faults.recoveries_s),
        Row(figure="tracebacks", value=len(outcome.tracebacks), unit="in logs", better="lower"),
    ]
    found += [Row(figure=f"faults_{kind}", value=happened[kind], unit="times", better="higher") for kind in ALL]
    return found


def _spread(name: str, unit: str, values: list[float]) -> list[Row]:
    if not values:
        return []
    p95 = quantile(values, 0.95) if len(values) > 1 else values[0]
    return [
        Row(figure=f"{name}_n", value=len(values), unit="times", better="higher"),
        Row(figure=f"{name}_p95_s", value=p95, unit=unit, better="lower"),
        Row(figure=f"{name}_max_s", value=max(values), unit=unit, better="lower"),
    ]


def tell(outcome: Outcome) -> None:
    """What went wrong, in words."""
    for end in (REFUSED, ERROR, UNRESOLVED):
        whys = Counter(one.why[:160] for one in outcome.requests if one.end == end)
        for why, count in whys.most_common(12):
            print(f"{end} {count}: {why}")
    for one in reroutes(outcome, "kills"):
        if one.waited_s > SLOW_S:
            beside = [
                f"{fault.what} {fault.whom} {fault.at - one.at:+.1f} to {fault.until - one.at:+.1f} s"
                for fault in outcome.faults.happened
                if fault.until > one.at - BESIDE_S and fault.at < one.at + one.waited_s
            ]
            print(
                f"slow reroute: {one.waited_s:.1f} s after {one.server} was killed, at {one.request.door}, after "
                f"{len(one.request.arrivals)} pieces in all; beside it: {'; '.join(beside)}"
            )
    for told in outcome.faults.link_told:
        print(f"slow link: {told}")
    for text in outcome.tracebacks[:5]:
        print(f"TRACEBACK {text}", file=sys.stderr)
    if outcome.stuck:
        print(f"WRONG: {outcome.stuck} clients were still waiting {REQUEST_S_MAX:.0f} s after the last fault")


def _free_ports() -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(64)]
    try:
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{SECONDS_QUICK:.0f} s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--seconds", type=float, default=0.0, help=f"of faults and load (default {SECONDS:.0f})")
    parser.add_argument("--nodes", type=int, default=NODES, help="processes in all")
    parser.add_argument("--servers", type=int, default=SERVERS, help="of them with a model")
    parser.add_argument("--kill-every", type=float, default=KILL_EVERY_S, metavar="S")
    parser.add_argument("--faults", default=",".join(ALL), help="which, separated by commas")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    if chosen.servers < 2 or chosen.nodes < chosen.servers + HOSTS:
        parser.error(
            f"--servers {chosen.servers} --nodes {chosen.nodes} came, wanted 2 and {HOSTS} more nodes at least"
        )
    unknown = set(chosen.faults.split(",")) - {*ALL, ""}
    if unknown:
        parser.error(f"--faults {', '.join(sorted(unknown))} came; known are {', '.join(ALL)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
