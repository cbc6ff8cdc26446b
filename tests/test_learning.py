"""bench/learning.py on a text of some lines: shards that share nothing, schemes that run, bytes that are counted."""

from __future__ import annotations

import pytest
import torch

from bench.learning import (
    DILOCO,
    QUICK,
    SPARSE_256,
    SYNCHRONOUS,
    Outcome,
    Scale,
    Together,
    byte_model,
    rounds,
    rows_of,
    run,
    shards_of,
    synchronous,
)
from model.codecs import codec_named
from model.config import TrainConfig
from model.corpus import BOOK_BREAK
from model.train import Trainer

torch.set_num_threads(1)  # far too small to share
SCALE = Scale(workers=2, steps=20, rows=1, context=16, width=16, layers=1)
TEXT = BOOK_BREAK.join(f"{letter} book of {letter} tales. " * 40 for letter in "abcde")


def letters(ids: torch.Tensor) -> set[str]:
    return set(bytes(ids.flatten().tolist()).decode()) & set("abcde")


def test_workers_have_books_of_their_own_and_nobody_the_last() -> None:
    shards = shards_of(TEXT, SCALE)
    shared = set("book of tales. ")
    own = [letters(worker.text.ids_N) - shared for worker in shards.workers]
    assert [sorted(one) for one in own] == [["c"], ["d"]]
    assert "e" in letters(shards.held_out)
    assert letters(shards.held_out) - shared == set()
    assert len(shards_of("once upon a time " * 400, SCALE).workers) == 2  # no books: equal cuts


def test_one_step_of_all_is_each_worker_in_turn() -> None:
    shards = shards_of(TEXT, SCALE)
    together = Together(shards.workers)
    for step in range(4):
        worker = shards.workers[step % 2]
        assert torch.equal(together.batch(7, step), worker.batch(7 + step % 2, step // 2))


@pytest.mark.slow
def test_schemes_run_and_their_bytes_are_those_of_whole_updates() -> None:
    shards = shards_of(TEXT, SCALE)
    outcomes = {scheme.name: run(scheme, shards, SCALE) for scheme in QUICK}
    outcomes[SYNCHRONOUS] = synchronous(shards, SCALE)
    size = sum(parameter.numel() for parameter in byte_model(SCALE).parameters())
    for scheme in QUICK:
        assert outcomes[scheme.name].loss < 5.5  # knowing nothing is log 256 = 5.55
        if scheme.every:
            sections = sum(codec_named(scheme.codec).sizes(size))
            count = SCALE.steps // scheme.every
            assert count * sections < outcomes[scheme.name].uploaded_bytes < count * (sections + 512)
    assert outcomes[SYNCHRONOUS].loss < 5.5
    assert outcomes["alone"].uploaded_bytes == 0


def test_all_hold_the_same_weights_after_a_round() -> None:
    shards = shards_of(TEXT, SCALE)
    trainers = [Trainer(byte_model(SCALE), batches, TrainConfig(seed=1)) for batches in shards.workers]
    start_N = trainers[0].start_vector_N.clone()
    assert len(list(rounds(SPARSE_256, trainers, 2))) == 2
    ends = [trainer.layout.flatten(trainer.named) for trainer in trainers]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], start_N)


def test_figures_have_the_names_that_are_kept() -> None:
    outcomes = {name: Outcome(loss=2.0, uploaded_bytes=10, cpu_s=1.0) for name in ("alone", DILOCO.name)}
    found = [(row.figure, row.rival, row.ratio) for row in rows_of(outcomes)]
    assert found == [
        ("loss_alone", "DiLoCo", 1.0),
        ("bytes_alone", "DiLoCo", 1.0),
        ("loss_diloco_h20", None, None),
        ("bytes_diloco_h20", None, None),
    ]
