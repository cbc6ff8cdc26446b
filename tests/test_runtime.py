"""The facade that the node drives: one causal model, one encoder, or both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.config import EngineConfig, RuntimeConfig
from model.errors import BadInput, NotFound
from model.load import DEFAULT_PATH
from model.requests import GenerationRequest, SamplingParameters
from model.runtime import Runtime
from model.runtime_face import Runtime as RuntimeFace
from tests.tiny_models import save_causal, save_encoder

ROOT = Path(__file__).parent.parent
FP32 = RuntimeConfig(device="cpu", dtype="float32", threads=1)
needs_default = pytest.mark.skipif(not DEFAULT_PATH.is_dir(), reason="model/default is missing: run model.pretrain")


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("causal")
    save_causal(path)
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    save_encoder(path)
    return path


def answer(runtime: Runtime, prompt: tuple[int, ...], max_tokens: int = 8) -> tuple[str, str | None]:
    sampling = SamplingParameters(temperature=0.0, max_tokens=max_tokens)
    runtime.add(GenerationRequest(request_id="r", prompt=prompt, sampling=sampling))
    text, finish = "", None
    while runtime.has_work:
        for output in runtime.step():
            assert output.error is None
            text, finish = text + output.text, output.finish
    return text, finish


def test_a_causal_model_does_it_all(causal: Path) -> None:
    told: list[tuple[int, int]] = []
    runtime = Runtime.load(str(causal), FP32, lambda done, total: told.append((done, total)))
    assert told
    assert told == [(done, len(told)) for done in range(1, len(told) + 1)], "one after the other, to the last"
    face: RuntimeFace = runtime
    assert face.all_facts() == (runtime.facts,)
    assert runtime.embedding_facts == runtime.facts
    assert runtime.facts.embeds
    assert runtime.facts.name == causal.name
    assert answer(runtime, runtime.render([("user", "Hi")]))[1] in ("stop", "length")
    made = runtime.embed(["one", "two"])
    assert made.facts == runtime.facts
    assert runtime.statistics().slots_total == 16
    assert runtime.statistics().kv_tokens_total == 256_000_000 // runtime.facts.kv_token_bytes // 64 * 64
    assert runtime.device_free_bytes() > 0
    assert runtime.device == "cpu"
    runtime.cancel("nobody")


def test_an_encoder_makes_vectors_only(encoder: Path) -> None:
    runtime = Runtime.load(str(encoder), FP32)
    assert runtime.facts.kind == "encoder"
    assert runtime.facts.embeds
    assert runtime.statistics().slots_total == 0
    assert not runtime.has_work
    assert len(runtime.embed(["one"]).vectors) == 1
    with pytest.raises(BadInput, match="is an encoder: it makes vectors, not text"):
        answer(runtime, (1, 2))
    runtime.cancel("nobody")


def test_a_second_model_embeds(causal: Path, encoder: Path) -> None:
    runtime = Runtime.load(str(causal), RuntimeConfig(device="cpu", dtype="float32", embedding_name=str(encoder)))
    assert [facts.kind for facts in runtime.all_facts()] == ["causal", "encoder"]
    assert [facts.embeds for facts in runtime.all_facts()] == [False, True]
    assert runtime.embed(["one"]).facts == runtime.embedding_facts


def test_what_is_not_there_is_said(causal: Path) -> None:
    with pytest.raises(NotFound, match="neither a directory nor a hub name"):
        Runtime.load("nothing", FP32)
    with pytest.raises(NotFound, match="neither a directory nor a hub name"):
        Runtime.load(str(causal), RuntimeConfig(device="cpu", embedding_name="nothing"))


@pytest.mark.parametrize(
    "fields",
    [
        {"device": "tpu"},
        {"dtype": "int3"},
        {"quantize": "int3"},
        {"threads": -1},
        {"kv_cache_mb": 0},
        {"kv_tokens": -1},
    ],
)
def test_bad_configuration(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        RuntimeConfig(**fields)  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize("fields", [{"slots": 0}, {"kv_tokens": 0}, {"prefill_chunk": 0}, {"queue_max": -1}])
def test_bad_engine_bounds(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="engine bounds"):
        EngineConfig(**fields)


def test_every_knob_reaches_the_engine(causal: Path) -> None:
    config = RuntimeConfig(device="cpu", slots=3, kv_tokens=77, queue_max=5, prefill_chunk=9)
    assert config.engine(1000) == EngineConfig(slots=3, kv_tokens=77, queue_max=5, prefill_chunk=9)
    assert RuntimeConfig(kv_cache_mb=2).engine(1000).kv_tokens == 2_000
    statistics = Runtime.load(str(causal), config).statistics()
    assert (statistics.slots_total, statistics.kv_tokens_total, statistics.queue_max) == (3, 64, 5)


@pytest.mark.slow
def test_the_face_needs_no_torch() -> None:
    code = "import model.runtime_face, model.errors, model.requests, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


def takes_huge_pages() -> bool:
    """Whether the kernel gives them to who asks."""
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return switch.exists() and "[never]" not in switch.read_text()


@pytest.mark.slow
def test_openmp_waits_passively(causal: Path) -> None:
    """Its spinning at barriers took two thirds of the speed where another process was busy."""
    code = (
        "import os; os.environ.pop('OMP_WAIT_POLICY', None); import model.runtime; print(os.environ['OMP_WAIT_POLICY'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "PASSIVE", done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not takes_huge_pages(), reason="this kernel gives huge pages to nobody who asks")
def test_large_tensors_stand_on_huge_pages() -> None:
    """New weights are packed into fresh memory: page by page of 4 KiB that took as long as the packing."""
    code = (
        "import os; os.environ.pop('THP_MEM_ALLOC_ENABLE', None); import model.runtime, torch; x = torch.ones(1 << 24);"
        "print(next(l for l in open('/proc/self/smaps_rollup') if l.startswith('AnonHugePages')).split()[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert int(done.stdout.strip() or 0) >= 32 << 10, done.stderr


@needs_default
@pytest.mark.slow
def test_the_default_model_equals_generate_and_is_taken_over_without_a_seam() -> None:
    runtime = Runtime.load("default", FP32)
    prompt = runtime.encode("The King said to his youngest daughter,")
    ids = torch.tensor([prompt])
    whole = runtime._loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    expected = tuple(whole[0, len(prompt) :].tolist())
    sampling = SamplingParameters(temperature=0.0, max_tokens=40)
    runtime.add(GenerationRequest(request_id="r", prompt=prompt, sampling=sampling))
    seen = [((), "")]
    while runtime.has_work:
        for output in runtime.step():
            seen.append((seen[-1][0] + output.tokens, seen[-1][1] + output.text))
    assert seen[-1][0] == expected
    for split in (1, 7, 20, 39):
        tokens, text = seen[min(split, len(seen) - 1)]
        runtime.add(
            GenerationRequest(
                request_id="s", prompt=prompt, delivered=tokens, delivered_chars=len(text), sampling=sampling
            )
        )
        while runtime.has_work:
            for output in runtime.step():
                tokens, text = tokens + output.tokens, text + output.text
        assert (tokens, text) == seen[-1]


@needs_default
@pytest.mark.slow
def test_the_default_model_answers() -> None:
    runtime = Runtime.load("default", FP32)
    assert runtime.facts.name == "default"
    text, finish = answer(runtime, runtime.encode("Once upon a time"), 24)
    assert len(text) > 20
    assert finish in ("stop", "length")
    assert len(runtime.embed(["Once upon a time"]).vectors[0]) == 4 * 256
    assert os.path.getsize(DEFAULT_PATH / "model.safetensors") <= 12_000_000
