"""The engine through drawn histories: every request ends once and as it would alone, and nothing is left behind."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import EngineConfig
from model.engine import Engine
from model.errors import EngineFull
from model.load import Loaded
from model.requests import GenerationRequest, Output, SamplingParameters
from model.step import Priority
from tests.test_engine import load_path, run
from tests.tiny_models import save_causal

KINDS = ("llama", "mamba")  # over blocks, and one by one


@pytest.fixture(scope="module", params=KINDS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    path = tmp_path_factory.mktemp(request.param)
    save_causal(path, request.param)
    made = load_path(path)
    if request.param == "llama":
        with torch.no_grad():
            made.model.get_input_embeddings().weight[7] = float("nan")  # who has this token fails
    return made


PROMPTS = [[1, 2, 3], [5] * 40, [*range(8, 70)], [*range(8, 60), 3, 3], [9, 7, 9], [4] * 33]
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 4},
    {"temperature": 0.0, "stop": ("e",)},
]


class History:
    """An engine, and what is known of each request."""

    def __init__(self, loaded: Loaded, draw: random.Random, references: dict[tuple[int, int, int], Output]) -> None:
        self.loaded, self.draw, self.references = loaded, draw, references
        self.engine = Engine(
            loaded,
            EngineConfig(
                slots=3, kv_tokens=draw.choice((112, 160, 640)), prefill_chunk=24, queue_max=4, block_tokens=16
            ),
        )
        self.asked: dict[str, tuple[int, int, int]] = {}
        self.made: dict[str, Output] = {}
        self.over: dict[str, str] = {}
        self.refused = 0

    def request(self, name: str, prompt: int, sampling: int, most: int, **more: Any) -> GenerationRequest:
        wish = SamplingParameters(max_tokens=most, **SAMPLINGS[sampling])
        return GenerationRequest(request_id=name, prompt=tuple(PROMPTS[prompt]), sampling=wish, **more)

    def reference(self, key: tuple[int, int, int]) -> Output:
        if key not in self.references:
            self.references[key] = run(Engine(self.loaded), self.request("alone", *key))["alone"]
        return self.references[key]

    def add(self) -> None:
        key = (self.draw.randrange(len(PROMPTS)), self.draw.randrange(len(SAMPLINGS)), self.draw.choice((1, 5, 20, 45)))
        name = f"r{len(self.asked) + self.refused}"
        whole = self.reference(key)
        cut = self.draw.randint(0, len(whole.tokens)) if self.draw.random() < 0.2 else 0
        delivered = whole.tokens[:cut] if whole.error is None else ()
        request = self.request(
            name, *key, delivered=delivered, private=self.draw.random() < 0.2, requester=self.draw.choice("ab"),
            priority=self.draw.choice(list(Priority)),
        )  # fmt: skip
        try:
            self.engine.add(request)
        except EngineFull:
            self.refused += 1
            return
        self.asked[name] = key
        self.made[name] = Output(request_id=name, tokens=delivered)

    def step(self) -> None:
        made = self.engine.step()
        figures = self.engine.statistics()
        assert len(getattr(self.engine._executor, "_caches", {})) <= figures.slots_total - figures.slots_free
        for output in made:
            name = output.request_id
            assert name not in self.over, f"{name} goes on after its end"
            self.made[name] = Output(request_id=name, tokens=self.made[name].tokens + output.tokens)
            if output.error is not None:
                self.over[name] = "failed"
                assert self.reference(self.asked[name]).error is not None
            elif output.finish is not None:
                self.over[name] = output.finish
                whole = self.reference(self.asked[name])
                assert (self.made[name].tokens, output.finish) == (whole.tokens, whole.finish)

    def cancel(self) -> None:
        there = [name for name in self.asked if name not in self.over]
        if there:
            name = self.draw.choice(there)
            self.engine.cancel(name)
            self.over[name] = "cancelled"

    def end(self) -> None:
        for _ in range(3_000):
            if not self.engine.has_work:
                break
            self.step()
        assert set(self.over) == set(self.asked)
        figures = self.engine.statistics()
        assert figures.slots_free == figures.slots_total
        assert figures.kv_tokens_free == figures.kv_tokens_total
        assert figures.queue_length == 0
        assert figures.finished + figures.failed + figures.cancelled == len(self.asked)
        assert not self.engine._answers
        assert not self.engine._whole
        assert not getattr(self.engine._executor, "_caches", {})


@pytest.fixture(scope="module")
def references() -> dict[tuple[int, int, int], Output]:
    return {}


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 32), events=st.integers(20, 80))
def test_every_request_ends_once_and_as_it_would_alone(
    loaded: Loaded, references: dict[Any, Output], seed: int, events: int
) -> None:
    draw = random.Random(seed)
    history = History(loaded, draw, references.setdefault(loaded.model.config.model_type, {}))  # type: ignore[arg-type]
    for _ in range(events):
        act = draw.random()
        if act < 0.4:
            history.add()
        elif act < 0.5:
            history.cancel()
        else:
            history.step()
    history.end()


@pytest.mark.slow
def test_a_thousand_cancels_leave_nothing(tmp_path: Path) -> None:
    save_causal(tmp_path)
    draw = random.Random(5)
    history = History(load_path(tmp_path), draw, {})
    cancelled = 0
    while cancelled < 1_000:
        history.add()
        for _ in range(draw.randrange(3)):
            history.step()
        if draw.random() < 0.8:
            before = len(history.over)
            history.cancel()
            cancelled += len(history.over) - before
    history.end()
