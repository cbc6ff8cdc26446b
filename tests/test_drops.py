"""Every drop, refusal, limit and ban is counted with a reason and told by /metrics and the status; the log is paced."""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from node.config import NodeConfig
from node.log_pace import KINDS_MAX, LINE_EVERY_S, LINES_BURST, LogPace
from node.metric import drops
from node.metrics import prometheus_text
from node.start import _Paced, _set_up_log
from tests.test_house import ROOT, name_of, sources

# an exception that ends here without a count, and why that hides nothing
SILENT = {
    "node/arenas.py:few_arenas": "another C library: memory is kept as it keeps it, and the caller is told",
    "node/training_kept.py:_read": "a run of another version: whoever names it is told which are there",
    "node/training_kept.py:reached": "the node took it away meanwhile: it is looked for anew, and then it is an error",
    "node/training_session.py:_restore": "nothing was saved yet: a run begins",
    "p2p/address.py:seen_scope": "no address of a connection counts as public",
    "p2p/address.py:told": "p2p/greeting.py counts what is missing",
    "p2p/address.py:worth_telling": "our own addresses",
    "p2p/direct.py:_listen": "another listener of ours serves; all failing is an error",
    "p2p/direct.py:_read_token": "counted behind the try, as no token in time",
    "p2p/direct_stream.py:close": "over already",
    "p2p/direct_stream.py:linger": "over already",
    "p2p/guard.py:end_stream": "over already",
    "p2p/guard_gossip.py:continuously_read_stream": "the connection is over",
    "p2p/guard_hop.py:peer_of": "the caller refuses with MALFORMED_MESSAGE",
    "p2p/guard_punch.py:_addresses": "none left is an error",
    "p2p/guard_socket.py:_receive_some": "closed by us",
    "p2p/guard_stream.py:_refill": "the next read says it",
    "p2p/interfaces.py:_parse": "our own interfaces",
    "p2p/reaching.py:_listening": "our own addresses",
    "p2p/reaching.py:_scope_of": "no IP address, no scope: nobody is dialled back there",
    "gossip/blob_fetching.py:_write_all": "nothing more waits to be written",
    "gossip/blob_files.py:manifest": "what was kept of it is damaged or not there: it is fetched",
    "gossip/blob_files.py:open": "the caller refuses with GONE",
    "gossip/blob_files.py:read_into": "the caller refuses with GONE",
    "gossip/blob_serving.py:_give": "the asker is gone",
    "gossip/finder.py:_ask": "the end of the answer",
    "gossip/journal.py:read": "a file that is not there",
    "gossip/journal.py:note": "gossip/hearing.py counts not_kept_over_a_kill",
    "gossip/service.py:_pull": "the end of the answer",
    "p2p/address.py:network_of": "no IP address, no group",
    "node/requester.py:account_of": "no IP address: the name is the account",
    "node/file_lock.py:try_lock": "the lock is another's: the caller says so",
    "node/api_key_file.py:_look": "no file, no keys: whoever sends one is refused and counted",
    "node/web/caller.py:subnet_of": "no IP address, no group",
    "node/web/gate.py:early": "the usual way refuses it, and counts it",
    "node/web/gate.py:__call__": "the client is gone: node/web/door.py counts that",
    "node/chain.py:head_or_none": "no head: the caller says what that means",
    "node/store_file.py:head_of_aside": "the lost event says that no head could be read",
    "node/store_file.py:read_head": "there is none yet",
    "node/self_report.py:about_of": "a model wrote the call: it is told of all fields",
    "node/self_report.py:question_of": "a model wrote the call: it is told how to ask",
    "node/store_look.py:_tidy": "it was not made, or stays as an empty file that the next opening uses",
    "node/store_file.py:text_of_row": "`verify` names it",
    "node/store_recall.py:body_of": "`verify` names it",
    "node/tool_calls.py:_calls": "what is no call is the answer's text, and the client gets it",
    "node/upstream.py:_answer": "its owner left",
    "node/upstream.py:_answered": "the caller sends it to the client and counts it",
    "node/upstream.py:_tell_progress": "the client has more to read than it reads, or left",
    "node/upstream_facts.py:_number": "the figure is not told, and then a default is offered",
    "node/upstream_http.py:retry_after_s": "no time is told, and then a default is waited",
    "node/upstream_look.py:_continues": "it does not: the status says what the model was seen to do",
    "node/upstream_look.py:_is_there": "an error is an answer, and it is asked for no more",
    "node/upstream_look.py:_optional": "the server has no such route, and then it tells less",
    "node/web/door.py:host_allowed": "the caller counts foreign_host",
    "node/web/door.py:origin_allowed": "the caller counts foreign_origin",
    "node/web/sealed.py:_pass_on": "the caller tells the client",
    "node/web/serve.py:run": "the client is gone: node/web/door.py counts that",
    "node/web/sse.py:_receive_ready": "nothing more is ready",
}


def is_silent(handler: ast.ExceptHandler) -> bool:
    """Whether it does nothing but go on: no call, no count, no raise."""
    return all(
        isinstance(line, ast.Pass | ast.Continue | ast.Break)
        or (isinstance(line, ast.Return) and isinstance(line.value, ast.Constant | ast.Attribute | ast.Name | None))
        for line in handler.body
    )


def silent_places(path: Path) -> set[str]:
    return {
        f"{name_of(path)}:{function.name}"
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for handler in ast.walk(function)
        if isinstance(handler, ast.ExceptHandler) and is_silent(handler)
    }


def test_no_failure_is_passed_over_without_a_count_or_a_reason() -> None:
    places = [path for path in sources("p2p", "gossip", "node") if "commands" not in path.parts]
    found = set().union(*map(silent_places, places))
    assert found == set(SILENT), "count it, or say here why it hides nothing; what is gone from the code goes here too"


def test_a_handler_that_hides_a_failure_is_found(tmp_path: Path) -> None:
    file = tmp_path / "hides.py"
    file.write_text("def hides():\n    try:\n        f()\n    except OSError:\n        pass\n")
    found = [each for each in ast.walk(ast.parse(file.read_text())) if isinstance(each, ast.ExceptHandler)]
    assert [is_silent(each) for each in found] == [True]


def test_every_word_of_a_refusal_of_admission_is_counted_where_it_is_met() -> None:
    """Refusal.reason is the counter's name: both shells count it as it is."""
    for shell in ("p2p/guard_swarm.py", "p2p/direct.py"):
        text = (ROOT / shell).read_text()
        assert re.search(r"(count\(|counts\[)(verdict|refusal)\.reason", text)


STATUS: dict[str, Any] = {
    "transport": {"peers": 3, "drops": {"accept_rate": 7, 'odd "reason"\n': 1}},
    "gossip": {"drops": {"over_quota": 2}, "directory": {"outcomes": {"accepted": 9, "stale": 4}}},
    "peering": {"book": {"dropped": {"never worked": 5}}, "drops": {}},
    "control": None,
}


def test_what_the_status_counts_by_reason_stands_in_the_metrics() -> None:
    assert list(drops(STATUS)) == [
        ("transport.drops", "accept_rate", 7),
        ("transport.drops", 'odd "reason"\n', 1),
        ("gossip.drops", "over_quota", 2),
        ("gossip.directory.outcomes", "stale", 4),
        ("peering.book.dropped", "never worked", 5),
    ]
    text = prometheus_text(STATUS)
    assert 'openagi_drops_total{part="transport.drops",reason="accept_rate"} 7.0\n' in text
    assert r'reason="odd \"reason\"\n"' in text
    told = [line for line in text.splitlines() if line.startswith("openagi_drops_total{")]
    assert len(told) == len(list(drops(STATUS)))


def test_figures_are_read_out_of_the_status() -> None:
    told = {"model": {"cache": {"hits": {"embedding": 2}, "bytes": 7}, "embedding": {"tokens": 5}, "queued_bytes": 0}}
    lines = prometheus_text(told).splitlines()
    assert 'openagi_response_cache_hits_total{kind="embedding"} 2.0' in lines
    assert "openagi_response_cache_bytes 7.0" in lines
    assert "openagi_embedding_tokens_total 5.0" in lines
    assert "openagi_queued_bytes 0.0" in lines
    assert "# TYPE openagi_response_cache_bytes gauge" in lines
    assert prometheus_text({"model": None}) == ""


def test_a_kind_of_line_is_written_a_few_times_and_then_seldom() -> None:
    pace, written, told = LogPace(), 0, 0
    for number in range(100_000):
        missing = pace.take("gossip.service", "%s: %s after %s", number / 1000)
        written += missing is not None
        told += missing or 0
    assert written <= LINES_BURST + 100 / LINE_EVERY_S + 1
    assert told + written <= 100_000
    assert pace.left_out == {"gossip.service": 100_000 - written}
    assert pace.take("gossip.service", "another line", 100.0) == 0
    assert pace.take("gossip.service", "%s: %s after %s", 100_000.0), "the next one says how many"


def test_kinds_of_lines_are_bounded() -> None:
    pace = LogPace()
    for number in range(10_000):
        pace.take("here", str(number), 0.0)
    assert len(pace._kinds) == KINDS_MAX


def test_a_hostile_peer_cannot_fill_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        pace = _set_up_log(NodeConfig())
        for number in range(50_000):
            logging.getLogger("gossip.service").warning("%s: %s after %s", f"peer-{number}", "banned", "a breach")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    assert len(capsys.readouterr().err) < 10_000
    assert pace.left_out["gossip.service"] > 49_900


def test_the_next_line_says_how_many_are_missing() -> None:
    paced, now = _Paced(), 0.0
    record = logging.LogRecord("here", logging.WARNING, "", 0, "a line of %s", ("it",), None)
    for _ in range(20):
        paced.pace.take("here", "a line of %s", now)
    paced.pace._kinds["here", "a line of %s"] = (5.0, 0.0, 10)
    assert paced.filter(record)
    assert record.getMessage() == "a line of it (10 more such lines were left out)"
