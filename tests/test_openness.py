"""Entropy and margin of what the engine chose: right, within their share of the time, and of no effect on answers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.config import EngineConfig
from model.engine import Engine
from model.load import Found, Loaded, load
from model.openness import SHARE, Judge, openness_of
from model.requests import GenerationRequest, Openness, SamplingParameters
from tests.tiny_models import save_causal

PROMPT = tuple(range(1, 20))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    path = tmp_path_factory.mktemp("llama")
    save_causal(path)
    return load_path(path)


def load_path(path: Path) -> Loaded:
    return load(Found("tiny", path, path), device="cpu", dtype="float32")


class Watch:
    """A clock that stands still but for what a test adds: then judging costs nothing, and every token is judged."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def answered(loaded: Loaded, clock: Watch, *requests: GenerationRequest) -> tuple[dict[str, list[int]], Openness]:
    engine = Engine(loaded, EngineConfig(slots=4), clock)
    for each in requests:
        engine.add(each)
    tokens: dict[str, list[int]] = {each.request_id: [] for each in requests}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            tokens[output.request_id] += output.tokens
    told = engine.statistics().openness
    assert told is not None
    return tokens, told


def ask(name: str = "a", *, private: bool = False, **sampling: float) -> GenerationRequest:
    fields = SamplingParameters(**{"max_tokens": 12, "temperature": 0.0, **sampling})  # type: ignore[arg-type]
    return GenerationRequest(request_id=name, prompt=PROMPT, sampling=fields, private=private)


def in_doubles(logits_V: torch.Tensor) -> tuple[float, float]:
    p = sorted(torch.softmax(logits_V.double(), 0).tolist(), reverse=True)
    return -math.fsum(x * math.log(x) for x in p if x > 0.0), p[0] - p[1]


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0, 60.0])
@pytest.mark.parametrize("size", [2, 320, 32_000])
def test_it_is_the_entropy_and_the_margin(scale: float, size: int) -> None:
    logits_V = scale * torch.sin(torch.arange(size).float() ** 2)
    before_V = logits_V.clone()
    entropy, margin = openness_of(logits_V)
    wanted = in_doubles(before_V)
    assert (entropy, margin) == (pytest.approx(wanted[0], abs=1e-4), pytest.approx(wanted[1], abs=1e-5))
    assert torch.equal(logits_V, before_V), "logits must be left as they are"


def test_the_ends_of_its_range() -> None:
    flat = openness_of(torch.zeros(1000))
    assert flat == (pytest.approx(math.log(1000), abs=1e-5), 0.0)
    certain = torch.full((1000,), -math.inf)
    certain[7] = 3.0
    assert openness_of(certain) == (0.0, 1.0), "what is masked has no part in it, and makes no NaN"
    tie = torch.full((1000,), -math.inf)
    tie[7] = tie[900] = 3.0
    assert openness_of(tie) == (pytest.approx(math.log(2)), 0.0)
    assert openness_of(torch.zeros(1)) == (0.0, 1.0)


def test_flat_logits_raise_the_entropy_and_lower_the_margin(tmp_path: Path) -> None:
    """The cause of uncertainty.entropy_nats and .margin: what the model makes of the text."""
    model = save_causal(tmp_path)
    _, sharp = answered(load_path(tmp_path), Watch(), ask())
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
    model.save_pretrained(tmp_path)
    _, flat = answered(load_path(tmp_path), Watch(), ask())
    assert flat.tokens == sharp.tokens == 12
    assert flat.entropy_sum_nats / 12 > 5.7 > sharp.entropy_sum_nats / 12 + 1.0, "ln 320 is 5.77"
    assert flat.margin_sum < 0.2 * sharp.margin_sum


def test_without_a_cause_nothing_moves(llama: Loaded) -> None:
    """The same weights and prompt: the same sums to the bit, however the token is then chosen of the same logits."""
    _, one = answered(llama, Watch(), ask())
    _, again = answered(llama, Watch(), ask())
    assert one == again
    first = ask(max_tokens=1)
    _, greedy = answered(llama, Watch(), first)
    for changed in ({"temperature": 2.0, "seed": 5}, {"temperature": 0.7, "top_k": 1}, {"repetition_penalty": 1.5}):
        _, other = answered(llama, Watch(), ask(max_tokens=1, **changed))
        assert other == greedy, f"{changed} is of the request, not of the model"


def test_nothing_is_judged_where_nothing_is_chosen(llama: Loaded) -> None:
    """The cause of uncertainty.tokens."""
    engine = Engine(llama, EngineConfig(), Watch())
    assert engine.statistics().openness == Openness()
    engine.step()
    assert engine.statistics().openness == Openness()


def test_private_answers_are_counted_and_not_judged(llama: Loaded) -> None:
    _, told = answered(llama, Watch(), ask("a", private=True))
    assert (told.chosen, told.tokens, told.entropy_sum_nats, told.margin_sum) == (12, 0, 0.0, 0.0)
    _, both = answered(llama, Watch(), ask("a", private=True), ask("b"))
    assert (both.chosen, both.tokens) == (24, 12)
    _, alone = answered(llama, Watch(), ask("b"))
    assert (both.entropy_sum_nats, both.margin_sum) == (
        pytest.approx(alone.entropy_sum_nats, rel=1e-5),
        pytest.approx(alone.margin_sum, rel=1e-5),
    )


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.8}])
def test_answers_are_the_same_with_and_without(llama: Loaded, sampling: dict[str, float]) -> None:
    """To the token and, by their logprobs, to the bit."""
    asks = [replace(ask(name, **sampling), prompt=PROMPT[n:]) for n, name in enumerate("abc")]
    asks[0] = replace(asks[0], sampling=replace(asks[0].sampling, logprobs=3))
    outputs = {}
    for share in (math.inf, -1.0):
        engine = Engine(llama, EngineConfig(slots=4), Watch(1.0))
        engine._judge = Judge(Watch(1.0), share)
        for each in asks:
            engine.add(each)
        outputs[share] = [output for _ in range(40) for output in engine.step()]
        told = engine.statistics().openness
        assert told is not None
        assert told.tokens == (36 if share > 0.0 else 0)
    assert outputs[math.inf] == outputs[-1.0]


def test_it_takes_no_more_than_its_share() -> None:
    """Of its own measured cost: each reading of this clock is 1 s later, so a token costs 1 s, and a step 10 s."""
    judge = Judge(Watch(1.0), 0.05)
    rows = list(torch.randn(4, 50, generator=torch.Generator().manual_seed(0)))
    for step in range(1, 201):
        judge.judge(rows, 4, 10.0)
        told = judge.read()
        assert told.cost_s == told.tokens, "what was judged is what was paid for"
        assert told.cost_s <= 0.05 * told.steps_s + 1.0, "at most one token ahead"
        assert (told.chosen, told.steps_s) == (4 * step, 10.0 * step)
    assert told.tokens == 101


def test_it_spends_its_share_on_every_place_alike() -> None:
    """Which rows are judged follows the turn, so that no slot is always left out."""
    judge = Judge(Watch(1.0), 0.1)
    flat, sharp = torch.zeros(50), 1000.0 * torch.eye(50)[3]
    for _ in range(100):
        judge.judge([flat, sharp], 2, 10.0)
    told = judge.read()
    assert told.tokens == 101
    assert told.margin_sum == 50.0, "half of them were the sharp ones"


def test_its_share_is_under_a_hundredth() -> None:
    assert SHARE < 0.01
