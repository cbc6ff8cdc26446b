"""Error feedback: nothing that was trained is lost, nothing that is broken gets in."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto.digest import Digest
from model.codecs import CODECS, codec_named, decode
from model.delta import CHUNK, Codec, Delta, HasEntries
from model.errors import BadModel, ComputeFailed
from model.feedback import DECAY, Feedback
from model.merge import Vector
from tests.vectors import KINDS, vector

each_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
LAYOUT = Digest(b"l" * 32)
N = CHUNK + 65


def sent_of(feedback: Feedback, codec: Codec) -> Delta:
    """A round: encode, decode as everybody does, take."""
    delta = decode(feedback.encode(codec), codec, len(feedback.unsent_N))
    feedback.take(delta)
    return delta


@each_codec
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_sent_and_what_was_not_is_what_was_trained(codec: Codec, kind: str) -> None:
    feedback, delta_N = Feedback(N), vector(kind, N)
    feedback.add(delta_N)
    sent_N = sent_of(feedback, codec).dense(0, N)
    assert torch.equal(feedback.unsent_N, delta_N - sent_N)


def test_the_unsent_is_carried_over_and_fades() -> None:
    feedback, codec = Feedback(3, decay=0.5), CODECS["ef64.2b"]
    feedback.add(torch.tensor([1.0, 2.0, -4.0]))
    feedback.add(torch.tensor([0.0, 1.0, 1.0]))
    assert feedback.unsent_N.tolist() == [0.5, 2.0, -1.0]
    assert sent_of(feedback, codec).dense(0, 3).tolist() == [0.75, 2.0, -0.75]
    assert feedback.unsent_N.tolist() == [-0.25, 0.0, -0.25]


def test_in_the_end_everything_is_said() -> None:
    """Without decay, all that is sent over the rounds sums to all that was trained, whatever a round leaves out."""
    codec, feedback = codec_named("ef64.2b"), Feedback(N, decay=1.0)
    total_N, said_N = torch.zeros(N), torch.zeros(N)
    for turn in range(6):
        delta_N = vector("heavy", N, turn)
        feedback.add(delta_N)
        total_N += delta_N
        said_N += sent_of(feedback, codec).dense(0, N)
    first = float((total_N - said_N).norm())
    for _ in range(150):
        said_N += sent_of(feedback, codec).dense(0, N)
    assert float((total_N - said_N).norm()) < 0.2 * first
    assert torch.allclose(total_N - said_N, feedback.unsent_N, atol=1e-8)


@each_codec
@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32))
@pytest.mark.slow
def test_a_rejected_update_is_given_back(codec: Codec, kind: str, seed: int) -> None:
    """To the bit where half and twice hold (Sterbenz) or nothing was sent; elsewhere within one rounding."""
    feedback = Feedback(N)
    feedback.add(vector(kind, N, seed))
    before_N = feedback.unsent_N.clone()
    sent = sent_of(feedback, codec)
    feedback.give_back(sent)
    sent_N, after_N = sent.dense(0, N), feedback.unsent_N
    exact_N = (sent_N == 0) | ((before_N / sent_N >= 0.5) & (before_N / sent_N <= 2.0))
    assert torch.equal(after_N[exact_N], before_N[exact_N])
    larger_N = torch.maximum(before_N.abs(), sent_N.abs()).numpy()
    assert (np.abs((after_N - before_N).numpy()) <= np.spacing(larger_N)).all()


def test_what_was_trained_meanwhile_stays() -> None:
    feedback, codec = Feedback(3, decay=0.5), CODECS["fp32"]
    feedback.add(torch.tensor([1.0, 2.0, 3.0]))
    late = sent_of(feedback, codec)
    feedback.add(torch.tensor([10.0, 0.0, 0.0]))
    feedback.give_back(late)
    assert feedback.unsent_N.tolist() == [11.0, 2.0, 3.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_broken_delta_never_reaches_what_is_unsent(bad: float) -> None:
    feedback = Feedback(3)
    feedback.add(torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ComputeFailed, match="diverged"):
        feedback.add(torch.tensor([0.0, bad, 0.0]))
    assert feedback.unsent_N.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("wrong", [torch.zeros(4), torch.zeros(3, dtype=torch.float64)])
def test_a_vector_of_another_kind_is_a_bug(wrong: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        Feedback(3).add(wrong)
    if len(wrong) == 4:
        with pytest.raises(AssertionError):
            Feedback(3).take(decode(Feedback(4).encode(CODECS["fp32"]), CODECS["fp32"], 4))
        with pytest.raises(AssertionError):
            Feedback(3).give_back(decode(Feedback(4).encode(CODECS["fp32"]), CODECS["fp32"], 4))


@pytest.mark.slow
def test_all_is_done_in_place() -> None:
    feedback, codec = Feedback(N), CODECS["ef64.2b"]
    address = feedback.unsent_N.data_ptr()
    feedback.add(vector("heavy", N))
    feedback.give_back(sent_of(feedback, codec))
    assert feedback.unsent_N.data_ptr() == address
    large = Feedback(3_000_000)
    large.add(vector("rare", 3_000_000))
    tracemalloc.start()
    sent_of(large, codec)
    assert tracemalloc.get_traced_memory()[1] < 0.5 * 4 * 3_000_000, "numpy's part: slices, never a whole vector"
    tracemalloc.stop()


# --- restart ---


def test_a_saved_state_is_loaded() -> None:
    feedback = Feedback(N, decay=0.9)
    feedback.add(vector("heavy", N))
    loaded = Feedback.load(feedback.save(LAYOUT), LAYOUT, N, decay=0.9)
    assert torch.equal(loaded.unsent_N, feedback.unsent_N)
    assert loaded.decay == 0.9
    assert Feedback.load(Feedback(1).save(LAYOUT), LAYOUT, 1).decay == DECAY
    for each in (feedback, loaded):
        each.add(vector("ties", N))
    assert torch.equal(loaded.unsent_N, feedback.unsent_N)


def test_a_state_of_another_run_is_refused() -> None:
    raw = Feedback(N).save(LAYOUT)
    for layout, n in ((Digest(b"x" * 32), N), (LAYOUT, N - 1)):
        with pytest.raises(BadModel, match="another model or run"):
            Feedback.load(raw, layout, n)
    name = next(iter(safetensors.torch.load(raw)))
    for tensors in ({name: torch.zeros(N).half()}, {name: torch.zeros(N), "b": torch.zeros(1)}, {"b": torch.zeros(N)}):
        with pytest.raises(BadModel, match="another model or run"):
            Feedback.load(safetensors.torch.save(tensors), LAYOUT, N)
    with pytest.raises(BadModel, match="not finite"):
        Feedback.load(safetensors.torch.save({name: torch.full((N,), math.nan)}), LAYOUT, N)


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0), raw=st.binary(max_size=40))
def test_a_damaged_state_is_refused_or_finite(at: int, raw: bytes) -> None:
    saved = Feedback(3).save(LAYOUT)
    cut = saved[: at % len(saved)]
    for damaged in (raw, cut, cut + raw + saved[len(cut) + len(raw) :]):
        try:
            loaded = Feedback.load(damaged, LAYOUT, 3)
        except BadModel:
            continue
        assert loaded.unsent_N.isfinite().all()


@pytest.mark.parametrize("n", [CHUNK * 3, CHUNK * 70 + 5])
def test_what_a_sparse_delta_sent_is_taken_where_it_was_sent_and_nowhere_else(n: int) -> None:
    vector_N = torch.from_numpy(np.random.default_rng(1).standard_normal(n, dtype=np.float32))
    vector_N[7] = -0.0
    short, whole = (Feedback(n, decay=0.5) for _ in range(2))
    for each in (short, whole):
        each.unsent_N.copy_(vector_N)
    sent = decode(short.encode(codec_named("ef64.2b")), codec_named("ef64.2b"), n)
    assert isinstance(sent, HasEntries)
    short.take(sent)
    whole.take(Vector(sent.dense(0, n)))
    assert torch.equal(short.unsent_N.view(torch.int32), whole.unsent_N.view(torch.int32))
    assert int((short.unsent_N != vector_N).sum()) == len(sent.entries(0, n)[0])
