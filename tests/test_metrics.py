"""GET /metrics: read by Prometheus' own parsers, each count goes up with its cause, and nobody's secret is in it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import trio
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from trio.testing import MockClock

from model.errors import ComputeFailed
from node.front import Measured, Route, RouteHint
from node.metric import PEERS_MAX, Told, peer_rtts
from node.metrics import (
    METRICS,
    OPENMETRICS_TYPE,
    openmetrics_text,
    page,
    prometheus_text,
    wants_openmetrics,
)
from node.metrics_network import TRAININGS
from node.tallies import Tallies
from node.web.app import build_app
from node.work import EmbedWork, Piece, Sampling
from p2p.calls import Incoming
from p2p.errors import RemoteError
from tests.fake_runtime import FakeRuntime
from tests.node_swarm import Got, Node, Swarm, ask, eventually, prefer, work
from tests.test_house import ROOT

CANARY = "xanthippe"  # stands in everything that a client or a hostile peer can send
STRANGER = "203.0.113.77"
LOCAL, REMOTE = RouteHint(route=Route.LOCAL), RouteHint(route=Route.REMOTE)
GREEDY = Sampling(max_tokens=6, temperature=0.0)
TRAINED: dict[str, Any] = {  # as node/training_told.py has it; tests/test_training.py compares
    "run": {"name": "tales", "update_bytes_max": 1000},
    "round": 7,
    "loss": 2.5,
    "held_out_loss": 2.75,
    "members": [{"here_this_round": True}, {"here_this_round": False}],
    "work": {"steps": 40, "tokens": 4000, "late": 1},
    "counts": {"applied": 6},
    "round_s": 1.5,
    "round_s_median": 3.5,
}


@pytest.fixture
async def swarm() -> AsyncIterator[Swarm]:
    async with Swarm().running() as swarm:
        yield swarm


class Scraped:
    """The samples of one node at a moment, by name and labels."""

    def __init__(self, node: Node) -> None:
        self.text = prometheus_text(node.state.status(), node.state.measured())
        self.samples = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in parse_text(self.text)
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of the samples of a name that have these labels."""
        wanted = set(labels.items())
        found = [
            value for (each, *has), value in self.samples.items() if each == f"openagi_{name}" and wanted <= {*has}
        ]
        assert found, f"there is no {name} of {labels}"
        return sum(found)


async def test_both_formats_are_what_prometheus_reads(swarm: Swarm, autojump_clock: MockClock) -> None:
    here, door = await swarm.start(FakeRuntime()), await swarm.start()
    await swarm.settled()
    for node in (here, door):
        assert (await ask(node, work())).error is None
        assert (await ask(node, work(model=CANARY))).error is not None
        status, measured = node.state.status(), node.state.measured()
        texts = {family.name: family for family in parse_text(prometheus_text(status, measured))}
        open_ones = {family.name: family for family in parse_openmetrics(openmetrics_text(status, measured))}
        assert texts.keys() == open_ones.keys()
        for name, family in open_ones.items():
            assert family.type == texts[name].type
            labels = [(sample.name, *sorted(sample.labels.items())) for sample in family.samples]
            assert len(labels) == len(set(labels)), f"{name} tells a series twice"
    assert not [sample for sample in Scraped(door).samples if "num_requests" in sample[0]], "it has no engine"


async def test_counters_go_up_when_requests_are_served(swarm: Swarm, autojump_clock: MockClock) -> None:
    here, door = await swarm.start(FakeRuntime()), await swarm.start()
    await swarm.settled()
    before = Scraped(here)
    assert before("request_success_total", model="tale", finished_reason="length") == 0, "a counter begins at zero"
    for _ in range(3):
        assert (await ask(here, work("again", keep=True, sampling=GREEDY), LOCAL)).error is None
    await here.inference.embed(EmbedWork(request_id="e", texts=("one", "two")), LOCAL)
    assert (await ask(door, work(tokens=6))).error is None
    await eventually(lambda: door.network.peering.rtt_ms(here.id) is not None, 60)
    now, far = Scraped(here), Scraped(door)

    own = {"model": "tale", "revision": "r1"}
    assert now("request_success_total", finished_reason="length", **own) == 3
    assert now("inference_count_total", **own) == 4
    assert now("prompt_tokens_total", **own) == 3 * len("again") + len("onetwo")
    assert now("generation_tokens_total", **own) == 18
    assert now("time_to_first_token_seconds_count", **own) == 3
    assert now("inter_token_latency_seconds_count", **own) == 5, "of the answer that was made and not kept"
    assert now("inter_token_latency_seconds_sum", **own) == pytest.approx(0.5)
    assert now("e2e_request_latency_seconds_count", **own) == 3
    assert now("embedding_request_latency_seconds_count", **own) == 1
    assert now("average_latency_ms", **own) > 0
    assert now("response_cache_queries_total", kind="completion") == 3
    assert now("response_cache_hits_total", kind="completion") == 2
    assert now("embedding_texts_total") == 2
    assert now("route_total", outcome="local", at="local") == 4
    assert now("request_queue_time_seconds_count", **own) == 2, "what was kept asked the engine for nothing"
    assert now("request_prefill_time_seconds_count", **own) == 2
    assert now("request_decode_time_seconds_count", **own) == 2
    assert now("iteration_tokens_total_count", **own) == 12
    assert now("calls_total", direction="in") == 1

    assert far("route_total", outcome="peer", at="peer") == 1
    assert far("peer_requests_total", outcome="finished", peer=here.id) == 1
    assert far("peer_rtt_seconds", peer=here.id) >= 0
    assert far("generation_tokens_total", **own) == 6
    assert far("peers_connected") == 1
    assert far("gossip_adverts_total", outcome="accepted") > 0
    assert far("transport_bytes_total", direction="in") > 0
    status = door.state.status()
    assert status["latency"]["ttft_s"]["count"] == 1
    assert 0 < status["latency"]["token_s"]["p50"] <= status["latency"]["token_s"]["p99"] <= 0.15
    assert status["throughput"]["generation_tok_s"] > 0


async def test_counters_go_up_when_requests_fail(swarm: Swarm, autojump_clock: MockClock) -> None:
    async def refuses(incoming: Incoming) -> Any:
        raise RemoteError(CANARY, CANARY, retryable=True)

    door, liar = await swarm.start(), await swarm.start(FakeRuntime(), lies={"generate": refuses})
    first = await swarm.start(FakeRuntime())
    await swarm.settled()
    prefer(door, liar, first)
    got = Got()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(door, work(tokens=100), got=got))
        await eventually(lambda: bool(first.engine.busy), 30)
        await swarm.start(FakeRuntime())
        await swarm.settled()
        first.engine.fails = ComputeFailed("not finite")
    assert got.is_right("hello", 100)
    now = Scraped(door)
    assert now("route_failover_total", phase="before_first_token") == 1
    assert now("route_failover_total", phase="mid_stream") == 1
    assert now("route_total", outcome="failed", at="peer", reason="another_word") == 1
    assert now("route_total", outcome="failed", at="peer", reason="internal") == 1
    assert now("peer_requests_total", outcome="failed", peer=liar.id) == 1
    assert now("time_to_first_token_seconds_count", model="tale") == 1, "it is one answer, whoever goes on"

    with trio.move_on_after(1.0):
        await ask(door, work(tokens=100))
    assert (await ask(door, work(model="no such model"))).error is not None
    assert (await ask(door, work(tokens=500, remaining_ms=1000))).error is not None
    now = Scraped(door)
    assert now("request_success_total", model="tale", finished_reason="abort") == 1
    assert now("error_count_total", model="", code="unknown_model") == 1
    assert now("error_count_total", model="tale", code="deadline") == 1
    assert now("errors_per_second") > 0
    assert now("route_searches_total") == 1
    assert CANARY not in now.text


async def test_the_engine_is_told_while_it_works(swarm: Swarm, autojump_clock: MockClock) -> None:
    here = await swarm.start(FakeRuntime(slots=1))
    assert Scraped(here)("kv_cache_usage_perc", model="tale") == 0.0
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask, here, work(tokens=50))
        await trio.sleep(1.0)
        now = Scraped(here)
        assert now("num_requests_running", model="tale") == 1
        assert now("num_requests_waiting", model="tale") == 2
        assert now("hosted_requests") == now("requests_open") == 3
        nursery.cancel_scope.cancel()


async def test_what_clients_send_stands_in_no_metric(swarm: Swarm, autojump_clock: MockClock) -> None:
    here = await swarm.start(FakeRuntime())
    app = build_app(here.state, random.Random(1))
    transport = httpx.ASGITransport(app=app, client=(STRANGER, 5), raise_app_exceptions=False)
    headers = {"authorization": f"Bearer {CANARY}", "user-agent": CANARY, "x-request-id": CANARY, "referer": CANARY}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": CANARY, "max_tokens": 3}),
        ("/v1/completions", {"prompt": CANARY, "model": CANARY}),
        ("/v1/completions", {CANARY: CANARY}),
        ("/v1/chat/completions", {"messages": [{"role": CANARY, "content": CANARY}], "user": CANARY, "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": CANARY}], "stop": CANARY, "max_tokens": 2}),
        ("/v1/embeddings", {"input": CANARY}),
        ("/v1/embeddings", {"input": CANARY, "model": CANARY}),
        (f"/{CANARY}", {}),
    ]
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
        for path, body in asked:
            await client.post(path, json=body)
            await client.post(path, json=body, headers={"x-peer": CANARY, "x-route": CANARY})
            await client.post(path, json=body, headers={"host": f"{CANARY}.example", "origin": f"http://{CANARY}"})
        texts = [(await client.get(each)).text for each in ("/metrics", "/api/v1/metrics/model")]
        open_one = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert here.inference.counts["finished"] > 0, "some were answered"
    for text in (*texts, open_one.text):
        assert "tale" in text
        for secret in (CANARY, STRANGER, STRANGER.rpartition(".")[0]):
            assert secret not in text.lower()


async def test_the_model_routes_tells_percentiles(swarm: Swarm, autojump_clock: MockClock) -> None:
    here = await swarm.start(FakeRuntime())
    app = build_app(here.state, random.Random(1))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        await client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 5})
        await client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 5000})
        (row,) = (await client.get("/api/v1/metrics/model")).json()["models"]
    assert (row["model"], row["revision"], row["inference_count"]) == ("tale", "r1", 1)
    assert row["average_latency_ms"] == pytest.approx(500, rel=0.1)
    assert (row["prompt_tokens"], row["generation_tokens"]) == (5, 5)
    assert 0.04 < row["ttft_s"]["p50"] <= 0.1
    assert row["error_count"] == sum(row["errors"].values())


@pytest.mark.parametrize(
    ("accept", "wants"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain;version=0.0.4", False),
        ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;q=0.5,*/*;q=0.1", True),
        ("text/plain, Application/OpenMetrics-Text", True),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text-not", False),
        ("application/openmetrics-text;version=;;=,,;", True),
    ],
)
def test_openmetrics_is_for_who_asks_for_it(accept: str, wants: bool) -> None:
    assert wants_openmetrics(accept) is wants


async def test_the_type_says_which_format_it_is(swarm: Swarm, autojump_clock: MockClock) -> None:
    app = build_app((await swarm.start()).state, random.Random(1))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        plain = await client.get("/metrics")
        strict = await client.get("/metrics", headers={"accept": "application/openmetrics-text"})
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert strict.headers["content-type"] == OPENMETRICS_TYPE
    assert strict.text.endswith("# EOF\n")


async def test_a_scrape_lets_others_run_between_two_metrics(swarm: Swarm, autojump_clock: MockClock) -> None:
    app, turns = build_app((await swarm.start(FakeRuntime())).state, random.Random(1)), 0
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        async with trio.open_nursery() as nursery:

            async def turn() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await trio.lowlevel.checkpoint()

            nursery.start_soon(turn)
            text = (await client.get("/metrics")).text
            nursery.cancel_scope.cancel()
    assert turns >= text.count("# TYPE") // 2


def test_what_is_unknown_is_absent() -> None:
    assert prometheus_text({}) == ""
    told = prometheus_text({"gossip": {"directory": {"clock_offset_ms": None}}, "readiness": {"ready": True}})
    assert [family.name for family in parse_text(told)] == ["openagi_ready"]


def test_training_is_told_by_the_name_of_its_run() -> None:
    families = {family.name for family in parse_openmetrics(openmetrics_text({}, Measured(training=TRAINED)))}
    assert families == {metric.name.removesuffix("_total") for metric in TRAININGS}
    assert 'openagi_training_held_out_loss{run="tales"} 2.75\n' in prometheus_text({}, Measured(training=TRAINED))
    assert prometheus_text({}, Measured(training={**TRAINED, "run": None})) == ""


def test_round_trips_are_told_of_few_peers_the_busiest_first() -> None:
    rows = [{"peer": f"p{n}", "rtt_ms": float(n), "connected_s": 1000.0 - n} for n in range(1000)]
    status = {"peering": {"peers": rows}, "inference": {"busiest_peers": {"p999": {}, "gone": {}}}}
    told = [labels[0] for labels, _ in peer_rtts(Told(status))]
    assert told == ["p999", *(f"p{n}" for n in range(PEERS_MAX - 1))]


def test_metrics_have_one_name_each_a_source_and_words_for_people() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert metric.help.endswith("."), metric.name
        assert metric.source, metric.name
        assert (metric.type == "counter") is (metric.name.endswith("_total") and "iteration" not in metric.name)


def test_the_page_is_made_from_the_table() -> None:
    told = (ROOT / "docs" / "METRICS.md").read_text()
    assert told == page(), "make it anew, as its second line says"


def test_tokens_of_a_piece_share_its_time() -> None:
    tallies = Tallies(0.0)
    passage = tallies.enter(None, 0.0)
    for now in (1.0, 2.0):
        tallies.take(passage, Piece(tokens=(1, 2, 3, 4), text=""), now)
    (row,) = tallies.statistics()
    assert (row.token_s.count, row.token_s.sum) == (4, 1.0)
