"""A loaded model -> the same one with packed linear layers: chosen for this machine, joined where they read one input,
packed, tried; or plain, and why.

Rules: what a model gives with packed layers is compared with what it gave before; one that fails, or is off, is read
anew from its files and served as it is. That is said, in `Loaded.linears`, and never hidden: plain layers round
otherwise in a batch, and are slower. Only on a CPU: no other device's kernels could be tried, so there `quantize` is
refused. What is quantized has a revision of its own. An encoder is not quantized: its vectors are compared with those
that others made, and int4 turned MiniLM's by up to 20 degrees, int8 by 5.
Source: SERVING.md, "Linear layers".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch

from model import native_linears
from model.config import LinearFacts
from model.errors import FOREIGN, BadInput, ModelError, first_line
from model.linears import EXACT, KINDS, PackedModel, linear_shapes, pack
from model.linears_choice import PLAIN, Choice, choose
from model.linears_joined import join
from model.load import Loaded, is_rounded, kv_dtype, kv_token_bytes, load
from model.norms import quicken

WISH: Final = {"none": "exact", "int8": "int8", "int4": "int4"}  # of RuntimeConfig.quantize
TRIAL_IDS: Final = (1, 3, 2, 5, 4, 3, 6)
TRIAL_ERROR_MAX: Final = (
    0.7  # of the states' own norm; int4 was off by up to 0.4 in tiny random models, what is wrong by 1
)


def packed(loaded: Loaded, quantize: str, *, choosing: Callable[..., Choice] = choose) -> Loaded:
    """The model for serving. Takes seconds, and changes the model it is given. choosing: as `choose`.

    Raises BadInput (quantize on a device that is not a CPU), and what `load` raises if a trial failed.
    """
    if loaded.device.type != "cpu":
        if quantize != "none":
            raise BadInput(
                f"--quantize {quantize} is for models on a CPU, and {loaded.facts.name} is on {loaded.device}; leave "
                "it out, or choose --device cpu"
            )
        return replace(loaded, linears=LinearFacts(kind=PLAIN, told=f"{PLAIN}, as {loaded.device} computes them"))
    choice = _choice(loaded, quantize, choosing)
    if choice.kind == PLAIN:
        return replace(loaded, linears=_told(choice))
    made, problem = _tried(loaded, choice.kind)
    if made is None or problem:
        found, dtype = loaded.found, loaded.facts.dtype
        del loaded, made  # its memory is wanted
        return replace(
            load(found, device="cpu", dtype=dtype), linears=_told(replace(choice, kind=PLAIN, problem=problem))
        )
    facts = loaded.facts if choice.kind in EXACT.values() else loaded.facts.quantized(choice.kind)
    if facts.kind == "causal":
        held = kv_dtype(loaded.device, getattr(torch, facts.dtype), is_rounded=is_rounded(loaded))
        facts = replace(facts, kv_token_bytes=kv_token_bytes(loaded.model.config, held))
    return replace(loaded, facts=facts, packed=made, linears=_told(choice))


@torch.inference_mode()
def trial(loaded: Loaded) -> torch.Tensor:
    """What the model makes of a few tokens, fp32: logits of a causal model, states of an encoder. Raises what torch and
    transformers raise."""
    ids_1T = torch.tensor([[token % loaded.facts.vocabulary for token in TRIAL_IDS]])
    if loaded.facts.kind == "causal":
        made: Any = loaded.model(input_ids=ids_1T, use_cache=False, return_dict=True).logits
    else:
        made = loaded.model(input_ids=ids_1T, return_dict=True).last_hidden_state
    return made.float()  # type: ignore[no-any-return]  # transformers' outputs have no types


def _choice(loaded: Loaded, quantize: str, choosing: Callable[..., Choice]) -> Choice:
    if quantize != "none" and loaded.facts.kind == "encoder":
        exact = _choice(loaded, "none", choosing)
        return replace(exact, problem=exact.problem or "encoders are not quantized, so that their vectors stay alike")
    wish, dtype = WISH[quantize], getattr(torch, loaded.facts.dtype)
    shapes = linear_shapes(loaded.model)
    if not shapes or dtype not in EXACT:
        problem = f"the model has {len(shapes)} linear layers of {loaded.facts.dtype}; only fp32 and bf16 are packed"
        return Choice(kind=PLAIN, wish=wish, problem=problem)
    return choosing(shapes, wish, dtype)


def _tried(loaded: Loaded, kind: str) -> tuple[PackedModel | None, str]:
    """The model, packed, and what is wrong with it, if anything is."""
    made = None
    try:
        before = trial(loaded)
        names = join(loaded.model, lambda: trial(loaded))
        quicken(loaded.model)
        made = pack(loaded.model, kind).called(names)
        off = _distance(before, trial(loaded))
    except FOREIGN as exc:
        return made, f"a trial pass with {kind} layers failed ({type(exc).__name__}: {first_line(exc)})"
    except ModelError as exc:
        return made, str(exc)
    return made, "" if off <= TRIAL_ERROR_MAX else f"a trial pass with {kind} layers was off by {off:.2g}"


def _told(choice: Choice) -> LinearFacts:
    """told: also whose code computes them, since a node without ours is several times as slow for one user."""
    if choice.kind not in KINDS:
        return LinearFacts(kind=choice.kind, told=str(choice), problem=choice.problem)
    by = "our own code" if native_linears.is_here(choice.kind) else "torch's code"
    return LinearFacts(kind=choice.kind, told=f"{choice}; {by}", problem=choice.problem)


def _distance(before: torch.Tensor, after: torch.Tensor) -> float:
    """Of `after` from `before`, in parts of the latter's norm; infinite if it is not finite where that is."""
    distance = float((after - before).norm() / before.norm().clamp(min=1e-30))
    return distance if distance < float("inf") else float("inf")
