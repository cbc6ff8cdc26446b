"""Texts -> vectors: the mean of a model's last hidden states over a text's own tokens, of length 1.

Rules: a vector depends on its text alone, whatever else is in the batch (cosine 1 within 1e-5; not to the bit). Texts
over the model's length are cut and reported. Without an encoder the causal model's own states serve: usable for rough
likeness, and said so.
Legend: N texts, T tokens, D dimensions.
Source: Sentence-BERT (arXiv 1908.10084) for mean pooling; sentence-transformers `models/Pooling.py` for its files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from model import lengths
from model.checkpoint import CONFIG_BYTES_MAX, read_json
from model.errors import FOREIGN, BadInput, BadModel, ComputeFailed, first_line
from model.load import Loaded
from model.padding import batches
from model.requests import Embeddings

BATCH_TOKENS_MAX = 2_048  # padded tokens in one forward pass


class Embedder:
    """Vectors from one loaded model, causal or encoder."""

    def __init__(self, loaded: Loaded, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock` gives seconds, for what is told of the time taken. Raises BadModel for a pooling other than mean or
        first token."""
        self._clock = clock
        self.loaded = loaded  # the same model, whatever its weights are called by now
        self._body = loaded.model if loaded.facts.kind == "encoder" else loaded.model.base_model
        self._length_max = min(loaded.facts.context_tokens, _stated_length(loaded))
        self._compiles = lengths.compiles(loaded.device.type, loaded.facts.dtype)
        self._first = _pools_first_token(loaded)
        self._takes_types = "token_type_ids" in self._body.forward.__code__.co_varnames

    def embed(self, texts: Sequence[str | Sequence[int]]) -> Embeddings:
        """Texts or token lists -> vectors of length 1. Raises BadInput, ComputeFailed, with the text's place if one is
        at fault."""
        begin = self._clock()
        rows = [self._row(text, place) for place, text in enumerate(texts)]
        cut = [row if len(row) <= self._length_max else self._shorten(row) for row in rows]
        vectors: list[bytes] = [b""] * len(cut)
        passes = [part for batch in batches([self._width(row) for row in cut], BATCH_TOKENS_MAX)
                  for part in self._parts(batch)]  # fmt: skip
        for part in passes:
            self._fill(vectors, part, cut)
        return Embeddings(
            facts=self.loaded.facts,
            dimensions=len(vectors[0]) // 4 if vectors else 0,
            vectors=tuple(vectors),
            truncated=tuple(len(row) > self._length_max for row in rows),
            lengths=tuple(len(row) for row in cut),
            passes=len(passes),
            padded=sum(len(part) * max(self._width(cut[at]) for at in part) for part in passes),
            seconds=self._clock() - begin,
        )

    def _row(self, text: str | Sequence[int], place: int) -> tuple[int, ...]:
        try:
            row = self.loaded.tokens.encode(text) if isinstance(text, str) else tuple(text)
        except BadInput as exc:
            raise BadInput(str(exc), param=exc.param, place=place) from exc
        if not row:
            raise BadInput("a text to embed has no tokens; give at least one character", place=place)
        if min(row) < 0 or max(row) >= self.loaded.facts.vocabulary:
            raise BadInput(f"token ids must be from 0 to {self.loaded.facts.vocabulary - 1:,}", place=place)
        return row

    def _shorten(self, row: tuple[int, ...]) -> tuple[int, ...]:
        """Cuts the end, but an encoder's closing special token stays."""
        if self.loaded.facts.kind == "encoder" and self._length_max > 1:
            return (*row[: self._length_max - 1], row[-1])
        return row[: self._length_max]

    def _width(self, row: tuple[int, ...]) -> int:
        """How many tokens a text takes in a pass that has no longer one."""
        return max(len(row), min(lengths.at_least(len(row)), self._length_max)) if self._compiles else len(row)

    def _parts(self, batch: list[int]) -> list[list[int]]:
        """A batch in as many passes as its number of texts asks for."""
        parts = []
        while batch:
            count = lengths.share(len(batch)) if self._compiles else len(batch)
            parts.append(batch[:count])
            batch = batch[count:]
        return parts

    def _fill(self, vectors: list[bytes], batch: list[int], rows: list[tuple[int, ...]]) -> None:
        """The vectors of one pass."""
        try:
            mean_ND = self._vectors([rows[at] for at in batch])
        except FOREIGN as exc:
            message = f"the model failed on this text ({type(exc).__name__}: {first_line(exc)})"
            raise ComputeFailed(message, place=batch[0] if len(batch) == 1 else None) from exc
        is_finite_N = torch.isfinite(mean_ND).all(1)
        if not bool(is_finite_N.all()):
            place = batch[int(is_finite_N.int().argmin())]
            raise ComputeFailed("the model made numbers that are not finite for this text", place=place)
        for at, vector_D in zip(batch, mean_ND.numpy().astype("<f4"), strict=True):
            vectors[at] = vector_D.tobytes()

    @torch.inference_mode()
    def _vectors(self, rows: list[tuple[int, ...]]) -> torch.Tensor:
        length = max(self._width(row) for row in rows)
        device = self.loaded.device
        ids_NT = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
        mask_NT = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
        extra: dict[str, Any] = {"token_type_ids": torch.zeros_like(ids_NT)} if self._takes_types else {}
        if self.loaded.facts.kind == "causal":
            extra["use_cache"] = False
        states_NTD = self._body(input_ids=ids_NT, attention_mask=mask_NT, **extra).last_hidden_state.float()
        if self._first:
            pooled_ND = states_NTD[:, 0]
        else:
            weights_NT1 = mask_NT.unsqueeze(-1).float()
            pooled_ND = (states_NTD * weights_NT1).sum(1) / weights_NT1.sum(1)
        return torch.nn.functional.normalize(pooled_ND, dim=1).cpu()


def _stated_length(loaded: Loaded) -> int:
    """The length that a sentence encoder was trained for, else no bound."""
    file = loaded.found.path / "sentence_bert_config.json"
    length = read_json(file, CONFIG_BYTES_MAX).get("max_seq_length") if file.is_file() else None
    return length if isinstance(length, int) and length > 0 else 1 << 30


def _pools_first_token(loaded: Loaded) -> bool:
    """Whether the model's own pooling is its first token's state. Raises BadModel for what is neither that nor mean."""
    file = loaded.found.path / "1_Pooling" / "config.json"
    modes = read_json(file, CONFIG_BYTES_MAX) if file.is_file() else {}
    chosen = sorted(key for key, value in modes.items() if key.startswith("pooling_mode_") and value is True)
    match chosen:
        case [] | ["pooling_mode_mean_tokens"]:
            return False
        case ["pooling_mode_cls_token"]:
            return True
    raise BadModel(f"{file} asks for {', '.join(chosen)}; only mean and cls pooling are supported")
