"""Rows of a training text: which are trained on, in which order, and which are held out.

Rules: core. A row is context + 1 tokens in a piece, no token in two rows, no padding; the last few tokens that fill no
row are left out. Every HELD_OUT_EVERY-th row, by position, is never trained on: it is what this node judges by. A batch
is a pure function of (text, seed, step): each epoch goes through the rows in an order of its own, which is computed
for each row and kept nowhere.
Source: a permutation by a Feistel network with cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite
Domains" (CT-RSA 2002), section 4; four rounds: Luby and Rackoff 1988.
Legend: N tokens of the text, B rows, T = context + 1 tokens of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from crypto.canonical import encode
from model.data import TrainingText
from model.errors import BadText

HELD_OUT_EVERY = 20
ROUNDS = 4
ORDER_DOMAIN = "openagi order of rows 1"


class Batches:
    """One text, cut into rows of one length, `rows` of them in a batch."""

    def __init__(self, text: TrainingText, *, context: int, rows: int) -> None:
        """Raises ValueError for bounds below 1; BadText when the text has no batch, or no row to hold out."""
        if min(context, rows) < 1:
            raise ValueError(f"context and rows must be at least 1, not {context} and {rows}")
        self.text = text
        self.context = context
        self.rows = rows
        found = len(text.ids_N) // (context + 1)
        self.held_out_rows = found // HELD_OUT_EVERY
        self.training_rows = found - self.held_out_rows
        wanted = max(HELD_OUT_EVERY, rows + (rows - 1) // (HELD_OUT_EVERY - 1))
        if found < wanted:
            raise BadText(
                f"the text has {len(text.ids_N):,} tokens, and {wanted * (context + 1):,} are needed to train with "
                f"{rows} rows of {context} tokens and to hold some out; give more text, or a shorter context"
            )

    def batch(self, seed: int, step: int) -> torch.Tensor:
        """ids_BT (int64) of one step, counted from 0. seed and step: 0 to 2^63 - 1; a seed is an order."""
        begin = step * self.rows
        return self._rows([self._position(seed, index) for index in range(begin, begin + self.rows)])

    def training(self, places: Sequence[int]) -> torch.Tensor:
        """ids_BT (int64) of any training rows, by their number among those (0 to training_rows - 1); B may be 0."""
        assert all(0 <= place < self.training_rows for place in places), "there are no such training rows"
        return self._rows([_past_held_out(place) for place in places])

    def held_out(self, rows_max: int, turn: int = 0) -> torch.Tensor:
        """ids_BT (int64) of at most rows_max held-out rows, spread over the text; other turns give others."""
        count = min(rows_max, self.held_out_rows)
        chosen = [(place * self.held_out_rows // count + turn) % self.held_out_rows for place in range(count)]
        return self._rows([place * HELD_OUT_EVERY + HELD_OUT_EVERY - 1 for place in sorted(chosen)])

    def _position(self, seed: int, index: int) -> int:
        """The row that is the index-th in the endless order of a seed."""
        epoch, index = divmod(index, self.training_rows)
        key = hashlib.sha256(encode([ORDER_DOMAIN, self.text.digest, seed, epoch])).digest()
        return _past_held_out(permuted(index, self.training_rows, key))

    def _rows(self, positions: list[int]) -> torch.Tensor:
        length = self.context + 1
        if not positions:
            return torch.empty((0, length), dtype=torch.int64)
        return torch.stack([self.text.ids_N[p * length : (p + 1) * length].to(torch.int64) for p in positions])


def _past_held_out(place: int) -> int:
    """The position in the text of a training row."""
    return place + place // (HELD_OUT_EVERY - 1)


def permuted(index: int, count: int, key: bytes) -> int:
    """Where an index of 0 to count - 1 goes in the permutation of a key (at most 64 bytes). Keeps nothing."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(ROUNDS):
            mixed = hashlib.blake2b(right.to_bytes(8, "big") + bytes((number,)), key=key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(mixed, "big") & mask)
        index = left << half | right
        if index < count:  # else walk on: the cycle comes back below count, after 4 steps on average at most
            return index
