"""A whole node with a server behind it: settings, start, status, metrics, doctor, refusals; and rules of the wire."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import node.upstream_health
from crypto.identity import PeerId
from gossip.messages import Capacity
from node.commands.checks import Check, Verdict, check_backend, local_checks
from node.commands.doctor import status_checks
from node.config import NodeConfig, load_config
from node.errors import ConfigError, NotReady, PeerFailed
from node.judge import STALL_UNMEASURED_S, Judge
from node.metrics import prometheus_text
from node.start import leaves
from node.training_wish import Begin
from node.upstream_start import KEY_BYTES_MAX, read_key, wanted_of
from node.work import (
    PROMPT_CHARS_MAX,
    UNKNOWN_TOKEN,
    Embedded,
    Finished,
    GenerateWork,
    Piece,
    Progress,
    Sampling,
    Started,
    from_wire,
    to_wire,
)
from p2p.errors import RemoteProtocolError
from tests.test_pursuit import Around, pursuit
from tests.test_run import Running, running, signal_me, until
from tests.upstream_server import FakeServer, served

PEER = PeerId("12D3KooWpeer")


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.upstream_health, "LOOK_S", 0.3)


# --- settings ---


def backend_of(value: str) -> str | None:
    return load_config({"backend": value}, environment={}).upstream_url()


def test_the_servers_address() -> None:
    assert backend_of("transformers") is None
    for given in (
        "http://127.0.0.1:8000",
        "http://127.0.0.1:8000/",
        "http://127.0.0.1:8000/v1",
        "http://127.0.0.1:8000/v1/",
    ):
        assert backend_of(f"openai:{given}") == "http://127.0.0.1:8000"
    assert backend_of("openai:https://host/prefix/v1") == "https://host/prefix"
    assert backend_of("openai:http://[::1]:8000") == "http://[::1]:8000"


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("vllm", "openai:URL as"),
        ("openai:", "openai:URL as"),
        ("openai:localhost:8000", "openai:URL as"),
        ("openai:ftp://host", "openai:URL as"),
        ("openai:http://host:0", "openai:URL as"),
        ("openai:http://host:99999", "openai:URL as"),
        ("openai:http://ho st", "openai:URL as"),
        ("openai:http://me:secret@host", "--backend-key-file"),
        ("openai:http://host/?a=b", "no ?"),
    ],
)
def test_what_is_no_address(value: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        backend_of(value)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"backend": "openai:http://h", "model": "none"}, "give only one of the two"),
        (
            {"backend": "openai:http://h", "train": "tales", "data": ["/texts"]},
            "train on a node with a model of its own",
        ),
        ({"backend_key_file": "/k"}, "which is not given"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        load_config(settings, environment={})


def test_the_number_of_requests_counts_when_it_was_said() -> None:
    url = {"backend": "openai:http://h"}
    assert wanted_of(load_config(url, environment={})).slots is None
    assert wanted_of(load_config({**url, "max_batch": 4}, environment={})).slots == 4
    assert wanted_of(load_config(url, environment={"OPENAGI_MAX_BATCH": "9"})).slots == 9
    assert wanted_of(load_config({**url, "model": "m"}, environment={})).model == "m"


def test_the_key_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"sk-abc\n")
    assert read_key(file) == "sk-abc"
    for bad in (b"", b"\n", b"two words", b"a\nb", b"\xff\xfe", b"x" * (KEY_BYTES_MAX + 1), b"a\r\nx-header: b"):
        file.write_bytes(bad)
        with pytest.raises(ConfigError, match="must hold one key") as caught:
            read_key(file)
        assert "words" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read the key file"):
        read_key(tmp_path / "absent")


# --- the node ---


def config_of(server: FakeServer, **more: Any) -> dict[str, Any]:
    return {"backend": f"openai:{server.url}", "http": "127.0.0.1:0", **more}


async def get(here: Running, path: str) -> bytes:
    said = json.loads(here.ready_file.read_text())
    stream = await trio.open_tcp_stream("127.0.0.1", int(said["http"].split(":")[1]))
    async with stream:
        await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        content = b""
        async for part in stream:
            content += part
    return content


@pytest.mark.slow
async def test_a_node_with_a_server_behind_it(tmp_path: Path) -> None:
    server = FakeServer(kind="llama.cpp")
    key = tmp_path / "key"
    key.write_text("sk-abc")
    async with (
        served(server) as stop,
        running(tmp_path / "data", **config_of(server, backend_key_file=key)) as here,
    ):
        await here.ready()
        said = json.loads(here.ready_file.read_text())
        assert said["model"] == "tale"
        assert said["revision"].startswith("said:llama.cpp:")
        assert set(server.seen_keys) == {"Bearer sk-abc"}
        status = here.node.state.status()
        assert status["backend"]["server"] == "llama.cpp"
        assert status["model"]["engine"]["slots_total"] == 3
        assert "sk-abc" not in json.dumps(status)
        assert verdicts(status)["backend"] is Verdict.OK
        assert b'openagi_backend_up{kind="openai",server="llama.cpp"} 1' in await get(here, "/metrics")
        assert b" 200 " in await get(here, "/readyz")

        assert "weights are not here to train" in here.node.state.training.status()["why"]
        with pytest.raises(NotReady, match="weights are not here to train"):
            await here.node.state.training.begin(Begin(name="tales", data=("/x",)))

        stop()
        await until(lambda: bool(here.node.state.readiness().degraded))
        status = here.node.state.status()
        assert verdicts(status)["backend"] is Verdict.BAD
        metrics = prometheus_text(status)
        assert 'openagi_backend_up{kind="openai",server="llama.cpp"} 0' in metrics
        assert "openagi_num_requests" not in metrics, "nothing is assumed of another's engine"
        assert 'openagi_drops_total{part="backend.failures",reason="unreached"}' in metrics
        assert b" 200 " in await get(here, "/readyz"), "it is a door still"
        signal_me()
        await here.ended()


def verdicts(status: dict[str, Any]) -> dict[str, Verdict]:
    return {check.name: check.verdict for check in status_checks(status)}


@pytest.mark.slow
async def test_a_node_that_waits_for_its_server_says_so(tmp_path: Path) -> None:
    server = FakeServer()
    async with served(server) as stop:
        stop()
    async with running(tmp_path, **config_of(server)) as here:
        await until(lambda: "is down" in here.node.state.readiness().reason)
        assert not here.node.state.readiness().ready
        assert here.node.state.readiness().loading
        async with served(server, int(server.url.rpartition(":")[2])):
            await here.ready()
            assert here.node.state.readiness().ready
        signal_me()
        await here.ended()


@pytest.mark.slow
async def test_a_server_that_cannot_be_used_ends_the_start_with_a_sentence(tmp_path: Path) -> None:
    server = FakeServer(models=("a", "b"))
    async with served(server):
        with pytest.raises(BaseExceptionGroup) as caught:
            async with running(tmp_path, **config_of(server)) as here:
                await here.ended()
        problem = caught.value.split(ConfigError)[0]
        assert problem is not None
        assert "choose one by --model NAME: a, b" in str(next(leaves(problem)))


# --- doctor ---


def test_the_doctor_knows_the_address_alone(tmp_path: Path) -> None:
    config = NodeConfig(data_dir=tmp_path, backend="openai:http://127.0.0.1:9", mdns=False)
    checks = {check.name: check for check in local_checks(config, now_s=1_800_000_000.0)}
    assert checks["backend"].verdict is Verdict.BAD
    assert "nothing answers there" in checks["backend"].found
    assert "model" not in checks, "it is not looked for here"


@pytest.mark.slow
async def test_the_doctor_asks_the_server(tmp_path: Path) -> None:
    server = FakeServer(models=("a", "b"), key="k")
    key = tmp_path / "key"
    key.write_text("k")
    key.chmod(0o644)

    async def checks(**fields: Any) -> dict[str, Check]:
        config = NodeConfig(data_dir=tmp_path, backend=f"openai:{server.url}", **fields)
        found = await trio.to_thread.run_sync(lambda: list(check_backend(config)))
        return {check.name: check for check in found}

    async with served(server):
        assert "--backend-key-file" in (await checks(model="a"))["backend"].found
        told = await checks(model="a", backend_key_file=key)
        assert told["backend"].verdict is Verdict.OK
        assert told["backend's key"].verdict is Verdict.LOOK
        key.chmod(0o600)
        told = await checks(backend_key_file=key)
        assert set(told) == {"backend"}
        assert "choose one by --model" in told["backend"].found


def test_a_server_elsewhere_without_tls_is_worth_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object) -> Iterator[None]:
        raise ConfigError("not asked here")

    monkeypatch.setattr(trio, "run", nothing)
    for url, is_seen in (("http://10.0.0.9:8000", True), ("https://10.0.0.9", False), ("http://[::1]:1", False)):
        names = [check.name for check in check_backend(NodeConfig(backend=f"openai:{url}"))]
        assert ("backend's wire" in names) is is_seen


# --- the wire and its judges ---


def test_only_who_needs_the_text_gets_it() -> None:
    """An older peer refuses fields that it does not know, and takes over by ids as ever."""
    work = GenerateWork(request_id="q", text="a", delivered=(1,), delivered_chars=1)
    assert "delivered_text" not in to_wire(work)
    by_text = GenerateWork(request_id="q", text="a", delivered=(UNKNOWN_TOKEN,), delivered_chars=2, delivered_text="hé")
    assert from_wire(to_wire(by_text), GenerateWork) == by_text
    with pytest.raises(RemoteProtocolError):
        from_wire({**to_wire(by_text), "delivered_text": "x" * (PROMPT_CHARS_MAX + 1)}, GenerateWork)


def test_whether_a_text_was_cut_may_be_unknown() -> None:
    embedded = Embedded(
        served_by="p",
        model="m",
        revision="r",
        dimensions=1,
        vectors=(b"1234",) * 3,
        truncated=(True, False, None),
        prompt_tokens=1,
    )
    assert from_wire(to_wire(embedded), Embedded) == embedded


def judge(prompt_tokens: int) -> Judge:
    work = GenerateWork(request_id="q", text="a", sampling=Sampling(max_tokens=9))
    judging = Judge(PEER, Capacity(), work, 100.0)
    judging.take(Started(served_by=PEER, model="m", revision="said:x", prompt_tokens=prompt_tokens), 100.0)
    return judging


def steps(number: int) -> Progress:
    return Progress(engine_steps=number, prefilled_tokens=0, queue_position=0)


def test_a_prompt_that_is_not_counted_yet_is_counted_at_the_end() -> None:
    judging = judge(0)
    judging.take(Piece(tokens=(UNKNOWN_TOKEN,), text="a"), 101.0)
    judging.end(Finished(reason="stop", prompt_tokens=7, completion_tokens=1))
    judging = judge(5)
    judging.take(Piece(tokens=(UNKNOWN_TOKEN,), text="a"), 101.0)
    with pytest.raises(RemoteProtocolError, match="the prompt had 5"):
        judging.end(Finished(reason="stop", prompt_tokens=7, completion_tokens=1))


def test_steps_count_as_work_while_nobody_knows_how_long_the_prompt_is() -> None:
    judging = judge(0)
    judging.take(steps(1), 100.0)
    for second in range(1, 40):
        judging.waited(1.0)
        judging.take(steps(1 + second), 100.0 + second)
    assert judging.waits_until(140.0) > 140.0
    for _ in range(30):
        judging.waited(1.0)
        assert not judging.take(steps(40), 150.0), "the same again is no work"
    assert judging.waits_until(170.0) <= 170.0 - (30.0 - STALL_UNMEASURED_S)


def test_an_answer_by_text_is_gone_on_with_by_its_text() -> None:
    around = Around(["near", "far"], revision="said:x")
    one = pursuit(around)
    target = one.step()
    one.take(Started(served_by="near", model="tale", revision="said:x", prompt_tokens=0))
    one.take(Piece(tokens=(UNKNOWN_TOKEN,), text="he"))
    one.take(Piece(tokens=(UNKNOWN_TOKEN,), text="llo"))
    one.failed(target, PeerFailed("gone"))  # type: ignore[arg-type]  # a Candidate
    work = one.continued(0.5)
    assert (work.delivered_text, work.delivered_chars, len(work.delivered)) == ("hello", 5, 2)
    one.take(Finished(reason="stop", prompt_tokens=8, completion_tokens=2))
    assert one.prompt_tokens == 8


def test_an_engines_answer_is_not_gone_on_with_by_text() -> None:
    one = pursuit(Around(["near"]))
    one.step()
    one.take(Started(served_by="near", model="tale", revision="r1", prompt_tokens=3))
    one.take(Piece(tokens=(5,), text="he"))
    assert one.continued(0.5).delivered_text == ""
    assert one.texts == []


def test_an_answer_too_long_to_be_sent_along_ends_in_a_clear_error() -> None:
    around = Around(["near", "far"], revision="said:x")
    one = pursuit(around)
    target = one.step()
    one.take(Started(served_by="near", model="tale", revision="said:x", prompt_tokens=0))
    for _ in range(3):
        one.take(Piece(tokens=(UNKNOWN_TOKEN,), text="x" * 100_000))
    assert sum(map(len, one.texts)) <= PROMPT_CHARS_MAX
    with pytest.raises(PeerFailed, match="300000 characters"):
        one.failed(target, PeerFailed("gone"))  # type: ignore[arg-type]  # a Candidate
