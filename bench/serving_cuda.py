"""Decoding on a GPU: our engine beside transformers generate and the bound that the memory's speed sets.

Rules: Llama configurations of 1B and 8B with random bf16 weights, made in the GPU's memory; 64-token prompts; wall time
of the passes in which all decode. generate's time for a token is that of a long answer less that of a short one. The
bound: the bytes of the weights that a token reads and of the KV at half of the answer, over the speed of a large copy.
A size that does not fit twice is left out. Paths: bf16, plain linear layers.
Source: MEASURE.md, "On a GPU".
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from transformers import LlamaConfig

from bench.harness import Row
from bench.serving_asks import PROMPT_TOKENS, Ask, Shape, ids
from bench.serving_load import answer
from bench.serving_model import loaded_of, random_llama
from model.config import EngineConfig
from model.engine import Engine
from model.load import kv_token_bytes

BATCHES: Final = (1, 64)
NEW_TOKENS: Final = 128
CONTEXT: Final = 512
COPY_BYTES: Final = 1 << 32
SIZES: Final = {  # as Llama 3.2 1B and Llama 3.1 8B
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False},
}


def cuda_rows(*, quick: bool, seed: int, note: Callable[[str], None]) -> list[Row]:
    """All figures. Exits with a message where there is no such GPU."""
    if not torch.cuda.is_available():
        raise SystemExit(
            f"--device cuda came, and torch {torch.__version__} sees no CUDA device here; run it on a machine with an "
            "NVIDIA GPU and a CUDA build of torch, or leave --device out to measure on the CPU"
        )
    device, rng = torch.device("cuda", torch.cuda.current_device()), random.Random(seed)
    speed = copy_bytes_s(device)
    rows = [Row(figure="copy_gb_s", value=speed / 1e9, unit="GB/s read and written", better="higher")]
    for name, sizes in SIZES.items():
        config = llama(sizes)
        needed = 2.5 * weight_bytes(config) + max(BATCHES) * CONTEXT * kv_token_bytes(config, torch.bfloat16)
        free, _ = torch.cuda.mem_get_info(device)
        if free < needed:
            note(f"{name} is left out: {free / 1e9:.0f} GB of GPU memory are free, {needed / 1e9:.0f} are needed")
            continue
        rows += size_rows(name, config, device, speed, (rng, 2 if quick else 5))
    return rows


def llama(sizes: dict[str, Any]) -> LlamaConfig:
    """One of SIZES."""
    return LlamaConfig(
        **sizes, num_attention_heads=32, num_key_value_heads=8, vocab_size=128_256,
        max_position_embeddings=CONTEXT, attn_implementation="sdpa",
    )  # fmt: skip


def weight_bytes(config: LlamaConfig) -> int:
    """Of the weights that one token reads: all but the rows of the embedding, in bf16."""
    width: int = config.hidden_size
    kv_width = width // config.num_attention_heads * config.num_key_value_heads
    layer = 2 * width * width + 2 * width * kv_width + 3 * width * config.intermediate_size
    return int(2 * (config.num_hidden_layers * layer + width * config.vocab_size))


def copy_bytes_s(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target, taken_s = torch.empty_like(source), []
    for _ in range(11):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(device)
        taken_s.append(time.perf_counter() - began)
    return 2 * COPY_BYTES / statistics.median(taken_s[1:])


def size_rows(
    name: str, config: LlamaConfig, device: torch.device, speed: float, chance: tuple[random.Random, int]
) -> list[Row]:
    """One size; chance: and how many turns."""
    rng, turns = chance
    loaded = loaded_of(config, name, torch.bfloat16, device)
    engine = Engine(loaded, EngineConfig(slots=max(BATCHES), kv_tokens=max(BATCHES) * CONTEXT))
    rival = random_llama(config, torch.bfloat16, device)
    rows = []
    for batch in BATCHES:
        ours, theirs = list[float](), list[float]()
        for turn in range(-1, turns):
            asks = [
                Ask(0.0, ids(rng, PROMPT_TOKENS, Shape(vocabulary=config.vocab_size)), NEW_TOKENS) for _ in range(batch)
            ]
            told = answer(engine, asks)
            generated = generate_tok_s(rival, asks, device)
            if turn >= 0:
                ours.append(told.decode_tokens / told.decode_wall_s)
                theirs.append(generated)
        kv = batch * (PROMPT_TOKENS + NEW_TOKENS / 2) * loaded.facts.kv_token_bytes
        bound = batch * speed / (weight_bytes(config) + kv)
        value, beside, figure = statistics.median(ours), statistics.median(theirs), f"{name}_b{batch}"
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        rows += [
            Row(figure=f"decode_{figure}_tok_per_s", value=value, unit="tok/s, bf16 plain", better="higher",
                rival="generate bf16", rival_value=beside),
            Row(figure=f"decode_{figure}_ratio", value=ratio, unit="times, bf16 plain", better="higher",
                rival="generate bf16", rival_value=1.0),
            Row(figure=f"bound_{figure}_ratio", value=value / bound, unit="of the bound, bf16 plain", better="higher",
                rival="bound, tok/s", rival_value=bound),
        ]  # fmt: skip
    return rows


def generate_tok_s(model: Any, asks: Sequence[Ask], device: torch.device) -> float:
    """Tokens a second while it decodes."""
    ids_BT = torch.tensor([ask.prompt for ask in asks], device=device)
    taken_s = []
    for new in (1, 1 + asks[0].new):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=new, do_sample=False
            )
        torch.cuda.synchronize(device)
        taken_s.append(time.perf_counter() - began)
    return len(asks) * asks[0].new / (taken_s[1] - taken_s[0])
