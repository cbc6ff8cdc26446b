"""Root-mean-square norms of a model, each as one call: of our own kernel, or of torch's function.

Rules: for inference only. Which modules these are is tried, not known by name: one that has a weight for each number
and nothing else, and for which torch's function gives the same bits, keeps its weight and gets another `forward`.
A model whose norms compute otherwise, as Gemma's do, keeps them. A row's bits are its own in both ways; those of our
kernel, for fp32 rows, are torch's to an error of 1e-6: torch adds the squares up in another order.
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467); torch.nn.functional.rms_norm.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from model import native, native_linears
from model.errors import FOREIGN

EPSILONS: Final = ("variance_epsilon", "eps", "epsilon")  # what transformers' modules call it
OFF_MAX: Final = 1e-6  # of the largest number that comes out
TRIAL_ROWS: Final = (1, 2, 3, 16)
TRIAL_SCALES: Final = (1e-4, 1.0, 1e3)  # the first shows the epsilon


class RmsNorm(nn.Module):
    """weight: of each number."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.shape, self.epsilon = tuple(weight.shape), epsilon
        self._held = torch.tensor([epsilon])
        is_plain = weight.dtype is torch.float32 and weight.device.type == "cpu"
        self._is_native = is_plain and native_linears.is_here("fp32") and not self.shape[0] % native.lanes()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) to (..., K)."""
        if self._is_native and x.dtype is torch.float32:
            x = x.contiguous()
            made, inputs = torch.empty_like(x), self.shape[0]
            native_linears.code_here()["rms_norm"](
                x.data_ptr(), self.weight.data_ptr(), self._held.data_ptr(), made.data_ptr(), inputs,
                x.numel() // inputs, native.threads_for(x.numel()),
            )  # fmt: skip
            return made
        return functional.rms_norm(x, self.shape, self.weight, self.epsilon)

    __call__ = forward  # without torch's search for hooks


def quicken(model: Any) -> int:
    """Puts RmsNorm in place of the norms that it equals to the bit; how many."""
    places = [(parent, key, child) for parent in model.modules() for key, child in parent._modules.items()]
    made: dict[nn.Module, RmsNorm | None] = {}
    for parent, key, child in places:
        if child is None:
            continue
        if child not in made:
            made[child] = _equal(child)
        if (norm := made[child]) is not None:
            setattr(parent, key, norm)
    return sum(norm is not None for norm in made.values())


def _equal(module: nn.Module) -> RmsNorm | None:
    """What computes as this module does, if it is such a norm."""
    weight = module._parameters.get("weight")
    epsilon = next((getattr(module, name) for name in EPSILONS if hasattr(module, name)), None)
    is_alone = len(module._parameters) == 1 and not module._modules and not module._buffers
    if not is_alone or weight is None or weight.dim() != 1 or not isinstance(epsilon, float):
        return None
    norm = RmsNorm(weight, epsilon)
    try:
        with torch.inference_mode():
            is_equal = all(
                torch.equal(module(x), functional.rms_norm(x, norm.shape, weight, epsilon))
                and bool((norm(x) - module(x)).abs().max() <= OFF_MAX * module(x).abs().max())
                for x in _inputs(weight)
            )
    except FOREIGN:  # it wants another shape, or something beside it
        return None
    return norm if is_equal else None


def _inputs(weight: torch.Tensor) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    plain = [torch.randn(1, rows, len(weight), generator=draw) for rows in TRIAL_ROWS]
    return [(x * scale).to(weight.device, weight.dtype) for x in plain for scale in TRIAL_SCALES]
