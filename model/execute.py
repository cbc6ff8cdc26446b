"""A model as a function of many requests' tokens: in one pass over blocks where it can, else request by request.

Rules: transformers' own modules, nothing rewritten. Whether a model can go over blocks is tried, not believed: a pass
over blocks has to give what the model gives by itself. What keeps state that is no KV, or attends by rules that do not
reach the attention interface, goes request by request, with a cache of its own.
Legend: T tokens of a pass, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import torch

from model import lengths
from model.errors import FOREIGN
from model.forward import KV, Forward
from model.load import Loaded, is_rounded
from model.paged import KNOWN, NAME, Pool
from model.paged_plan import ROWS_MIN, Part, Pass

TRIAL_IDS: Final = (1, 3, 2, 5, 4, 3, 6)
TRIAL_BLOCK: Final = 4
TRIAL_ERROR_MAX: Final = 0.1  # of the logits' own spread; a wrong mask is off by about 1
PASSED_ON: Final = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_attentions", "output_router_logits"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """tokens[begin:end] of one request, to be taken in. samples: the last one's logits are wanted."""

    request_id: str
    table: Sequence[int]
    tokens: Sequence[int]
    begin: int
    end: int
    samples: bool
    prompt: int  # how many of the tokens are the request's prompt


class Executor(Protocol):
    """Runs passes. shares: over blocks, which can serve several requests; without, give it one task at a time.
    shares_answers: a block of an answer is what it would be in a prompt, to the bit."""

    shares: bool
    why: str  # it does not go over blocks; "" if it does

    @property
    def shares_answers(self) -> bool: ...

    @property
    def blocks(self) -> int:
        """How many it has: fewer than asked for if they are larger than the model's configuration says."""

    def run(self, tasks: Sequence[Task]) -> dict[str, torch.Tensor]:
        """fp32 logits_V of each request that samples. Raises what torch and transformers raise; if blocks are shared
        the same may then be run again, task by task."""

    def drop(self, request_id: str) -> None:
        """The request has ended, or its KV is given up. An unknown one is no error."""


def executor_for(loaded: Loaded, blocks: int, block_tokens: int) -> Executor:
    """The best one that gives this model's numbers. Runs a few tokens through it."""
    model = Blockwise(loaded)
    why = model.fault()
    return Single(loaded, blocks, why) if why else model.with_pool(blocks, block_tokens)


class Blockwise:
    """All tasks of a step in one pass."""

    shares = True
    why = ""

    def __init__(self, loaded: Loaded) -> None:
        self._model, self._device = loaded.model, loaded.device
        self._kv_token_bytes = loaded.facts.kv_token_bytes
        self._compiles = lengths.compiles(loaded.device.type, loaded.facts.dtype)
        self._parameters = inspect.signature(loaded.model.forward).parameters
        self._keeps = "logits_to_keep" in self._parameters
        self._configs = [*{id(c): c for m in loaded.model.modules() if (c := getattr(m, "config", None))}.values()]
        self._pool = Pool(4, TRIAL_BLOCK, loaded.device, is_rounded=is_rounded(loaded))

    def with_pool(self, blocks: int, block_tokens: int) -> Blockwise:
        """Itself, with so many blocks, or as many as take the memory that these would by the model's configuration."""
        real, stated = self._pool.token_bytes, self._kv_token_bytes
        self._pool = self._pool.like(max(1, blocks * stated // real) if 0 < stated < real else blocks, block_tokens)
        return self

    @property
    def blocks(self) -> int:
        return self._pool.blocks

    def drop(self, request_id: str) -> None:
        del request_id  # its blocks are the scheduler's

    @property
    def shares_answers(self) -> bool:
        return self._pool.rows_fewest >= ROWS_MIN

    @torch.inference_mode()
    def run(self, tasks: Sequence[Task]) -> dict[str, torch.Tensor]:
        parts = [Part(table=t.table, begin=t.begin, end=t.end, prompt=t.prompt) for t in tasks]
        work = Pass(parts, self._pool.block_tokens, self._device)
        ids = [token for task in tasks for token in task.tokens[task.begin : task.end]]
        spare = lengths.at_least(len(ids)) - len(ids) if self._compiles else 0
        at, last = list[int](), -1
        for task in tasks:
            last += task.end - task.begin
            if task.samples:
                at.append(last)
        keep_S = torch.tensor(at, dtype=torch.long, device=self._device)
        given: dict[str, Any] = {"logits_to_keep": keep_S} if self._keeps else {}
        with self._paged(), self._pool.serving(work):
            out = self._model(
                input_ids=torch.tensor([ids + [0] * spare], device=self._device),
                position_ids=torch.tensor([work.positions + [0] * spare], device=self._device),
                use_cache=False,
                return_dict=True,
                **given,
            )
        logits_SV = (out.logits[0] if self._keeps else out.logits[0].index_select(0, keep_S)).float()
        return dict(zip((task.request_id for task in tasks if task.samples), logits_SV, strict=True))

    def fault(self) -> str:
        """Why the model cannot go over blocks; "" if it can."""
        if "position_ids" not in self._parameters or getattr(self._model, "_is_stateful", False):
            return "it keeps a state of its own, or is not told positions"
        if not self._model._can_set_attn_implementation():
            return "its attention is not behind transformers' interface"
        try:
            return self._tried() or self._unasked()
        except FOREIGN as exc:
            return f"a trial pass failed ({type(exc).__name__})"

    @torch.inference_mode()
    def _tried(self) -> str:
        """A sequence in three parts, with another beside it, against the model's own pass."""
        ids = [token % self._vocabulary() for token in TRIAL_IDS]
        own_TV = self._model(input_ids=torch.tensor([ids], device=self._device), use_cache=False, return_dict=True)
        own_V = own_TV.logits[0, -1].float()
        whole = Task(request_id="a", table=(3, 0), tokens=ids, begin=0, end=3, samples=False, prompt=6)
        other = Task(request_id="b", table=(2,), tokens=ids[1:4], begin=0, end=2, samples=False, prompt=3)
        self.run([whole])
        self.run([replace(whole, begin=3, end=6), other])
        made = self.run([replace(other, begin=2, end=3), replace(whole, begin=6, end=7, samples=True)])
        error = float((made["a"] - own_V).norm() / (own_V - own_V.mean()).norm().clamp_min(1e-30))
        return "" if error <= TRIAL_ERROR_MAX else f"a trial pass over blocks was off by {error:.2g} of the logits"

    def _unasked(self) -> str:
        """What the trial cannot show: rules of attention that do not reach the interface, or that it does not know."""
        text = self._model.config.get_text_config(decoder=True)
        asked = self._pool.seen
        strange = sorted({n for a in asked.values() for n, v in a.items() if v is not None} - KNOWN - PASSED_ON)
        if strange:
            return f"its attention asks for {', '.join(strange)}"
        if any(a.get("is_causal") is False for a in asked.values()):
            return "its attention is not causal"
        kinds = getattr(text, "layer_types", None) or []
        if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
            return f"it has layers of {', '.join(unknown)}"
        windows = {index for index, a in asked.items() if a.get("sliding_window") is not None}
        if kinds:
            wanted = {index for index, kind in enumerate(kinds) if kind == "sliding_attention"}
        elif getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
            wanted = set(asked)
        else:
            wanted = set()
        if windows != wanted or getattr(text, "attention_chunk_size", None):
            return "its window of attention does not reach the interface"
        return ""

    def _vocabulary(self) -> int:
        return int(self._model.get_input_embeddings().num_embeddings)

    @contextmanager
    def _paged(self) -> Iterator[None]:
        """The model attends over blocks in here, and as before outside: it may embed, too."""
        before = [config._attn_implementation_internal for config in self._configs]
        for config in self._configs:
            config._attn_implementation_internal = NAME
        try:
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = name


class Single:
    """Each task in a pass of its own, with a cache of its own."""

    shares = shares_answers = False

    def __init__(self, loaded: Loaded, blocks: int, why: str) -> None:
        self.blocks = blocks
        self._forward = Forward(loaded)
        self._caches: dict[str, KV] = {}
        self.why = why

    def run(self, tasks: Sequence[Task]) -> dict[str, torch.Tensor]:
        made = {}
        for task in tasks:
            if task.begin == 0:
                self._caches[task.request_id] = self._forward.new_kv()
            kv, begin = self._caches[task.request_id], task.begin
            while begin < task.end:
                end = begin + self._forward.piece(task.end - begin)
                logits_V = self._forward.logits(kv, task.tokens, begin, end)
                begin = end
            if logits_V is not None:
                made[task.request_id] = logits_V
        return made

    def drop(self, request_id: str) -> None:
        self._caches.pop(request_id, None)
