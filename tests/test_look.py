"""A look at held-out text: the serving weights' own figures, the same without a cause, moved by each cause."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from model.config import QUANTIZATIONS, EngineConfig, RuntimeConfig
from model.corpus import split_corpus
from model.engine import Engine
from model.errors import BadInput, ComputeFailed
from model.load import DEFAULT_PATH, Found, load
from model.look import HELD_OUT, ROW_TOKENS, SLICE_CHARS, held_out_slices, looking
from model.requests import GenerationRequest, Looked, SamplingParameters
from model.runtime import Runtime
from node.averages import binned, calibration_error, gaps_of
from tests.tiny_models import save_causal, save_encoder

FP32 = RuntimeConfig(device="cpu", dtype="float32", threads=1)
TEXT = held_out_slices()[0]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_causal(path)
    return path


def looked(runtime: Runtime, text: str = TEXT, piece: int = ROW_TOKENS) -> Looked:
    work = runtime.looking(text, piece)
    while True:
        try:
            next(work)
        except StopIteration as end:
            look: Looked = end.value
            return look


def error_of(look: Looked) -> float:
    error = calibration_error(gaps_of(binned(look.judged)), len(look.judged))
    assert error is not None
    return error


def moved(runtime: Runtime, path: Path, change: float) -> None:
    """The model goes on under its weights, each moved by so much of a fixed pattern."""
    named = load(Found("tiny", path, path), device="cpu", dtype="float32").model.named_parameters()
    weights = {
        name: weight + change * torch.sin(torch.arange(weight.numel(), dtype=torch.float32)).reshape(weight.shape)
        for name, weight in named
    }
    ready = runtime.preparing(weights)
    try:
        while True:
            next(ready)
    except StopIteration as end:
        runtime.adopt(end.value, f"moved by {change}")


# --- the text ---


def test_the_text_is_there_and_its_slices_are_all_of_it() -> None:
    whole = HELD_OUT.read_text(encoding="ascii")
    slices = held_out_slices()
    assert len(slices) > 350
    assert all(SLICE_CHARS <= len(each) < SLICE_CHARS + 40 for each in slices)
    joined = "".join("".join(each.split()) for each in slices)
    left = "".join(whole.split()).removeprefix(joined)
    assert len(left) < SLICE_CHARS, "all but a rest is in some slice, once and in order"
    assert held_out_slices() == slices


def test_slices_of_any_text() -> None:
    assert held_out_slices("") == ()
    assert held_out_slices("word " * 79) == ()
    assert held_out_slices("a" * 1000) == ("a" * 1000,), "one word"
    assert held_out_slices("a" * 399 + " " + "b" * 401) == ("a" * 399 + " " + "b" * 401,)
    assert held_out_slices("a" * 400 + " " + "b" * 401) == ("a" * 400, "b" * 401)


def test_it_is_the_book_that_the_embedded_model_did_not_read() -> None:
    """Its maker holds out the last book: `split_corpus` of a corpus that ends with it."""
    whole = HELD_OUT.read_text(encoding="ascii")
    split = split_corpus("some other book\n\n\n" + whole)
    assert split.held_out[-1].strip() == whole.strip()
    assert whole.startswith("One thing was certain, that the WHITE kitten"), "Through the Looking-Glass"


# --- the figures ---


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2", "mamba"])
def test_it_is_the_loss_of_the_models_own_pass(kind: str, tmp_path: Path) -> None:
    model = save_causal(tmp_path, kind)
    runtime = Runtime.load(str(tmp_path), FP32)
    ids = runtime.encode(TEXT)[: ROW_TOKENS + 1]
    with torch.inference_mode():
        logits_TV = model(torch.tensor([ids])).logits[0, :-1].double()
    next_T = torch.tensor(ids[1:])
    wanted = float(torch.nn.functional.cross_entropy(logits_TV, next_T, reduction="sum"))
    best_T, at_T = logits_TV.softmax(1).max(1)
    for piece in (ROW_TOKENS, 16, 7):
        look = looked(runtime, piece=piece)
        assert look.nats == pytest.approx(wanted, rel=1e-4), piece
        assert len(look.judged) == ROW_TOKENS
        assert [right for _, right in look.judged] == (at_T == next_T).tolist(), piece
        assert [sure for sure, _ in look.judged] == pytest.approx(best_T.tolist(), abs=1e-4), piece
        assert look.revision == runtime.facts.revision


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_a_cause_nothing_moves(quantize: str, dtype: str, path: Path) -> None:
    """The same weights, text and pieces: the same figures to the bit, requests in between and a new process' load."""
    config = RuntimeConfig(device="cpu", dtype=dtype, quantize=quantize, threads=1)
    runtime = Runtime.load(str(path), config)
    first = looked(runtime)
    runtime.add(
        GenerationRequest(request_id="a", prompt=(1, 2, 3), sampling=SamplingParameters(max_tokens=5, temperature=0.0))
    )
    while runtime.has_work:
        runtime.step()
    assert looked(runtime) == first
    assert looked(Runtime.load(str(path), config)) == first


def test_it_goes_through_the_layers_that_serve(path: Path) -> None:
    """Packed layers of fewer bits give other figures: what is looked at is what answers."""
    looks = {
        quantize: looked(Runtime.load(str(path), RuntimeConfig(device="cpu", dtype="float32", quantize=quantize)))
        for quantize in QUANTIZATIONS
    }
    assert len({look.nats for look in looks.values()}) == len(QUANTIZATIONS)
    assert looks["int8"].nats == pytest.approx(looks["none"].nats, rel=0.05)


def test_other_weights_move_the_loss_and_the_calibration(path: Path) -> None:
    """The causes of surprise.* and calibration.*: the weights."""
    runtime = Runtime.load(str(path), FP32)
    before = looked(runtime)
    moved(runtime, path, 0.3)
    after = looked(runtime)
    assert after.revision == runtime.facts.revision != before.revision
    assert after.nats != before.nats
    assert error_of(after) != error_of(before)
    moved(runtime, path, 0.0)
    back = looked(runtime)
    assert (back.nats, back.judged) == (before.nats, before.judged), "to the bit, under the weights before"


def test_another_text_moves_the_loss(path: Path) -> None:
    runtime = Runtime.load(str(path), FP32)
    assert len({looked(runtime, text).nats for text in held_out_slices()[:8]}) == 8


@pytest.mark.slow
def test_what_is_shuffled_raises_the_calibration_error(path: Path) -> None:
    """The cause of calibration.error: whether it is right as often as it is sure. Of a model that has learned the text
    by heart, the same confidences with other tokens behind them."""
    loaded = load(Found("tiny", path, path), device="cpu", dtype="float32")
    ids = loaded.tokens.encode(TEXT)[: ROW_TOKENS + 1]
    model = loaded.model.requires_grad_(True)
    steps = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]))
        steps.zero_grad()
        loss.backward()
        steps.step()
    model.requires_grad_(False)

    def error(tokens: tuple[int, ...]) -> tuple[float, float]:
        work = looking(loaded, tokens, ROW_TOKENS)
        try:
            while True:
                next(work)
        except StopIteration as end:
            return error_of(end.value), end.value.nats

    known, known_nats = error(ids)
    shuffled = (*ids[:1], *ids[:0:-1])
    wrong, wrong_nats = error(shuffled)
    assert known < 0.2 < 0.3 < wrong
    assert wrong_nats > 10 * known_nats


# --- what goes wrong ---


def test_weights_that_change_meanwhile_end_the_look(path: Path) -> None:
    runtime = Runtime.load(str(path), FP32)
    work = runtime.looking(TEXT, 16)
    next(work)
    moved(runtime, path, 0.0)
    with pytest.raises(StopIteration) as end:
        next(work)
    assert end.value.value is None
    assert looked(runtime, piece=16).revision == runtime.facts.revision


def test_numbers_that_are_not_finite_are_told_and_not_counted(tmp_path: Path) -> None:
    model = save_causal(tmp_path)
    with torch.no_grad():
        model.lm_head.weight[3, 0] = math.nan
    model.save_pretrained(tmp_path)
    runtime = Runtime.load(str(tmp_path), FP32)
    with pytest.raises(ComputeFailed, match="not finite"):
        looked(runtime)


def test_a_model_that_fails_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime.load(str(path), FP32)

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(runtime.loaded.model, "forward", fails)
    with pytest.raises(ComputeFailed, match="no kernel for this"):
        looked(runtime)


def test_too_little_text_and_an_encoder(path: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="two are the least"):
        looked(Runtime.load(str(path), FP32), "a")
    save_encoder(tmp_path)
    with pytest.raises(BadInput, match="is an encoder"):
        looked(Runtime.load(str(tmp_path), FP32))


def test_a_short_context_is_kept_to(path: Path) -> None:
    runtime = Runtime.load(str(path), RuntimeConfig(device="cpu", dtype="float32", max_length=32))
    assert len(looked(runtime).judged) == 31


def test_it_leaves_requests_as_they_are(path: Path) -> None:
    """Between any two steps of an answer: the answer is the same."""
    loaded = load(Found("tiny", path, path), device="cpu", dtype="float32")
    answers = []
    for looks in (False, True):
        engine, made = Engine(loaded, EngineConfig()), list[int]()
        engine.add(
            GenerationRequest(
                request_id="a", prompt=(5, 6, 7), sampling=SamplingParameters(max_tokens=12, temperature=0.0)
            )
        )
        while engine.has_work:
            made += [token for output in engine.step() for token in output.tokens]
            if looks:
                for _ in looking(loaded, loaded.tokens.encode(TEXT), 16):
                    pass
        answers.append(made)
    assert answers[0] == answers[1]


@pytest.mark.skipif(not DEFAULT_PATH.is_dir(), reason="model/default is missing: run model.pretrain")
def test_the_embedded_model_finds_it_harder_than_a_tale_it_knows() -> None:
    runtime = Runtime.load("default", FP32)
    look = looked(runtime)
    assert 1.0 < look.nats / len(look.judged) < 6.0, "ln 4096 is 8.3"


def test_a_cpu_has_no_accelerators_memory(path: Path) -> None:
    assert Runtime.load(str(path), FP32).accelerator_bytes() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_accelerator_memory_is_what_this_process_holds(path: Path) -> None:
    runtime = Runtime.load(str(path), RuntimeConfig(device="cuda"))
    held = runtime.accelerator_bytes()
    assert held is not None
    assert held == torch.cuda.memory_reserved() > 0
