"""model/service.py: the module functions, beside what the HTTP door of whole nodes gives for the same models."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import trio

from model.errors import BadInput, BadSetting, EmptyInput, EngineFull, NotFound, NotLoaded
from model.runtime import Runtime
from model.service import Inference, Model, ModelService, initialize_model, run_model_inference, start_model_service
from model.settings import ModelSettings, settings_of
from node.hosting import Hosting, Turn
from node.web.app import build_app
from tests.node_swarm import Node, Swarm
from tests.tiny_models import CONTEXT, save_causal, save_encoder

PROMPTS = ["Once upon a time", "Es war einmal", "Once"]
HANG_S = 60.0  # a guard: nothing here takes this long
CPU = {"device": "cpu", "dtype": "float32", "threads": 1}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A causal model and an encoder."""
    folder = tmp_path_factory.mktemp("models")
    save_causal(folder / "causal")
    save_encoder(folder / "encoder")
    return {"causal": folder / "causal", "encoder": folder / "encoder"}


def settings(path: Path, **more: Any) -> dict[str, Any]:
    return {"model_path": str(path), **CPU, **more}


@pytest.fixture(scope="module")
def causal(paths: dict[str, Path]) -> Model:
    return initialize_model(settings(paths["causal"]))


@pytest.fixture(scope="module")
def encoder(paths: dict[str, Path]) -> Model:
    return initialize_model(settings(paths["encoder"]))


@pytest.fixture(scope="module")
def service(paths: dict[str, Path]) -> Iterator[ModelService]:
    with start_model_service(settings(paths["causal"])) as service:
        yield service


# -- beside the HTTP door --------------------------------------------------------------------------------------------


@asynccontextmanager
async def asking(node: Node) -> AsyncIterator[Any]:
    """POST /api/v1/model/inference at a node: (status, body, headers)."""
    transport = httpx.ASGITransport(app=build_app(node.state, Random(7)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8765") as http:

        async def ask(**body: object) -> tuple[int, Any, httpx.Headers]:
            response = await http.post("/api/v1/model/inference", json=body)
            return response.status_code, response.json(), response.headers

        yield ask


async def _hop(turn: Turn) -> list[Any]:
    await trio.lowlevel.checkpoint()
    return turn()


@asynccontextmanager
async def two_nodes(path: Path) -> AsyncIterator[tuple[Node, Node]]:
    """One that hosts the model, and a door that hosts none."""
    runtime = Runtime.load(str(path), ModelSettings(**CPU).runtime())  # type: ignore[arg-type]

    def backend(node: Node) -> Hosting:
        return Hosting(runtime, peer=node.id, on_change=node.offer, hop=_hop)

    async with Swarm().running() as swarm:
        host = await swarm.start(backend=backend)
        door = await swarm.start()
        await swarm.settled(door)
        yield host, door


FIELDS = {"model", "revision", "model_type", "truncated", "usage", "served_by", "latency_ms"}


async def test_a_causal_model_gives_one_text_by_module_by_http_and_through_a_peer(
    paths: dict[str, Path], causal: Model, service: ModelService, autojump_clock: trio.testing.MockClock
) -> None:
    wanted = run_model_inference(causal, PROMPTS, max_tokens=20, temperature=0)
    assert isinstance(wanted.text, list)
    served = service.submit(PROMPTS, max_tokens=20, temperature=0).result()
    assert (served.text, served.usage, served.finish_reason) == (wanted.text, wanted.usage, wanted.finish_reason)
    async with two_nodes(paths["causal"]) as (host, door):
        for node in (host, door):
            async with asking(node) as ask:
                status, told, headers = await ask(text=PROMPTS, max_tokens=20, temperature=0)
                assert status == 200, told
                assert set(told) == FIELDS | {"text", "finish_reason"}
                assert told["text"] == wanted.text
                assert (told["model"], told["revision"]) == (wanted.model, wanted.revision)
                assert (told["model_type"], told["truncated"]) == ("causal", [False] * 3)
                usage = {"prompt_tokens": wanted.usage.prompt_tokens, "completion_tokens": 60}
                assert told["usage"] == {**usage, "total_tokens": sum(usage.values())}
                assert told["served_by"] == headers["x-served-by"] == host.id
                assert headers["x-model-revision"] == wanted.revision
                assert told["latency_ms"] >= 0
                status, told, _ = await ask(text=PROMPTS[0], max_tokens=20, temperature=0)
                assert (told["text"], told["truncated"]) == (wanted.text[0], False)
                for text in ("", [], ["a", ""], None, 7):
                    status, told, _ = await ask(text=text)
                    assert (status, told["error"]["param"]) == (400, "text")
                status, told, _ = await ask(text="word " * CONTEXT)
                assert (status, told["error"]["code"]) == (400, "context_length_exceeded"), told
                assert "more than the 512 of causal" in told["error"]["message"]
                status, told, _ = await ask(text="a", n=2)
                assert (status, told["error"]["param"]) == (400, "n")


async def test_an_encoder_gives_one_vector_by_module_by_http_and_through_a_peer(
    paths: dict[str, Path], encoder: Model, autojump_clock: trio.testing.MockClock
) -> None:
    texts = [*PROMPTS, "long " * 100]
    wanted = run_model_inference(encoder, texts)
    assert wanted.truncated == [False, False, False, True]
    assert wanted.embeddings is not None
    async with two_nodes(paths["encoder"]) as (host, door):
        for node in (host, door):
            async with asking(node) as ask:
                status, told, headers = await ask(text=texts)
                assert status == 200, told
                assert set(told) == FIELDS | {"embeddings"}
                for theirs, ours in zip(told["embeddings"], wanted.embeddings, strict=True):
                    assert theirs == pytest.approx(ours, abs=1e-5)
                assert told["truncated"] == wanted.truncated
                assert (told["model"], told["revision"], told["model_type"]) == (
                    wanted.model, wanted.revision, "encoder",
                )  # fmt: skip
                tokens = wanted.usage.prompt_tokens
                assert told["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
                assert told["served_by"] == headers["x-served-by"] == host.id
                status, told, _ = await ask(text=texts[-1], max_tokens=9, temperature=0.5)
                assert (len(told["embeddings"]), told["truncated"]) == (32, True)
                status, told, _ = await ask(text="")
                assert (status, told["error"]["param"]) == (400, "text")


# -- the functions ---------------------------------------------------------------------------------------------------


def test_a_vector_is_the_masked_mean_of_the_last_states(encoder: Model) -> None:
    one = run_model_inference(encoder, "Once")
    assert (one.model_type, one.text, one.truncated) == ("encoder", None, False)
    several = run_model_inference(encoder, ["Once", "Once upon a time there was"])
    assert isinstance(several.embeddings, list)
    assert several.embeddings[0] == pytest.approx(one.embeddings, abs=1e-5)  # padding has no part in it
    assert sum(value * value for value in one.embeddings or ()) == pytest.approx(1.0, abs=1e-5)
    assert one.usage.prompt_tokens > 0


def test_what_a_request_does_not_name_is_as_the_settings_say(paths: dict[str, Path]) -> None:
    model = initialize_model(settings(paths["causal"], max_tokens=5, temperature=0.0))
    answer = run_model_inference(model, "Once")
    assert (answer.usage.completion_tokens, answer.finish_reason) == (5, "length")
    assert answer.text == run_model_inference(model, "Once", temperature=0, max_tokens=5).text
    assert run_model_inference(model, "Once", max_tokens=7).usage.completion_tokens == 7
    drawn = {run_model_inference(model, "Once", temperature=5, seed=seed).text for seed in (1, 1, 2)}
    assert len(drawn) == 2
    assert run_model_inference(model, ["a"] * 100, max_tokens=1).usage.completion_tokens == 100  # over slots and queue


def test_max_length_bounds_prompt_and_answer(paths: dict[str, Path]) -> None:
    model = initialize_model(settings(paths["causal"], max_length=32))
    assert model.facts.context_tokens == 32
    assert run_model_inference(model, "Once").usage.completion_tokens == 16  # half, as at the HTTP door
    with pytest.raises(BadInput, match="more than the 32 of causal"):
        run_model_inference(model, "Once upon a time " * 9, max_tokens=1)
    model = initialize_model(settings(paths["encoder"], max_length=8))
    assert run_model_inference(model, "Once upon a time " * 9).truncated is True
    with pytest.raises(BadSetting, match="max_length is 513, and causal reads at most 512 tokens"):
        initialize_model(settings(paths["causal"], max_length=513))


@pytest.mark.parametrize("given", ["", [], ["a", ""], ()], ids=str)
def test_empty_input_is_typed(causal: Model, given: Any) -> None:
    with pytest.raises(EmptyInput) as caught:
        run_model_inference(causal, given)
    assert caught.value.param == "input"


@pytest.mark.parametrize("given", [7, None, b"raw", ["a", 7], [["a"]], ["a"] * 257], ids=lambda each: str(each)[:20])
def test_what_is_no_text_is_named(causal: Model, given: Any) -> None:
    with pytest.raises(BadInput, match=r"input"):
        run_model_inference(causal, given)
    for bad in ({"max_tokens": 0}, {"temperature": -1.0}, {"temperature": 11.0}):
        with pytest.raises(BadInput, match=next(iter(bad))):
            run_model_inference(causal, "a", **bad)  # type: ignore[arg-type]


def test_one_text_at_fault_ends_its_call_and_no_other(service: ModelService) -> None:
    good = service.submit("Once", max_tokens=40, temperature=0)
    bad = service.submit(["Once", "word " * CONTEXT])
    with pytest.raises(BadInput, match="more than the 512"):
        bad.result()
    assert good.result().usage.completion_tokens == 40
    assert service._open == 0


def test_a_closed_model_is_not_loaded(paths: dict[str, Path]) -> None:
    model = initialize_model(settings(paths["encoder"]))
    model.close()
    with pytest.raises(NotLoaded, match="was closed"):
        run_model_inference(model, "a")


@pytest.mark.parametrize(
    ("config", "kind", "wanted"),
    [
        ({"modle_path": "x"}, BadSetting, "unknown key 'modle_path'"),
        ({"model_path": ""}, BadSetting, "model_path"),
        ({"model_path": 7}, BadSetting, "model_path"),
        ({"device": "tpu"}, BadSetting, "device = 'tpu': wanted one of auto, cpu"),
        ({"model_type": "gpt"}, BadSetting, "model_type"),
        ({"max_tokens": 0}, BadSetting, "max_tokens"),
        ({"max_tokens": True}, BadSetting, "max_tokens"),
        ({"temperature": "hot"}, BadSetting, "temperature"),
        ({"temperature": float("nan")}, BadSetting, "temperature"),
        ({"model": "default"}, BadSetting, "an object of keys"),
        ({"app": {"enable": {"model": False}}}, NotLoaded, "app.enable.model is false"),
        ({"app.enable.model": False, "model.device": "cpu"}, NotLoaded, "app.enable.model is false"),
        ({"model_path": "/no/such"}, NotFound, "neither a directory nor a hub name"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named_and_nothing_starts(config: dict[str, Any], kind: type[Exception], wanted: str) -> None:
    before = threading.active_count()
    for start in (initialize_model, start_model_service):
        with pytest.raises(kind, match=wanted):
            start(config)
    assert threading.active_count() == before


def test_the_model_section_of_a_whole_file_is_taken() -> None:
    wanted = ModelSettings(model_path="x", max_tokens=9)
    for config in (
        {"model_path": "x", "max_tokens": 9},
        {"app": {"enable": {"model": True, "http": False}}, "model": {"model_path": "x", "max_tokens": 9}},
        {"app.enable.model": True, "model.model_path": "x", "model": {"max_tokens": 9}, "network": "lab"},
        wanted,
    ):
        assert settings_of(config) == wanted
    assert settings_of(None) == ModelSettings()


def test_the_type_is_checked(paths: dict[str, Path]) -> None:
    with pytest.raises(BadSetting, match="model_type is 'encoder', and causal is of the type causal"):
        initialize_model(settings(paths["causal"], model_type="encoder"))
    assert initialize_model(settings(paths["causal"], model_type="causal")).facts.kind == "causal"


# -- the service -----------------------------------------------------------------------------------------------------


def test_it_is_ready_when_start_returns_and_no_line_says_so_before(
    paths: dict[str, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    load, lines_at_load = Runtime.load, []

    def loading(*given: Any) -> Runtime:
        runtime = load(*given)
        lines_at_load.extend(record.getMessage() for record in caplog.records)
        return runtime

    monkeypatch.setattr(Runtime, "load", loading)
    with start_model_service(settings(paths["encoder"])) as service:
        assert lines_at_load == []
        assert "loaded and takes calls" in caplog.text
        assert service.facts.kind == "encoder"
        [one, two] = [service.submit(text) for text in ("a", ["a"] * 40)]
        assert len(one.result().embeddings or ()) == 32
        assert len(two.result().embeddings or ()) == 40


def test_calls_that_overlap_are_computed_together(service: ModelService) -> None:
    answers = [service.submit("Once", max_tokens=50, temperature=0) for _ in range(4)]
    assert len({answer.result().text for answer in answers}) == 1


def test_cancelling_frees_the_engine(service: ModelService) -> None:
    long = service.submit("Once", max_tokens=400, temperature=0)
    service.submit("Once", max_tokens=1).result()
    assert long.cancel()
    with pytest.raises(CancelledError):
        long.result()
    service.submit("Once", max_tokens=1).result()
    assert service._open == 0


def test_stopping_finishes_what_was_accepted(paths: dict[str, Path]) -> None:
    service = start_model_service(settings(paths["causal"]))
    answers = [service.submit("Once", max_tokens=20, temperature=0) for _ in range(3)]
    service.stop()
    service.stop()
    assert {answer.result(timeout=0).usage.completion_tokens for answer in answers} == {20}
    with pytest.raises(NotLoaded, match="has stopped"):
        service.submit("a")


def test_stopping_at_once_ends_the_rest_in_an_error(paths: dict[str, Path]) -> None:
    service = start_model_service(settings(paths["causal"]))
    answers = [service.submit(["Once"] * 50, max_tokens=400, temperature=0) for _ in range(5)]
    service.stop(seconds_max=0)
    with pytest.raises(NotLoaded, match="has stopped"):
        answers[-1].result(timeout=0)
    assert all(answer.done() for answer in answers)


def test_a_crowd_is_refused_by_name(service: ModelService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.service.SUBMITTED_MAX", 2)
    held = [service.submit("Once", max_tokens=400, temperature=0) for _ in range(2)]
    with pytest.raises(EngineFull, match="SUBMITTED_MAX"):
        service.submit("a")
    assert [each.cancel() for each in held] == [True, True]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_leaves_nobody_waiting(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    service = start_model_service(settings(paths["causal"]))
    monkeypatch.setattr(Runtime, "step", lambda self: 1 / 0)
    with pytest.raises(NotLoaded, match="has stopped"):
        service.submit("Once").result(timeout=HANG_S)
    with pytest.raises(NotLoaded, match="has stopped"):
        service.submit("Once").result(timeout=HANG_S)
    service.stop()


def test_a_result_can_be_written_as_json(encoder: Model, causal: Model) -> None:
    from dataclasses import asdict

    for model in (encoder, causal):
        told = json.loads(json.dumps(asdict(run_model_inference(model, ["Once"], max_tokens=2))))
        assert told["model"] == model.facts.name
    assert Inference.__dataclass_fields__.keys() >= FIELDS - {"served_by"}
