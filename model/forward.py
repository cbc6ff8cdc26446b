"""One forward pass for one request over any transformers causal model, with that request's own KV cache.

Rules: transformers' own modules and caches, nothing rewritten, so the numbers are those of generate(). A model that
keeps state which cannot be fed in chunks (or has no cache) is computed anew from all its tokens: slow, and right.
Legend: T tokens of this pass, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from model import lengths
from model.load import Loaded


@dataclass(slots=True)
class KV:
    """The cache of one request; None for a model that is computed anew each time."""

    cache: Any


class Forward:
    """The model as a function of tokens."""

    def __init__(self, loaded: Loaded) -> None:
        self._model = loaded.model
        self._device = loaded.device
        parameters = inspect.signature(loaded.model.forward).parameters
        self._cached = "past_key_values" in parameters and not loaded.model._is_stateful
        self._compiles = lengths.compiles(loaded.device.type, loaded.facts.dtype)
        self._extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def new_kv(self) -> KV:
        """An empty cache; it takes memory as it grows."""
        return KV(DynamicCache(config=self._model.config) if self._cached else None)

    def piece(self, tokens: int) -> int:
        """How many of so many waiting tokens to take in at once; less than all where lengths are few."""
        return lengths.at_most(tokens) if self._compiles and self._cached else tokens

    @torch.inference_mode()
    def logits(self, kv: KV, tokens: Sequence[int], begin: int, end: int) -> torch.Tensor | None:
        """Takes tokens[begin:end] in; gives the fp32 logits_V after the last of all tokens, None before the end.

        Raises what torch and transformers raise; the cache is then spoilt.
        """
        last = end == len(tokens)
        if kv.cache is None:
            if not last:
                return None
            ids_1T = torch.tensor([list(tokens)], device=self._device)
            out = self._model(input_ids=ids_1T, use_cache=False, return_dict=True, **self._extra)
        else:
            ids_1T = torch.tensor([list(tokens[begin:end])], device=self._device)
            out = self._model(
                input_ids=ids_1T, past_key_values=kv.cache, use_cache=True, return_dict=True, **self._extra
            )
        logits_V: torch.Tensor = out.logits[0, -1]
        return logits_V.float() if last else None
