"""Few numbers of tokens go through a model on a CPU in bf16, whatever lengths peers choose; fp32 is left as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import EngineConfig
from model.embed import Embedder
from model.engine import Engine
from model.lengths import LENGTHS, at_least, at_most
from model.load import Found, Loaded, load
from model.requests import GenerationRequest, SamplingParameters
from tests.tiny_models import save_causal


def tiny(path: Path, dtype: str) -> Loaded:
    save_causal(path)
    return load(Found("tiny", path, path), device="cpu", dtype=dtype)


def shapes_of(model: Any, run: Callable[[], None]) -> set[tuple[int, ...]]:
    """(texts, tokens) of each pass that `run` makes."""
    seen: set[tuple[int, ...]] = set()
    hook = model.register_forward_pre_hook(
        lambda _module, _args, named: seen.add(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    run()
    hook.remove()
    return seen


@given(st.integers(1, 1 << 20))
def test_lengths_are_near(tokens: int) -> None:
    assert at_most(tokens) <= tokens <= at_least(tokens)
    assert 3 * at_most(tokens) >= 2 * tokens - 1
    assert 2 * at_least(tokens) <= 3 * tokens
    assert {at_most(tokens), at_least(tokens)} <= {*LENGTHS}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 17), ("float32", 400)])
def test_prompts_of_every_length_make_few_shapes(tmp_path: Path, dtype: str, most: int) -> None:
    """A stranger who embedded 400 texts of other lengths took 500 MB for good."""
    loaded = tiny(tmp_path, dtype)
    engine = Engine(loaded, EngineConfig(prefill_chunk=256))
    prompts = range(2, 400, 3)

    def run() -> None:
        for size in prompts:
            sampling = SamplingParameters(temperature=0.0, max_tokens=1)
            engine.add(GenerationRequest(request_id=f"{size}", prompt=(5,) * size, sampling=sampling, private=True))
            while engine.has_work:
                assert all(output.error is None for output in engine.step())

    seen = shapes_of(loaded.model, run)
    assert len(seen) <= most
    figures = engine.statistics()
    assert figures.prefilled_tokens + figures.decoded_tokens == sum(prompts)
    if dtype == "float32":
        assert len(seen) > 100, "fp32 takes prompts whole"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_texts_of_every_length_and_number_make_few_shapes(tmp_path: Path, dtype: str) -> None:
    loaded = tiny(tmp_path, dtype)
    embedder = Embedder(loaded)

    def run() -> None:
        for size in range(1, 130, 3):
            made = embedder.embed([(5,) * size] * (1 + size % 13))
            assert made.tokens == size * (1 + size % 13)

    seen = shapes_of(loaded.model.base_model, run)
    assert all(tokens in LENGTHS and texts * tokens in LENGTHS for texts, tokens in seen) == (dtype == "bfloat16")
