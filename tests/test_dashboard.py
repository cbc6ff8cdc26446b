"""docs/grafana: the dashboard asks for nothing that a live node does not tell, and by labels that it has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from node.front import Trains
from node.metrics import METRICS
from tests.fake_front import FakeTraining
from tests.test_house import ROOT
from tests.test_metrics import TRAINED
from tests.test_run import running

GRAFANA = ROOT / "docs" / "grafana"
GIVEN = {"instance", "job"}  # by Prometheus itself


def expressions() -> list[str]:
    """Every PromQL expression of the dashboard."""
    board = json.loads((GRAFANA / "openagi.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    return asked + [each["query"]["query"] for each in board["templating"]["list"] if each["type"] == "query"]


def names_in(expression: str) -> set[str]:
    """The metrics that an expression asks for."""
    return set(re.findall(r"\b(?:openagi|process)_[a-z0-9_]+", expression))


def labels_in(expression: str) -> set[str]:
    """The labels by which it chooses or groups."""
    chosen = re.findall(r"([a-z_]+)\s*[=!]~?\"", expression)
    grouped = [name for group in re.findall(r"by \(([^)]*)\)", expression) for name in group.split(",")]
    return {name.strip() for name in (*chosen, *grouped)}


async def live(tmp_path: Path) -> dict[str, set[str]]:
    """Labels of each sample of a whole node, which has answered a request and is in a run."""
    training = FakeTraining()
    training.tells = training.tells | TRAINED
    trains: Trains = training
    async with running(tmp_path, http="127.0.0.1:0") as here:
        await here.ready()
        here.node.state.trains = trains
        async with httpx.AsyncClient(base_url=f"http://{here.node.state.http}") as client:
            body = {"prompt": "hello", "max_tokens": 3}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            text = (await client.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: {*sample.labels} for sample in samples}


# of a node that is alone at home nobody is known
OF_PEERS: dict[str, set[str]] = {
    metric.name: set(metric.labels)
    for metric in METRICS
    if metric.name in ("openagi_peer_rtt_seconds", "openagi_peer_requests_total", "openagi_gossip_adverts_total",
                       "openagi_clock_offset_seconds", "openagi_gossip_summaries_total",
                       "openagi_gossip_claims_judged_total")
}  # fmt: skip


@pytest.mark.slow
async def test_the_dashboard_asks_for_what_a_node_tells(tmp_path: Path) -> None:
    told: dict[str, Any] = {**OF_PEERS, **await live(tmp_path)}
    for expression in expressions():
        assert names_in(expression), expression
        for name in names_in(expression):
            assert name in told, f"no node tells {name}: {expression}"
            assert labels_in(expression) <= told[name] | GIVEN, f"{name} has no such label: {expression}"
    missing = {metric.name for metric in METRICS if metric.type != "histogram"} - told.keys() - {"openagi_backend_up"}
    assert not missing, "a whole node tells every metric"


def test_every_part_of_a_node_is_on_the_dashboard() -> None:
    asked = set().union(*map(names_in, expressions()))
    for word in ("first_token", "inter_token", "generation_tokens", "waiting", "kv_cache", "response_cache", "peers",
                 "failover", "gossip", "drops", "training", "lag", "request_success"):  # fmt: skip
        assert any(word in name for name in asked), word


def test_the_checks_can_fail() -> None:
    assert names_in('rate(openagi_made_up_total{x="1"}[5m])') == {"openagi_made_up_total"}
    assert labels_in('sum by (le, other) (rate(x{here=~"$a"}[5m]))') == {"le", "other", "here"}


def test_panels_have_one_place_and_number_each() -> None:
    board = json.loads((GRAFANA / "openagi.json").read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(places) == len(set(places))
