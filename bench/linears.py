"""`python -m bench.linears`: CPU time of a step's linear layers by kind, what each loses, what new weights cost.

Rules: one thread. A figure is CPU time of this process, the median of the turns; kinds take turns, so that what else
the machine does meets all of them. The layers are those of a Llama of 60M (hidden 512, 8 layers, vocabulary 32,000)
with random weights. Plain bf16 layers take bf16 rows, all packed ones fp32 rows. `_int_mm` is int8 by the row without
FBGEMM, where that is gone. New weights are packed for that Llama, and for the layers of one of 1B, where outputs have
more inputs. Perplexity is the embedded model's on the end of the last book of its corpus, on which it was not trained,
with the logits' layer as a model of that kind has it; without that file its figures are left out.
"""

from __future__ import annotations

import lzma
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.harness import Options, Row, options, report
from model.evaluate import held_out_loss
from model.linears import KINDS, Int8Linear, PackedLinear, kinds_here, layer_of, linear_shapes, pack
from model.load import load, resolve

CORPUS: Final = Path("/work/shared/data/fairy_tales.txt.xz")
ROWS: Final = (1, 8, 16)
CONTEXT: Final = 257  # tokens of a row of held-out text
PLAIN: Final = {"plain fp32": torch.float32, "plain bf16": torch.bfloat16}
PLANNED: Final = {  # SERVING.md, ms with 1, 8 and 16 rows; int8 there is `_int_mm`
    "plain fp32": (16.6, 38, 51), "plain bf16": (12.2, 14.1, 21.0), "fp32": (15.3, 14.3, 23.7),
    "bf16": (7.4, 8.2, 13.3), "int8": (5.8, 10.0, 12.5), "int8-dynamic": (3.6, 3.8, 10.2), "_int_mm": (5.8, 10.0, 12.5),
    "int4": (2.7, 8.6, 20),
}  # fmt: skip
LARGE: Final = [(2048, 2048), (2048, 512), (2048, 8192), (8192, 2048)]  # Llama 3.2 1B, without its embedding


def main() -> None:
    """Measure and report."""
    chosen = options(__doc__)
    torch.set_num_threads(1)
    report("linears", measure(chosen), chosen)


def measure(chosen: Options) -> list[Row]:
    """All figures."""
    with torch.device("meta"):
        config = LlamaConfig(
            hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, vocab_size=32_000
        )
        shapes = linear_shapes(LlamaForCausalLM(config))
    rows = step_rows(shapes, turns=5 if chosen.quick else 15)
    return (
        rows
        + adopt_rows(shapes, "adopt")
        + adopt_rows(LARGE, "adopt_large")
        + perplexity_rows(texts=16 if chosen.quick else 128)
    )


def step_rows(shapes: list[tuple[int, int]], turns: int) -> list[Row]:
    """ms of one step's linear layers."""
    weights = [torch.randn(outputs, inputs) / inputs**0.5 for inputs, outputs in shapes]
    stacks: dict[str, tuple[list[nn.Module], torch.dtype]] = {
        name: ([plain_layer(weight.to(dtype)) for weight in weights], dtype) for name, dtype in PLAIN.items()
    }
    for kind in kinds_here():
        stacks[kind] = ([layer_of(kind, weight, None) for weight in weights], torch.float32)
    if "int8" in stacks:
        stacks["_int_mm"] = ([Int8Linear(weight, None, by_x86=False) for weight in weights], torch.float32)
    figures: list[Row] = []
    for index, count in enumerate(ROWS):
        given = {
            dtype: {inputs: torch.randn(count, inputs).to(dtype) for inputs, _ in shapes} for dtype in PLAIN.values()
        }
        spent: dict[str, list[float]] = {name: [] for name in stacks}
        for _ in range(turns + 1):
            for name, (layers, dtype) in stacks.items():
                spent[name].append(cpu_s(partial(step, layers, shapes, given[dtype])))
        for name, turned in spent.items():
            figures.append(
                Row(
                    figure=f"{name.strip('_').replace(' ', '_')}_rows{count}",
                    value=statistics.median(turned[1:]) * 1e3,
                    unit="CPU-ms a step",
                    better="lower",
                    rival="SERVING.md",
                    rival_value=PLANNED[name][index],
                )
            )
    return figures


def step(layers: list[nn.Module], shapes: list[tuple[int, int]], rows: dict[int, torch.Tensor]) -> None:
    """Every layer once."""
    with torch.inference_mode():
        for layer, (inputs, _) in zip(layers, shapes, strict=True):
            layer(rows[inputs])


def adopt_rows(shapes: list[tuple[int, int]], name: str) -> list[Row]:
    """CPU-seconds to pack new weights, for 1,000,000,000 parameters."""
    weights = [torch.randn(outputs, inputs) for inputs, outputs in shapes]
    share = 1e9 / sum(weight.numel() for weight in weights)
    figures = []
    for kind in kinds_here():
        layers = [layer_of(kind, weight, None) for weight in weights]

        def again(layers: list[PackedLinear] = layers) -> None:
            for layer, weight in zip(layers, weights, strict=True):
                layer.take(layer.packed_of(weight))

        spent = statistics.median(cpu_s(again) for _ in range(5))
        figures.append(Row(figure=f"{kind}_{name}", value=spent * share, unit="CPU-s for 1B", better="lower"))
    return figures


def perplexity_rows(texts: int) -> list[Row]:
    """By how much the embedded model's perplexity grows, per cent of that in plain fp32."""
    if not CORPUS.is_file():
        return []
    found = resolve("default")
    with lzma.open(CORPUS, "rt", encoding="utf-8") as file:
        whole = file.read()
    loaded = load(found, device="cpu", dtype="float32")
    ids = loaded.tokens.encode(whole[-8 * texts * CONTEXT :])[: texts * CONTEXT]
    ids_BT = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    plain = nats(loaded.model, ids_BT)
    figures = [Row(figure="plain_fp32_perplexity", value=math.exp(plain), unit="", better="lower")]
    for kind in KINDS:
        if kind in kinds_here():
            packed = pack(load(found, device="cpu", dtype="float32").model, kind)
            grown = math.expm1(nats(packed.model, ids_BT) - plain) * 100
            figures.append(Row(figure=f"{kind}_perplexity", value=grown, unit="% more", better="lower"))
    return figures


def nats(model: nn.Module, ids_BT: torch.Tensor) -> float:
    """Held-out loss, nats a token."""
    judging = held_out_loss(model, ids_BT)
    while True:
        try:
            next(judging)
        except StopIteration as end:
            return float(end.value.nats_per_token)


def plain_layer(weight_OK: torch.Tensor) -> nn.Module:
    """nn.Linear with this weight."""
    with torch.device("meta"):
        plain = nn.Linear(weight_OK.shape[1], weight_OK.shape[0], bias=False)
    plain.weight = nn.Parameter(weight_OK, requires_grad=False)
    return plain


def cpu_s(act: Callable[[], None]) -> float:
    """CPU-seconds of this process, user and system."""
    began = time.process_time()
    act()
    return time.process_time() - began


if __name__ == "__main__":
    main()
