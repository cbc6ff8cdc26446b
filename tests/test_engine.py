"""The engine: equal to generate(), seamless takeover, bounds, and requests that end alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import EngineConfig
from model.engine import Engine, Rate
from model.errors import BadInput, ComputeFailed, EngineFull, OutOfMemory
from model.load import Found, Loaded, load
from model.requests import GenerationRequest, Output, SamplingParameters
from model.sample import choose
from model.text import TextStream
from tests.tiny_models import CONTEXT, save_causal, sentencepiece_tokenizer

KINDS = ("llama", "qwen3", "gpt2", "mistral", "gemma", "gemma2", "phi", "mamba")
GREEDY = SamplingParameters(temperature=0.0, max_tokens=24)


def load_path(path: Path) -> Loaded:
    return load(Found("tiny", path, path), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    path = tmp_path_factory.mktemp("llama")
    save_causal(path)
    return load_path(path)


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    path = tmp_path_factory.mktemp("spaced")
    save_causal(path, tokenizer=sentencepiece_tokenizer(), seed=3)
    return load_path(path)


def request(prompt: tuple[int, ...], name: str = "r", **fields: Any) -> GenerationRequest:
    outer = {key: fields.pop(key) for key in ("delivered", "delivered_chars", "private") if key in fields}
    sampling = SamplingParameters(**{"temperature": 0.0, "max_tokens": 24, **fields})
    return GenerationRequest(request_id=name, prompt=prompt, sampling=sampling, **outer)


def run(engine: Engine, *requests: GenerationRequest) -> dict[str, Output]:
    """Runs requests to their ends; all outputs of one put together."""
    for item in requests:
        engine.add(item)
    made: dict[str, Output] = {}
    for output in steps(engine):
        before = made.get(output.request_id, Output(request_id=output.request_id))
        assert before.finish is None
        assert before.error is None
        made[output.request_id] = Output(
            request_id=output.request_id,
            tokens=before.tokens + output.tokens,
            text=before.text + output.text,
            logprobs=before.logprobs + output.logprobs,
            finish=output.finish,
            error=output.error,
        )
    return made


def steps(engine: Engine) -> Iterator[Output]:
    for _ in range(10_000):
        if not engine.has_work:
            return
        yield from engine.step()
    raise AssertionError("the engine never finishes")


def prompt_of(length: int, vocabulary: int = 320) -> tuple[int, ...]:
    return tuple(1 + (i * 37 + i * i * 11) % (vocabulary - 1) for i in range(length))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_generate(kind: str, tmp_path: Path) -> None:
    model = save_causal(tmp_path, kind)
    engine = Engine(load_path(tmp_path), EngineConfig(slots=3, prefill_chunk=32))
    prompts = {"one": prompt_of(1), "short": prompt_of(7), "chunks": prompt_of(100)}
    made = run(engine, *(request(prompt, name) for name, prompt in prompts.items()))
    seen: set[int] = set()
    for name, prompt in prompts.items():
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        expected = tuple(whole[0, len(prompt) :].tolist())
        assert made[name].tokens == expected, name
        assert made[name].finish == ("stop" if expected[-1] == 0 else "length")
        seen.update(expected)
    assert len(seen) > 10, "models that repeat themselves prove little"


SAMPLINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "seed": 5},
    "nucleus": {"temperature": 1.1, "top_p": 0.8, "top_k": 50, "min_p": 0.01, "seed": 6},
    "penalized": {
        "temperature": 0.8, "seed": 7, "frequency_penalty": 0.5, "presence_penalty": 0.3, "repetition_penalty": 1.2,
    },
    "stops": {"temperature": 0.9, "seed": 5, "stop": ("\ufffd\ufffd", "e", "zz")},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "spaced"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_takeover_has_no_seam(name: str, family: str, request: pytest.FixtureRequest) -> None:
    """At every split, delivered tokens and text plus what a second engine adds equal the undisturbed answer."""
    loaded: Loaded = request.getfixturevalue(family)
    prompt = prompt_of(40, loaded.tokens.size)
    fields = {**SAMPLINGS[name], "max_tokens": 16}
    engine = Engine(loaded)
    engine.add(make(prompt, **fields))
    seen: list[tuple[tuple[int, ...], str]] = [((), "")]
    for output in steps(engine):
        seen.append((seen[-1][0] + output.tokens, seen[-1][1] + output.text))
    finish, (whole_tokens, whole_text) = output.finish, seen[-1]
    for tokens, text in seen:
        second = Engine(loaded, EngineConfig(prefill_chunk=16))
        rest = run(second, make(prompt, delivered=tokens, delivered_chars=len(text), **fields))["r"]
        assert tokens + rest.tokens == whole_tokens
        assert text + rest.text == whole_text
        assert rest.finish == finish
        assert rest.error is None


make = request


def test_takeover_gives_text_that_the_client_lacks(llama: Loaded) -> None:
    prompt = prompt_of(10)
    whole = run(Engine(llama), make(prompt))["r"]
    rest = run(Engine(llama), make(prompt, delivered=whole.tokens[:9], delivered_chars=2))["r"]
    assert rest.text == whole.text[2:]
    assert rest.tokens == whole.tokens[9:]


def test_an_answer_that_was_delivered_whole_ends_at_once(llama: Loaded) -> None:
    whole = run(Engine(llama), make(prompt_of(10)))["r"]
    engine = Engine(llama)
    rest = run(engine, make(prompt_of(10), delivered=whole.tokens, delivered_chars=0))["r"]
    assert (rest.tokens, rest.text, rest.finish) == ((), whole.text, whole.finish)
    assert engine.statistics().prefilled_tokens == 0


def test_a_request_is_the_same_alone_and_among_others(llama: Loaded) -> None:
    alone = run(Engine(llama), make(prompt_of(9), temperature=0.9, seed=1))["r"]
    others = [make(prompt_of(n), f"o{n}", temperature=1.0, seed=n) for n in (1, 30, 100)]
    engine = Engine(llama, EngineConfig(slots=3, prefill_chunk=16))
    among = run(engine, *others, make(prompt_of(9), temperature=0.9, seed=1))["r"]
    assert among.tokens == alone.tokens
    assert among.text == alone.text


def test_a_sampled_token_is_a_function_of_logits_seed_and_position(llama: Loaded) -> None:
    """What an auditor does: one pass over prompt and answer, then each choice anew."""
    prompt = prompt_of(9)
    sampling = SamplingParameters(temperature=0.9, top_p=0.95, seed=12, max_tokens=20, frequency_penalty=0.3)
    engine = Engine(llama)
    made = run(engine, GenerationRequest(request_id="r", prompt=prompt, sampling=sampling))["r"]
    with torch.inference_mode():
        logits = llama.model(input_ids=torch.tensor([[*prompt, *made.tokens]])).logits[0].float()
    for position, token in enumerate(made.tokens):
        before = Counter(made.tokens[:position])
        assert choose(logits[len(prompt) - 1 + position], sampling, position, before, set(prompt)) == token


def test_the_end_token_ends_without_text(llama: Loaded) -> None:
    class EndsAtOnce:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, **fields: Any) -> Any:
            out = self.inner(**fields)
            out.logits[..., 0] = 1e9
            return out

    made = run(Engine(replaced(llama, EndsAtOnce(llama.model))), make(prompt_of(5)))["r"]
    assert (made.tokens, made.text, made.finish) == ((0,), "", "stop")


def test_logprobs_are_of_the_model_itself(llama: Loaded) -> None:
    prompt = prompt_of(12)
    made = run(Engine(llama), make(prompt, temperature=0.7, seed=4, logprobs=3, max_tokens=4))["r"]
    with torch.inference_mode():
        logits = llama.model(input_ids=torch.tensor([[*prompt, *made.tokens]])).logits[0].float()
    for at, item in enumerate(made.logprobs):
        row = torch.log_softmax(logits[len(prompt) - 1 + at], 0)
        assert item.logprob == pytest.approx(float(row[made.tokens[at]]), abs=1e-4)
        assert [p for _, p in item.top] == pytest.approx(torch.topk(row, 3).values.tolist(), abs=1e-4)
        assert item.text == llama.tokens.decode_token(made.tokens[at])


# bounds


def test_a_prompt_over_the_context_is_refused_with_the_numbers(llama: Loaded) -> None:
    engine = Engine(llama)
    with pytest.raises(BadInput, match=r"500 tokens and max_tokens is 13: together 513, more than the 512"):
        engine.add(make(prompt_of(500), max_tokens=13))
    engine.add(make(prompt_of(500), max_tokens=12))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": ()}, "no tokens"),
        ({"prompt": (1, 320)}, "token id 320 is outside"),
        ({"prompt": (1, -5)}, "token id -5 is outside"),
        ({"prompt": (1,), "delivered": (1 << 40,)}, "is outside the vocabulary"),
        ({"prompt": (1,), "max_tokens": 0}, "at least 1, not 0"),
        ({"prompt": (1,), "delivered": (1, 2, 3), "max_tokens": 2}, "3 tokens are delivered already"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(llama: Loaded, fields: dict[str, Any], words: str) -> None:
    engine = Engine(llama)
    with pytest.raises(BadInput, match=words):
        engine.add(make(**fields))
    assert not engine.has_work
    assert engine.statistics().kv_tokens_free == engine.statistics().kv_tokens_total


def test_the_same_id_twice_is_refused(llama: Loaded) -> None:
    engine = Engine(llama)
    engine.add(make(prompt_of(3)))
    with pytest.raises(BadInput, match="already in use"):
        engine.add(make(prompt_of(4)))
    assert run(engine)["r"].finish == "length"


def test_requests_wait_for_kv_room_and_are_refused_over_the_queue(llama: Loaded) -> None:
    engine = Engine(llama, EngineConfig(slots=4, kv_tokens=56, queue_max=2, block_tokens=8))
    own = {name: tuple(token + at for token in prompt_of(16)) for at, name in enumerate("abcde")}
    for name in ("a", "b"):  # 16 tokens to start with and a spare block for each that runs: two run
        engine.add(make(own[name], name))
    engine.step()
    for name in ("c", "d"):
        engine.add(make(own[name], name))
    with pytest.raises(EngineFull, match="the queue is full"):
        engine.add(make(own["e"], "e"))
    with pytest.raises(BadInput, match="need 57 tokens of KV memory and this node has 56"):
        engine.add(make(prompt_of(34), "f"))
    assert (engine.statistics().slots_free, engine.statistics().queue_length) == (2, 2)
    assert [engine.progress(name).queue_position for name in "abcd"] == [0, 0, 1, 2]
    assert {name: made.finish for name, made in run(engine).items()} == dict.fromkeys("abcd", "length")
    assert engine.statistics().kv_tokens_free == engine.statistics().kv_tokens_total == 56


def test_cancel_frees_the_room_at_once(llama: Loaded) -> None:
    engine = Engine(llama, EngineConfig(slots=1, prefill_chunk=8))
    engine.add(make(prompt_of(60), "a"))
    engine.add(make(prompt_of(5), "b"))
    engine.add(make(prompt_of(5), "c"))
    engine.step()
    assert engine.progress("a").prefilled_tokens == 8
    engine.cancel("a")
    engine.cancel("b")
    engine.cancel("nobody")
    with pytest.raises(BadInput, match="no request 'a'"):
        engine.progress("a")
    assert engine.statistics().slots_free == 1
    made = run(engine)
    assert set(made) == {"c"}
    assert engine.statistics().cancelled == 2


def test_no_step_prefills_more_than_a_chunk(llama: Loaded) -> None:
    engine = Engine(llama, EngineConfig(slots=4, prefill_chunk=32))
    for name, length in (("a", 200), ("b", 10), ("c", 90)):
        engine.add(make(prompt_of(length), name))
    before = 0
    first: dict[str, int] = {}
    while engine.has_work:
        for output in engine.step():
            first.setdefault(output.request_id, engine.statistics().steps)
        done = engine.statistics().prefilled_tokens
        assert done - before <= 32
        before = done
    assert first["b"] <= 3, "a short prompt does not wait for a long one"
    assert before + engine.statistics().reused_tokens == 300


# failures


def replaced(loaded: Loaded, model: Any) -> Loaded:
    return replace(loaded, model=model)


class Failing:
    """A model that fails for inputs that contain one token."""

    def __init__(self, inner: Any, exc: BaseException) -> None:
        self.inner = inner
        self.exc = exc

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, **fields: Any) -> Any:
        if 7 in fields["input_ids"]:
            raise self.exc
        return self.inner(**fields)


def failing(model: Any, exc: BaseException | None) -> Any:
    """None: what it computes from token 7 is not a number."""
    if exc is not None:
        return Failing(model, exc)
    model = deepcopy(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    return model


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (RuntimeError("shapes differ"), ComputeFailed),
        (IndexError("out of range"), ComputeFailed),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), OutOfMemory),
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory),
        (MemoryError(), OutOfMemory),
        (None, ComputeFailed),
    ],
    ids=["runtime", "index", "cpu-memory", "cuda-memory", "memory", "nan"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_bad_forward_ends_one_request(
    llama: Loaded, fault: BaseException | None, kind: type[Exception], temperature: float
) -> None:
    good = run(Engine(llama), make((1, 2, 3), max_tokens=6, temperature=temperature))["r"]
    assert 7 not in good.tokens
    engine = Engine(replaced(llama, failing(llama.model, fault)))
    made = run(
        engine,
        make((1, 2, 3), "good", max_tokens=6, temperature=temperature),
        make((1, 7, 3), "bad", max_tokens=6, temperature=temperature),
        make((1, 2, 3), "also", max_tokens=6, temperature=temperature),
    )
    assert isinstance(made["bad"].error, kind)
    assert str(made["bad"].error)
    assert made["good"].tokens == made["also"].tokens == good.tokens
    assert engine.statistics().failed == 1
    assert engine.statistics().slots_free == engine.statistics().slots_total


class FailingTokens:
    """A tokenizer whose decoder fails on one token."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def stream(self, prompt: tuple[int, ...], stop: tuple[str, ...], skip_chars: int) -> TextStream:
        def decode(ids: Any) -> str:
            if 7 in ids:
                raise ValueError("the tokenizer gave up")
            return str(self.inner.decode(ids))

        return TextStream(decode, prompt, stop, skip_chars)


@pytest.mark.parametrize("where", [{"prompt": (1, 7)}, {"prompt": (1, 2), "delivered": (3, 7, 3)}])
def test_a_decoder_that_fails_ends_one_request(llama: Loaded, where: dict[str, Any]) -> None:
    good = run(Engine(llama), make((1, 2, 3), max_tokens=4))["r"]
    engine = Engine(replace(llama, tokens=FailingTokens(llama.tokens)))
    made = run(engine, make(name="bad", max_tokens=4, **where), make((1, 2, 3), "good", max_tokens=4))
    assert isinstance(made["bad"].error, ComputeFailed)
    assert made["good"].tokens == good.tokens
    assert engine.statistics().slots_free == engine.statistics().slots_total


def test_one_that_fails_before_its_first_chunk_leaves_nothing(llama: Loaded) -> None:
    """Both are admitted in one step, which has tokens for the shorter prompt only."""
    engine = Engine(
        replace(llama, tokens=FailingTokens(llama.tokens)), EngineConfig(slots=2, prefill_chunk=8)
    )  # fmt: skip
    made = run(engine, make((1, 2, 3) * 3, "good", max_tokens=4), make((7,) * 20, "bad", max_tokens=4))
    assert isinstance(made["bad"].error, ComputeFailed)
    assert made["good"].finish is not None
    assert engine.statistics().slots_free == 2
    assert engine.statistics().kv_tokens_free == engine.statistics().kv_tokens_total


def test_a_bug_is_not_taken_for_a_request_fault(llama: Loaded) -> None:
    class Bug(BaseException):
        pass

    engine = Engine(replaced(llama, Failing(llama.model, Bug())))
    engine.add(make((7,)))
    with pytest.raises(Bug):
        engine.step()


# measured speeds


def test_speeds_are_zero_until_measured_and_then_a_mean(llama: Loaded) -> None:
    now = iter(range(1_000_000))
    engine = Engine(llama, EngineConfig(slots=2), clock=lambda: next(now) / 2)
    assert (engine.statistics().decode_tok_s, engine.statistics().prefill_tok_s) == (0.0, 0.0)
    run(engine, make(prompt_of(10), "a"), make(prompt_of(10), "b"))
    assert engine.statistics().decode_tok_s == pytest.approx(4.0)  # two tokens in each half second
    assert engine.statistics().prefill_tok_s == pytest.approx(40.0)


def test_stages_steps_and_the_prefix_cache_are_measured(llama: Loaded) -> None:
    engine = Engine(llama, EngineConfig(slots=1, block_tokens=4))
    prompt = prompt_of(40)
    run(engine, make(prompt, "a"), make(prompt, "b"))
    engine.add(make(prompt, "left"))
    engine.step()
    engine.cancel("left")
    told = engine.statistics()
    assert told.timings is not None
    assert (told.timings.queue_s.count, told.timings.prefill_s.count, told.timings.decode_s.count) == (3, 3, 2)
    assert told.timings.queue_s.sum > 0, "one waited for the other"
    assert told.timings.step_tokens.sum == told.prefilled_tokens + told.decoded_tokens
    assert told.queried_tokens == 3 * len(prompt)
    assert 0 < told.reused_tokens < told.queried_tokens
    assert told.queried_tokens == told.prefilled_tokens + told.reused_tokens - told.recomputed_tokens
    assert len(engine._timings) == 0


def test_rate_forgets_slowly() -> None:
    rate = Rate()
    rate.note(10, 0.0)
    rate.note(0, 1.0)
    assert rate.value == 0.0
    rate.note(10, 1.0)
    rate.note(20, 1.0)
    assert rate.value == pytest.approx(11.0)


def test_context_is_the_models(llama: Loaded) -> None:
    assert llama.facts.context_tokens == CONTEXT
