"""`PYTHON -m bench.serving_llamacpp SHAPE THREADS`: llama.cpp on the same shapes, asked by lines.

Rules: run by the Python of an environment of its own that has llama-cpp-python, gguf and numpy (bench/serving_rivals.py
says how to make it). Random weights are written as GGUF without a vocabulary and driven by the low-level API: all
prompts in one batch, then one token of each at a time, the best by its logits. Paths: `bf16`, `q8_0`.
Source: ggml-org/llama.cpp `include/llama.h`, `examples/batched/batched.cpp`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import gguf
import llama_cpp
import numpy as np

from bench.serving_asks import SHAPES, Ask, Shape, Told, answer_lines

SEQUENCE_TOKENS: Final = 256  # room of one answer
BATCH_TOKENS: Final = 2_048
TYPES: Final = {"bf16": (gguf.GGMLQuantizationType.BF16, 32), "q8_0": (gguf.GGMLQuantizationType.Q8_0, 7)}


class Place(NamedTuple):
    """One token of a batch. wanted: its logits are read."""

    token: int
    position: int
    sequence: int
    wanted: bool


def write_model(path: Path, precision: str, shape: Shape) -> None:
    """A Llama with random weights."""
    kind, file_type = TYPES[precision]
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_context_length(shape.context)
    out.add_embedding_length(shape.width)
    out.add_block_count(shape.layers)
    out.add_feed_forward_length(shape.inner)
    out.add_head_count(shape.heads)
    out.add_head_count_kv(shape.heads)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_dimension_count(shape.width // shape.heads)
    out.add_vocab_size(shape.vocabulary)
    out.add_file_type(file_type)
    out.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(0)

    def weight(name: str, rows: int, columns: int) -> None:
        values = (rng.standard_normal((rows, columns)) * 0.02).astype(np.float32)
        out.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        out.add_tensor(f"{name}.weight", np.ones(shape.width, np.float32))

    weight("token_embd", shape.vocabulary, shape.width)
    weight("output", shape.vocabulary, shape.width)
    norm("output_norm")
    for layer in range(shape.layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            weight(f"blk.{layer}.{name}", shape.width, shape.width)
        weight(f"blk.{layer}.ffn_gate", shape.inner, shape.width)
        weight(f"blk.{layer}.ffn_up", shape.inner, shape.width)
        weight(f"blk.{layer}.ffn_down", shape.width, shape.inner)
        norm(f"blk.{layer}.attn_norm")
        norm(f"blk.{layer}.ffn_norm")
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


class LlamaCpp:
    """Both precisions, and a context for each size of batch; each made when it is first asked for."""

    def __init__(self, shape: Shape, threads: int, folder: Path) -> None:
        self._shape, self._threads, self._folder = shape, threads, folder
        self._models: dict[str, Any] = {}
        self._contexts: dict[tuple[str, int], Any] = {}
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def answer(self, path: str, asks: Sequence[Ask]) -> Told:
        """All together: prompts first, then the answers, which have one length. Raises RuntimeError."""
        context = self._context(path, len(asks))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        new = asks[0].new
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = self._taken(context, _places(asks))
        wall_first, cpu_first = time.perf_counter(), time.process_time()
        for step in range(new - 1):
            tokens = self._taken(
                context,
                [
                    Place(token, len(ask.prompt) + step, sequence, True)
                    for sequence, (token, ask) in enumerate(zip(tokens, asks, strict=True))
                ],
            )
        wall_last, cpu_last = time.perf_counter(), time.process_time()
        return Told(
            tokens=new * len(asks),
            wall_s=wall_last - wall,
            cpu_s=cpu_last - cpu,
            decode_tokens=(new - 1) * len(asks),
            decode_wall_s=wall_last - wall_first,
            decode_cpu_s=cpu_last - cpu_first,
            first_s=(wall_first - wall,) * len(asks),
        )

    def _taken(self, context: Any, places: Sequence[Place]) -> list[int]:
        """One pass; the best token of each place that is wanted."""
        batch = self._batch
        batch.n_tokens = len(places)
        for i, place in enumerate(places):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = place.token, place.position, 1
            batch.seq_id[i][0], batch.logits[i] = place.sequence, place.wanted
        if refused := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode refused a batch of {len(places)} tokens ({refused})")
        shape = (self._shape.vocabulary,)
        wanted = [i for i, place in enumerate(places) if place.wanted]
        logits = [llama_cpp.llama_get_logits_ith(context, i) for i in wanted]
        return [int(np.ctypeslib.as_array(each, shape=shape).argmax()) for each in logits]

    def _context(self, precision: str, size: int) -> Any:
        if precision not in self._models:
            file = self._folder / f"{precision}.gguf"
            write_model(file, precision, self._shape)
            settings = llama_cpp.llama_model_default_params()
            self._models[precision] = llama_cpp.llama_model_load_from_file(str(file).encode(), settings)
            if not self._models[precision]:
                raise RuntimeError(f"llama.cpp did not load {file}")
        if (precision, size) not in self._contexts:
            settings = llama_cpp.llama_context_default_params()
            settings.n_ctx, settings.n_seq_max = SEQUENCE_TOKENS * size, size
            settings.n_batch, settings.n_ubatch = BATCH_TOKENS, 512
            settings.n_threads = settings.n_threads_batch = self._threads
            if hasattr(settings, "kv_unified"):
                settings.kv_unified = True
            context = llama_cpp.llama_init_from_model(self._models[precision], settings)
            if not context:
                raise RuntimeError(f"llama.cpp made no context for {size} sequences")
            self._contexts[precision, size] = context
        return self._contexts[precision, size]


def _places(asks: Iterable[Ask]) -> list[Place]:
    """All prompts, the logits of each last token wanted."""
    return [
        Place(token, position, sequence, position == len(ask.prompt) - 1)
        for sequence, ask in enumerate(asks)
        for position, token in enumerate(ask.prompt)
    ]


def main(arguments: Sequence[str]) -> None:
    """Answer until the lines end."""
    shape, threads = arguments
    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        rival = LlamaCpp(SHAPES[shape], int(threads), Path(folder))
        answer_lines(rival.answer, version=llama_cpp.__version__)


if __name__ == "__main__":
    main(sys.argv[1:])
