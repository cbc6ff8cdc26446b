"""Training here: H steps of AdamW from one state of the weights to another, whose difference is this node's delta.

Rules: sync, one thread, one micro-batch a call, so that serving can go in between. The model is this room's own fp32
copy (model/train_memory.py makes it); the engine's is never touched. What a step does depends on the weights, the
moments, the text, the seed and the number of the step alone, so a restart goes on to the bit on the same machine. Loss
or gradient that is not finite changes nothing: the step is skipped and counted, SKIPPED_IN_ROW_MAX of them in a row end
training. Chance is drawn under a seed of the step and given back: the rest of the process never sees it.
Legend: N elements of the flat vector, B rows, T tokens of a row, V vocabulary.
Source: AdamW: arXiv 1711.05101; betas of GPT-3, arXiv 2005.14165 appendix B; TRAINING.md 1.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from crypto.canonical import encode
from model.batches import Batches
from model.config import TrainConfig
from model.errors import FOREIGN, BadInput, ComputeFailed, Diverged, ModelError, OutOfMemory, first_line
from model.layout import layout_of
from model.load import pick_dtype
from model.train_state import Course, Numbers, SavedState, pack, unpack

BETAS = (0.9, 0.95)
EPSILON = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names
SKIPPED_IN_ROW_MAX = 3
CHANCE_DOMAIN = "openagi chance of a micro-batch 1"
OUT_OF_MEMORY_TEXT = ("can't allocate memory", "out of memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroStep:
    """What one micro-batch did. step: the optimiser's step that it belongs to, counted from 0; loss: nats a token.

    stepped: it was the last of its step, and the weights changed. skipped: it was, and they did not.
    grad_norm: before clipping, at the end of a step, else None. cpu_s: of the process, over this call.
    """

    step: int
    loss: float
    tokens: int
    stepped: bool
    skipped: bool
    grad_norm: float | None
    cpu_s: float


class Trainer:
    """One model in training. start_vector_N: the weights that this round began with; not to be written to."""

    def __init__(
        self, model: Any, batches: Batches, config: TrainConfig, *, clock: Callable[[], float] = time.process_time
    ) -> None:
        """`model` becomes this trainer's own: fp32 parameters, those that require a gradient are trained.

        Raises BadModel (no layout), BadInput (checkpointing that the architecture does not have).
        """
        self.model = model.train()
        self.config = config
        self.named: dict[str, torch.nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert all(p.dtype == torch.float32 for p in self.named.values()), "train a copy in fp32: train_memory.py"
        self.layout = layout_of(self.named)
        self.start_vector_N = self.layout.flatten(self.named)
        self._batches = batches
        self._clock = clock
        self._device: torch.device = next(iter(self.named.values())).device
        self._autocast = config.autocast == "on" or (
            config.autocast == "auto" and pick_dtype("auto", self._device) is torch.bfloat16
        )
        self._optimizer = _optimizer(self.named, config)
        self._step = 0  # begun, the skipped ones among them
        self._skipped = 0
        self._skipped_in_row = 0
        self._micro = 0  # micro-batches of this step that are done
        self._is_spoilt = False  # one of them had a loss that is not finite
        _set_checkpointing(model, config.checkpointing)

    @property
    def step(self) -> int:
        """The number of the step that the next micro-batch belongs to: how many have ended, skipped ones too."""
        return self._step

    @property
    def skipped(self) -> int:
        """Steps that changed nothing since their numbers were not finite."""
        return self._skipped

    def micro_step(self) -> MicroStep:
        """One forward and backward pass; with the last of a step, the optimiser's turn.

        Raises Diverged after SKIPPED_IN_ROW_MAX skipped steps in a row (the weights are those of the last good one),
        OutOfMemory, ComputeFailed: the step then begins anew with the next call.
        """
        assert self.model.training, "an evaluation is under way: its weights are not those to train"
        began = self._clock()
        step = self._step
        index, ids_BT = self._next_rows()
        try:
            loss = self._forward_backward(ids_BT.to(self._device), index)
        except FOREIGN as exc:
            self._drop_gradients()
            raise compute_error(exc, step) from exc
        self._micro += 1
        norm = self._end_step() if self._is_last() else None
        return MicroStep(
            step=step,
            loss=loss,
            tokens=ids_BT[:, 1:].numel(),
            stepped=norm is not None and self._skipped_in_row == 0,
            skipped=norm is not None and self._skipped_in_row > 0,
            grad_norm=norm,
            cpu_s=self._clock() - began,
        )

    def held_out(self, rows_max: int) -> torch.Tensor:
        """ids_BT of held-out rows of this trainer's text, always the same."""
        return self._batches.held_out(rows_max)

    def delta(self) -> torch.Tensor:
        """start - end as a new vector_N, fp32 on the CPU: what the steps since start took away from the weights."""
        end_N = self.layout.flatten(self.named)
        return torch.sub(self.start_vector_N, end_N, out=end_N)

    def rebase(self, vector_N: torch.Tensor, *, is_given: bool = False) -> None:
        """Takes weights (fp32, CPU) as the new start: a committed round's. Moments are kept, a step under way is begun
        anew. is_given: nobody changes that vector any more, so that no copy is needed. Raises BadModel."""
        self.layout.load_into(self.named, vector_N)
        self.start_vector_N = vector_N if is_given else vector_N.clone()
        self._drop_gradients()

    def state(self) -> SavedState:
        """All that a restart needs; a step under way begins anew there. Takes 32 N bytes while it is made."""
        numbers = Numbers(
            course=self._course(), step=self._step, skipped=self._skipped, skipped_in_row=self._skipped_in_row
        )
        moments_N = [self.layout.flatten(self._moments(key)) for key in MOMENTS]
        return pack(numbers, (self.start_vector_N, self.layout.flatten(self.named), *moments_N))

    def restore(self, saved: SavedState) -> None:
        """Goes on from a state. Raises BadState, and then nothing has changed."""
        numbers, (start_N, weights_N, *moments_N) = unpack(saved, self._course(), self.layout.size)
        self._check_saved(numbers)
        self.layout.load_into(self.named, weights_N)
        for key, moment_N in zip(MOMENTS, moments_N, strict=True):
            self.layout.load_into(self._moments(key), moment_N)
        for parameter in self.named.values():
            self._optimizer.state[parameter]["step"].fill_(numbers.step - numbers.skipped)
        self.start_vector_N = start_N
        self._step, self._skipped, self._skipped_in_row = numbers.step, numbers.skipped, numbers.skipped_in_row
        self._drop_gradients()

    def _course(self) -> Course:
        return Course(
            layout=self.layout.digest,
            text=self._batches.text.digest,
            context=self._batches.context,
            rows=self._batches.rows,
            accumulation=self.config.accumulation,
            seed=self.config.seed,
        )

    def _check_saved(self, numbers: Numbers) -> None:
        """Whether a state of this course may be gone on from. Raises BadState."""

    def _next_rows(self) -> tuple[int, torch.Tensor]:
        """The number of the next micro-batch, counted from 0, and its ids_BT on the CPU."""
        index = self._step * self.config.accumulation + self._micro
        return index, self._batches.batch(self.config.seed, index)

    def _is_last(self) -> bool:
        """Whether the micro-batches that are done make a step."""
        return self._micro == self.config.accumulation

    def _moments(self, key: str) -> dict[str, torch.Tensor]:
        return {name: self._optimizer.state[parameter][key] for name, parameter in self.named.items()}

    def _forward_backward(self, ids_BT: torch.Tensor, index: int) -> float:
        """Adds the gradient of one micro-batch; its loss. Raises what torch and transformers raise."""
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_chance(self.config.seed, index))
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._autocast):
                loss = next_token_loss(self.model, ids_BT)
            if not math.isfinite(value := loss.item()):
                self._is_spoilt = True  # its gradient would spoil that of the other micro-batches
                return value
            torch.autograd.backward(loss / self.config.accumulation)
        return value

    def _end_step(self) -> float:
        """The optimiser's turn, or a skipped step; the gradient's norm before clipping. Raises Diverged."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.named.values(), self.config.clip_norm))
        if self._is_spoilt or not math.isfinite(norm):
            self._skipped += 1
            self._skipped_in_row += 1
        else:
            rate = self.config.rate * min(1.0, (self._step + 1) / max(1, self.config.warmup_steps))
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
            self._skipped_in_row = 0
        self._step += 1
        self._drop_gradients()
        if self._skipped_in_row >= SKIPPED_IN_ROW_MAX:
            raise Diverged(
                f"training ends at step {self._step - 1:,}: loss or gradient was not finite in {SKIPPED_IN_ROW_MAX} "
                f"steps in a row; choose a rate below {self.config.rate:g}, and check that the weights are sound"
            )
        return norm

    def _drop_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._micro, self._is_spoilt = 0, False


def next_token_loss(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats of each row's tokens but the first, given those before it in the row. T includes both ends."""
    logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False, return_dict=True).logits
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten())


def _optimizer(named: dict[str, torch.nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW whose moments are there from the start, so that the first step's state is like any other's.

    Matrices decay; biases and norms, which have one side, do not.
    """
    decaying = [p for p in named.values() if p.ndim >= 2]
    others = [p for p in named.values() if p.ndim < 2]
    groups = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # fused: one pass over memory, where the other kinds make several and hold copies
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.rate, betas=BETAS, eps=EPSILON, fused=True
    )
    for parameter in named.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in MOMENTS},
        }
    return optimizer


def _set_checkpointing(model: Any, wanted: bool) -> None:
    if not wanted:
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise BadInput(f"{type(model).__name__} has no gradient checkpointing; train without it, in shorter rows")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()  # the first name since transformers 5.20 or so


def _chance(seed: int, index: int) -> int:
    """The seed of a micro-batch's dropout, 63 bits."""
    return int.from_bytes(hashlib.sha256(encode([CHANCE_DOMAIN, seed, index])).digest()[:8], "big") >> 1


def compute_error(exc: BaseException, step: int) -> ModelError:
    """What a foreign error in a step is called in the rest of the node."""
    if isinstance(exc, MemoryError | torch.OutOfMemoryError) or any(text in str(exc) for text in OUT_OF_MEMORY_TEXT):
        return OutOfMemory(
            f"there is no memory left for step {step:,} of training ({first_line(exc)}); choose fewer rows, a shorter "
            "context or checkpointing"
        )
    return ComputeFailed(f"step {step:,} of training failed ({type(exc).__name__}: {first_line(exc)})")
