"""A look at held-out text: what the serving weights give to each token of a text whose continuation is known.

Rules: the model that serves, with its packed linear layers, as it is: no copy, no other number type. A text goes
through in pieces with a KV cache of its own, so that a pass is short; no request's KV is touched. There is no chance in
it: the same weights, text and pieces give the same figures to the bit. Text comes in slices, one after another.
Legend: T tokens of a pass, V vocabulary.
Source: model/held_out/README.md for the text; Guo and others, "On Calibration of Modern Neural Networks" (2017).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from transformers import DynamicCache

from model import lengths
from model.errors import FOREIGN, BadInput, ComputeFailed, first_line
from model.load import Loaded
from model.requests import Looked

HELD_OUT: Final = Path(__file__).parent / "held_out" / "looking_glass.txt"
SLICE_CHARS: Final = 400  # some 65 to 130 tokens
ROW_TOKENS: Final = 64  # of a slice are judged, at most: what comes after them is left out


def held_out_slices(text: str | None = None) -> tuple[str, ...]:
    """The held-out text of this package, or another, in slices of SLICE_CHARS and what is left of a word. A rest that
    is shorter is left out. Raises OSError where the package has lost its text."""
    return tuple(_slices(HELD_OUT.read_text(encoding="ascii") if text is None else text))


def _slices(text: str) -> Iterator[str]:
    begin, size = 0, len(text)
    while begin + SLICE_CHARS <= size:
        end = begin + SLICE_CHARS
        while end < size and not text[end].isspace():
            end += 1
        yield text[begin:end]
        begin = end
        while begin < size and text[begin].isspace():
            begin += 1


def looking(loaded: Loaded, ids: Sequence[int], piece: int) -> Generator[None, None, Looked]:
    """Reads at most ROW_TOKENS + 1 of the ids, in passes of `piece` tokens or fewer, and yields after each; returns
    what it gave to all but the first. A model whose state cannot be fed in pieces takes all in one pass.

    Raises BadInput (fewer than two ids), ComputeFailed.
    """
    ids = ids[: min(ROW_TOKENS + 1, loaded.facts.context_tokens)]
    if len(ids) < 2:
        raise BadInput(f"{len(ids)} tokens came to look at: two are the least, one to read and one to guess")
    parameters = inspect.signature(loaded.model.forward).parameters
    is_cached = "past_key_values" in parameters and not loaded.model._is_stateful
    compiles = lengths.compiles(loaded.device.type, loaded.facts.dtype)
    cache = DynamicCache(config=loaded.model.config) if is_cached else None
    nats, judged, begin, read = 0.0, list[tuple[float, bool]](), 0, len(ids) - 1
    while begin < read:
        count = read - begin
        if cache is not None:
            count = min(piece, lengths.at_most(count) if compiles else count)
        try:
            more_nats, more = _passed(loaded, cache, ids[begin : begin + count + 1])
        except FOREIGN as exc:
            raise ComputeFailed(
                f"the model failed on held-out text ({type(exc).__name__}: {first_line(exc)}); nothing is told of it"
            ) from exc
        nats, begin = nats + more_nats, begin + count
        judged += more
        yield
    if not math.isfinite(nats):
        raise ComputeFailed("the model made numbers that are not finite for held-out text; nothing is told of it")
    return Looked(revision=loaded.facts.revision, nats=max(nats, 0.0), judged=tuple(judged))


@torch.inference_mode()
def _passed(loaded: Loaded, cache: Any, ids: Sequence[int]) -> tuple[float, list[tuple[float, bool]]]:
    """One pass over all ids but the last: sum of -ln p(next), and (probability of the best, whether it is the next)."""
    ids_1T = torch.tensor([list(ids[:-1])], device=loaded.device)
    next_T = torch.tensor(list(ids[1:]), device=loaded.device)
    given: dict[str, Any] = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    logits_TV = loaded.model(input_ids=ids_1T, return_dict=True, **given).logits[0].float()
    total_T = torch.logsumexp(logits_TV, 1)
    best_T, at_T = logits_TV.max(1)
    nats_T = total_T - logits_TV.gather(1, next_T[:, None])[:, 0]
    sure_T = (best_T - total_T).exp().clamp(max=1.0)  # rounding may step over it
    right_T = at_T == next_T
    return float(nats_T.double().sum()), list(zip(sure_T.tolist(), right_T.tolist(), strict=True))
