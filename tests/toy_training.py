"""Small things to train: a counted text, a model of a few numbers whose gradients are known, a delta held as it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from model.batches import Batches
from model.data import text_of

torch.set_num_threads(1)  # far too small to share
VOCABULARY = 11


class Toy(torch.nn.Module):
    """Next-token logits from the last token alone: an embedding of width 4, a scale with one side, and a head.

    sick: numbers of forward passes, from 0 on, whose logits are no numbers. sure: those that rule out all tokens but
    one, so that the loss is infinite and its gradient is not.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.embedding = torch.nn.Parameter(torch.randn(VOCABULARY, 4, generator=draw))
        self.scale = torch.nn.Parameter(torch.ones(4))
        self.head = torch.nn.Parameter(torch.randn(VOCABULARY, 4, generator=draw))
        self.register_buffer("mask", torch.ones(4))
        self.sick: set[int] = set()
        self.sure: set[int] = set()
        self.passes = 0

    def forward(self, *, input_ids: torch.Tensor, use_cache: bool, return_dict: bool) -> Any:
        assert not use_cache
        assert return_dict
        hidden = self.embedding[input_ids] * self.scale * self.get_buffer("mask")
        logits = hidden @ self.head.T
        if self.passes in self.sick:
            logits = logits * torch.nan
        if self.passes in self.sure:
            logits = logits.masked_fill(torch.arange(VOCABULARY) > 0, -torch.inf)
        self.passes += 1
        return SimpleNamespace(logits=logits)


class WholeDelta:
    """A delta of every coordinate, as if a codec without loss had brought it."""

    sparse = False

    def __init__(self, vector_N: torch.Tensor) -> None:
        self.vector_N = vector_N
        self.n = len(vector_N)

    def dense(self, start: int, stop: int) -> torch.Tensor:
        return self.vector_N[start:stop].clone()

    def sent(self, start: int, stop: int) -> torch.Tensor:
        return torch.ones(stop - start, dtype=torch.bool)


def batches(vocabulary: int = VOCABULARY, *, rows: int = 2, context: int = 8, length: int = 4_000) -> Batches:
    """A text that can be learnt: each token is the one before it and three, and now and then chance."""
    draw = torch.Generator().manual_seed(5)
    ids_N = torch.arange(length) * 3 % vocabulary
    noisy = torch.rand(length, generator=draw) < 0.1
    ids_N[noisy] = torch.randint(vocabulary, (int(noisy.sum()),), generator=draw)
    return Batches(text_of(ids_N.to(torch.int32), text_bytes=length, documents=1), context=context, rows=rows)
