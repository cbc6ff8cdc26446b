"""A thousand cancels at random moments: nothing is left of them, and who was not cancelled answers as if alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from model.config import EngineConfig
from model.engine import Engine
from model.errors import EngineFull
from model.load import Found, load
from model.requests import GenerationRequest, SamplingParameters
from tests.tiny_models import save_causal

CANCELS = 1_000
ALONE = 8
STEPS_MAX = 5_000  # 429 were needed


@pytest.mark.slow
def test_a_thousand_cancels_leave_nothing(tmp_path: Path) -> None:
    save_causal(tmp_path)
    loaded = load(Found("tiny", tmp_path, tmp_path), device="cpu", dtype="float32")
    rng = random.Random(1)
    engine = Engine(loaded, EngineConfig(slots=4, kv_tokens=512, prefill_chunk=32, queue_max=12))
    live: dict[str, GenerationRequest] = {}
    made: dict[str, tuple[int, ...]] = {}
    ended: list[GenerationRequest] = []
    count = cancelled = full = steps = 0
    while engine.has_work or cancelled < CANCELS:
        while cancelled < CANCELS:
            count += 1
            request = random_request(rng, str(count))
            try:
                engine.add(request)
            except EngineFull:
                full += 1
                break
            live[request.request_id], made[request.request_id] = request, ()
        steps += 1
        assert steps < STEPS_MAX, "the engine does not get on: room is lost"
        for output in engine.step():
            assert output.request_id in live, "an output of a request that had ended"
            assert output.error is None
            made[output.request_id] += output.tokens
            if output.finish is not None:
                ended.append(live.pop(output.request_id))
        for name in rng.sample(sorted(live), min(len(live), rng.randint(0, 5), CANCELS - cancelled)):
            engine.cancel(name)
            engine.cancel(name)  # once more is no error
            del live[name]
            cancelled += 1
    told = engine.statistics()
    assert (told.slots_free, told.queue_length, told.kv_tokens_free) == (told.slots_total, 0, told.kv_tokens_total)
    assert (told.cancelled, told.finished, told.failed) == (CANCELS, len(ended), 0)
    assert not live
    assert full > 20
    assert len(ended) > 50
    for request in rng.sample(ended, ALONE):
        alone = Engine(loaded)
        alone.add(request)
        tokens: tuple[int, ...] = ()
        while alone.has_work:
            tokens += sum((output.tokens for output in alone.step()), ())
        assert tokens == made[request.request_id], "an answer changed by what was cancelled around it"


def random_request(rng: random.Random, name: str) -> GenerationRequest:
    prompt = tuple(rng.randrange(1, 320) for _ in range(rng.choice((1, 5, 20, 60, 150))))
    sampling = SamplingParameters(
        max_tokens=rng.randint(1, 12), temperature=rng.choice((0.0, 0.9)), seed=rng.randrange(99)
    )
    return GenerationRequest(request_id=name, prompt=prompt, sampling=sampling)
