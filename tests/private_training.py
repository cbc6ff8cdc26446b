"""Tiny models, texts and budgets for the tests of private training."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import torch
import transformers
from safetensors.torch import load as read_safetensors

from crypto.digest import Digest
from model.adapters import AdapterConfig, add_adapters, trainable
from model.batches import Batches
from model.budget import Budget
from model.config import PrivacyConfig, TrainConfig
from model.private import PrivateTrainer
from model.train import BETAS, MicroStep, Trainer
from tests.tiny_models import causal_config
from tests.toy_training import batches

IMPORTED = (transformers.LlamaForCausalLM, transformers.GPT2LMHeadModel)  # takes seconds, once: not in a test's time
CONFIG = TrainConfig(seed=1, rate=0.01, warmup_steps=0, clip_norm=1e9, autocast="off")
PRIVATE = PrivacyConfig(noise_multiplier=1.0, clip_norm=1.0, delta=1e-6, epsilon_max=math.inf)
SILENT = replace(PRIVATE, noise_multiplier=0.0)
OPEN = replace(SILENT, clip_norm=math.inf)
CONTEXT = 8
DRAW_BYTES = 19 * 8  # to draw from the rows of a text of 20


def tiny(kind: str, **changes: Any) -> Any:
    """A random model in fp32, without dropout: GPT-2 draws it otherwise for rows than for batches."""
    torch.manual_seed(0)
    config = causal_config(kind, 64)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    for name, value in {"initializer_range": 0.1, **quiet, **changes}.items():
        setattr(config, name, value)
    return transformers.AutoModelForCausalLM.from_config(config)


def adapted() -> Any:
    model = tiny("llama").requires_grad_(False)
    add_adapters(model, AdapterConfig(rank=4), Digest(b"r" * 32))
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # else the first matrices have no gradient
    return model


def tied() -> Any:
    return tiny("llama", tie_word_embeddings=True)


def some(vocabulary: int = 11, *, rows: int, found: int = 20) -> Batches:
    """A text of `found` rows, of which every twentieth is held out."""
    return batches(vocabulary, rows=rows, context=CONTEXT, length=found * (CONTEXT + 1))


def budget(privacy: PrivacyConfig = PRIVATE, ledger: bytes | None = None) -> Budget:
    return Budget(privacy, context=CONTEXT, save=lambda content: True, ledger=ledger)


def private(
    model: Any, text: Batches, privacy: PrivacyConfig = PRIVATE, config: TrainConfig = CONFIG
) -> PrivateTrainer:
    return PrivateTrainer(model, text, config, budget(privacy), chance=random.Random(3).randbytes)


def step(trainer: Trainer) -> list[MicroStep]:
    """The micro-batches of one whole step."""
    done = [trainer.micro_step()]
    while not (done[-1].stepped or done[-1].skipped):
        done.append(trainer.micro_step())
    return done


def weights(trainer: Trainer) -> torch.Tensor:
    return trainer.layout.flatten(trainer.named)


def first_gradient(trainer: Trainer) -> torch.Tensor:
    """What the optimiser got in the only step so far."""
    assert trainer.step == 1
    return read_safetensors(trainer.state().vectors)["first_moment"] / (1 - BETAS[0])


class Forced:
    """Secret bytes that are all alike for the draw of rows, and random after it: all rows are drawn, or none."""

    def __init__(self, byte: int) -> None:
        self._draw, self._rest = bytes((byte,)), random.Random(3)
        self._is_draw = True

    def __call__(self, count: int) -> bytes:
        if self._is_draw:
            self._is_draw = False
            return self._draw * count
        return self._rest.randbytes(count)
