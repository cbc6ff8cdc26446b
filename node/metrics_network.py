"""The metrics of the node beside serving: routes, peers, gossip, bytes, drops, training, and the process.

Rules: core; a row as in node/metrics_serving.py.
Source: SERVING.md, "Names people already have dashboards for"; Prometheus, "Metric and label naming".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from node.metric import (
    Metric,
    Reader,
    Sample,
    Told,
    at,
    by_kind,
    count,
    counted,
    counts,
    drops,
    each,
    found,
    gauge,
    in_training,
    node_facts,
    number,
    peer_requests,
    peer_rtts,
    routes,
    spread,
)

TRAINING: Final = "node/training_told.py"
PROCESS: Final = "node/process.py"


def _lag(told: Told) -> Iterator[Sample]:
    if (lag := told.measured.loop_lag_s) is not None:
        yield (), lag


def _searches(told: Told) -> Iterator[Sample]:
    if (known := counted(told.status, "inference.counts.searches")) is not None:
        yield (), known


def _drops(told: Told) -> Iterator[Sample]:
    return (((part, reason), count) for part, reason, count in drops(told.status))


def _disk(told: Told) -> Iterator[Sample]:
    if (degraded := found(told.status, "disk.degraded")) is not None:
        yield (), len(degraded)


_ROUTES: Final = "node/inference.py, attempts for own clients"
_GOSSIP: Final = "gossip/directory.py"
_CLAIMS: Final = "gossip/claims.py"
_TRANSPORT: Final = "p2p/transport.py"
NETWORK: Final = (
    gauge("peers_connected", "Peers of this network.", "p2p/peering_status.py", at("peering.connected")),
    gauge("peers_known", "Peers with an address in the book.", "p2p/peering_status.py", at("peering.known")),
    gauge(
        "peer_rtt_seconds",
        "Round trip to a connected peer, of 32 at most.",
        "p2p/peering_status.py",
        peer_rtts,
        "peer",
        unit="s",
    ),
    count(
        "peer_requests_total",
        "Requests sent to a peer, by how they ended (finished, failed); of the 32 asked most.",
        "node/peer_tallies.py",
        peer_requests,
        "peer",
        "outcome",
    ),
    count(
        "route_total",
        "Attempts to have a request answered, by who answered (local, peer) or that it failed, where and why.",
        _ROUTES,
        routes,
        "outcome",
        "at",
        "reason",
    ),
    count(
        "route_failover_total",
        "Further attempts after a failed one, by how far the answer was.",
        _ROUTES,
        counts("before_first_token", "mid_stream", prefix="failover:"),
        "phase",
    ),
    count("route_searches_total", "Questions to the network who serves a model.", _ROUTES, _searches),
    count(
        "gossip_adverts_total",
        "Adverts heard, by what became of them.",
        _GOSSIP,
        by_kind("gossip.directory.outcomes"),
        "outcome",
    ),
    count("gossip_adverts_sent_total", "Own adverts sent.", "gossip/service.py", at("gossip.adverts_sent")),
    count(
        "gossip_summaries_total",
        "Peers' summaries of their own state heard, by what became of them.",
        _CLAIMS,
        by_kind("gossip.claims.heard"),
        "outcome",
    ),
    count("gossip_summaries_sent_total", "Own ones sent.", "gossip/summaries.py", at("gossip.claims.said")),
    count(
        "gossip_claims_judged_total",
        "Claims that own observation of the peer bears out, or not.",
        _CLAIMS,
        by_kind("gossip.claims.judged"),
        "observation",
    ),
    gauge("gossip_claims", "Live claims of peers on their own state.", _CLAIMS, at("gossip.claims.claims")),
    gauge("gossip_offers", "Live offers of others.", _GOSSIP, at("gossip.directory.offers")),
    gauge("gossip_peers_banned", "Now.", "gossip/standing.py", at("gossip.standing.banned")),
    gauge(
        "clock_offset_seconds",
        "Median of peers' clocks minus this machine's.",
        _GOSSIP,
        at("gossip.directory.clock_offset_ms", scale=0.001),
        unit="s",
    ),
    count(
        "transport_bytes_total",
        "Of frames, in and out.",
        _TRANSPORT,
        each(**{"in": "transport.bytes_in", "out": "transport.bytes_out"}),
        "direction",
        unit="bytes",
    ),
    count(
        "transport_frames_total",
        "In and out.",
        _TRANSPORT,
        each(**{"in": "transport.frames_in", "out": "transport.frames_out"}),
        "direction",
    ),
    gauge("transport_streams", "Open now.", _TRANSPORT, at("transport.streams_open")),
    gauge("gossip_mesh_peers", "With whom gossip is exchanged at once.", _TRANSPORT, at("transport.mesh_peers")),
    count(
        "blob_bytes_total",
        "Of training's bulk, fetched (in) and given (out).",
        "gossip/blobs.py",
        each(**{"in": "blobs.fetched.bytes", "out": "blobs.given.bytes"}),
        "direction",
        unit="bytes",
    ),
    gauge("direct_channels", "Open now, both ways.", "p2p/direct.py", at("direct.channels")),
    count(
        "calls_total",
        "Calls of the inference protocol to peers (out) and of them (in).",
        "p2p/calls.py",
        each(**{"in": "calls.calls_in", "out": "calls.calls_out"}),
        "direction",
    ),
    count("http_requests_total", "At this node's door, all of them.", "node/web/door.py", at("web.requests")),
    gauge("http_connections", "Open now.", "node/web/door.py", at("web.connections")),
    count(
        "drops_total",
        "What was dropped, refused, limited or held against a peer.",
        "each part of the status that counts by reason",
        _drops,
        "part",
        "reason",
    ),
)


def _of_run(way: str) -> Reader:
    return in_training(lambda told: number(found(told, way)))


TRAININGS: Final = (
    gauge("training_round", "The round that is open.", TRAINING, _of_run("round"), "run"),
    gauge("training_loss", "Of this node's own steps, smoothed.", TRAINING, _of_run("loss"), "run", unit="nats/token"),
    gauge(
        "training_held_out_loss",
        "Of the shared weights on this node's held-out text.",
        TRAINING,
        _of_run("held_out_loss"),
        "run",
        unit="nats/token",
    ),
    gauge("training_members", "Members of the run.", TRAINING, in_training(lambda told: len(told["members"])), "run"),
    gauge(
        "training_members_here",
        "Of these, those that this round has heard.",
        TRAINING,
        in_training(lambda told: sum(member["here_this_round"] for member in told["members"])),
        "run",
    ),
    count("training_steps_total", "Own steps since start.", TRAINING, _of_run("work.steps"), "run"),
    count("training_tokens_total", "Tokens of these.", TRAINING, _of_run("work.tokens"), "run"),
    count("training_late_total", "Rounds that were over before own work was.", TRAINING, _of_run("work.late"), "run"),
    count(
        "training_rounds_applied_total",
        "Rounds taken over here.",
        TRAINING,
        in_training(lambda told: counted(told, "counts.applied")),
        "run",
    ),
    gauge(
        "training_round_seconds", "How long the open round has lasted.", TRAINING, _of_run("round_s"), "run", unit="s"
    ),
    gauge(
        "training_round_seconds_median", "Of rounds seen whole.", TRAINING, _of_run("round_s_median"), "run", unit="s"
    ),
    gauge(
        "training_update_bytes_max",
        "Of one member's update.",
        TRAINING,
        _of_run("run.update_bytes_max"),
        "run",
        unit="bytes",
    ),
)

_STANDARD: Final = (
    Metric(
        name="process_resident_memory_bytes",
        type="gauge",
        help="Memory in use.",
        unit="bytes",
        source=PROCESS,
        read=at("node.rss_bytes"),
    ),
    Metric(
        name="process_cpu_seconds_total",
        type="counter",
        help="User and system time.",
        unit="s",
        source=PROCESS,
        read=at("node.cpu_s"),
    ),
    Metric(
        name="process_open_fds",
        type="gauge",
        help="Open files and sockets; not on Windows.",
        unit="",
        source=PROCESS,
        read=at("node.open_files"),
    ),
    Metric(
        name="process_start_time_seconds",
        type="gauge",
        help="Since the Unix epoch.",
        unit="s",
        source=PROCESS,
        read=at("node.started_s"),
    ),
)
NODE: Final = (
    *_STANDARD,
    gauge("threads", "Of this process.", PROCESS, at("node.threads")),
    gauge("tasks", "Of its loop.", "node/state.py", at("node.tasks")),
    spread(
        "loop_lag_seconds", "How late the loop comes to what is due, looked at twice a second.", PROCESS, _lag, unit="s"
    ),
    gauge("ready", "Whether requests are accepted.", "node/state.py", at("readiness.ready")),
    gauge("disk_degraded", "Files that cannot be saved now.", "crypto/disk.py", _disk),
    gauge("node_info", "1; what it is stands in the labels.", "node/state.py", node_facts, "version", "network"),
)
