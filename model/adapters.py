"""LoRA adapters: a few small matrices beside a model's own, which alone are trained and sent.

Rules: the only importer of peft, which is an extra of its own. The base model is frozen and keeps its dtype; adapters
are fp32, as all that peers agree on. They start alike on every member: the first matrix from the run's id and its name
by integer arithmetic (torch's random numbers differ between machines), the second of zeros, so that a model with new
adapters answers as it did. A layout over `trainable` knows adapters as it knows any tensors.
Legend: R rank, I and O inputs and outputs of a layer.

Source: Hu et al., LoRA (arXiv 2106.09685): W + alpha/R * B_OR A_RI; its A starts Kaiming-uniform with a = sqrt(5), that
is within 1/sqrt(I). Bits: numpy's PCG64, whose stream is kept (NEP 19).
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from crypto.digest import Digest
from model.errors import FOREIGN, BadInput, BadModel, first_line

RANK_MAX: Final = 256
ADAPTER: Final = "run"  # peft's name for one set of adapters; it stands in the tensors' names
_DOMAIN: Final = b"openagi:adapter:1:"
_FIRST, _SECOND = ".lora_A.", ".lora_B."  # peft's names of both matrices


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """rank: R. alpha: adapters count alpha / R. targets: ends of the names of the layers that get one; none: every
    linear layer but the output."""

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of its range."""
        if not 1 <= self.rank <= RANK_MAX or self.alpha < 1:
            raise ValueError(f"rank is 1 to {RANK_MAX}, alpha 1 or more, not {self}")


def add_adapters(model: Any, config: AdapterConfig, run: Digest) -> None:
    """Freeze the model and put adapters into it, alike for everybody in the run.

    Raises BadInput (peft is not installed), BadModel (no layer of these names; it has adapters already).
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as exc:
        raise BadInput(f"adapters need peft ({exc}): pip install -e '.[adapters]', or train the whole model") from exc
    if any(_FIRST in name for name, _ in model.named_parameters()):
        raise BadModel("the model has adapters already: start from the model itself")
    wanted = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.targets) or "all-linear",
        bias="none",
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),  # GPT-2 keeps W transposed
    )
    try:
        inject_adapter_in_model(wanted, model, adapter_name=ADAPTER)
    except FOREIGN as exc:
        raise BadModel(
            f"adapters for {', '.join(config.targets) or 'linear layers'} do not fit this model: {first_line(exc)}"
        ) from exc
    for name, parameter in trainable(model).items():
        parameter.data = start_of(name, tuple(parameter.shape), run).to(parameter.device)


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """What is trained, by name: the adapters, once `add_adapters` has put them in."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def start_of(name: str, shape: tuple[int, ...], run: Digest) -> torch.Tensor:
    """The values with which an adapter's tensor starts, fp32 on the CPU: the same on every machine."""
    if _SECOND in name:
        return torch.zeros(shape)
    assert _FIRST in name, f"{name} is trained and no part of an adapter"
    seed = hashlib.sha256(_DOMAIN + run + name.encode()).digest()
    raw = np.random.PCG64(int.from_bytes(seed, "little")).random_raw(math.prod(shape))
    whole = (raw >> np.uint64(40)).astype(np.float32) - np.float32(1 << 23)  # 24 bits: -2**23 to 2**23 - 1, exact
    bound = np.float32(1.0 / (math.sqrt(math.prod(shape[1:])) * (1 << 23)))
    return torch.from_numpy((whole * bound).reshape(shape))


def merged(model: Any, named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of the layers that have adapters, with adapters of these values merged into them, and of the linear
    layers beside them as they are, for these may serve as one (model/linears_joined.py). By the names that they have in
    the model without: what serves then needs no adapters. fp32, on the CPU; the model is only read."""
    found: dict[str, torch.Tensor] = {}
    own = {name for name, _ in model.named_parameters()}  # a shared parameter comes once
    adapted = {name.rpartition(".")[0] for name, layer in model.named_modules() if _has_adapter(layer)}
    for name, layer in model.named_modules():
        if not _has_adapter(layer):
            if type(layer) is nn.Linear and name.rpartition(".")[0] in adapted and f"{name}.weight" in own:
                found[f"{name}.weight"] = layer.weight.detach().float().cpu()
            continue
        first_RI, second_OR = (named[f"{name}{part}{ADAPTER}.weight"] for part in (_FIRST, _SECOND))
        change_OI = (second_OR @ first_RI) * layer.scaling[ADAPTER]
        base = layer.base_layer.weight.detach().float().cpu()
        found[f"{name}.weight"] = base + (change_OI.T if layer.fan_in_fan_out else change_OI)
    return found


def _has_adapter(layer: Any) -> bool:
    return ADAPTER in getattr(layer, "lora_A", ())


def save_adapters(folder: Path, model: Any, named: Mapping[str, torch.Tensor], base: str) -> None:
    """Write adapters of these values as a folder that `PeftModel.from_pretrained` puts over the base model.

    model: with the adapters in it, only read. base: what the folder calls the base model. Raises OSError,
    SafetensorError.
    """
    config = copy.copy(model.peft_config[ADAPTER])
    config.base_model_name_or_path, config.task_type, config.inference_mode = base, "CAUSAL_LM", True
    config.target_modules = {name for name, layer in model.named_modules() if _has_adapter(layer)}
    config.save_pretrained(str(folder))
    held = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": value.contiguous() for name, value in named.items()
    }
    save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})
