"""`python -m bench.serving_transformers SHAPE DTYPE THREADS`: transformers' own serving paths, asked by lines.

Rules: a process of its own, so that its CPU time is its own. Paths: `generate`, a batch that starts and ends together
(equal prompts, so nothing is padded); `continuous`, its continuous batching, which has as much KV memory and as many
requests at a time as our engine is given. Its own defaults take half of the memory for KV on a CPU and a mask over all
of it (11.6 GB for a toy model), so the three bounds are always set. First tokens are by its own time stamps.
Source: SERVING.md, "Traps found"; transformers `generation/continuous_batching/continuous_api.py`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any, Final

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as ours, before torch
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig

from bench.serving_asks import NEW_TOKENS, SHAPES, Ask, Told, answer_lines
from bench.serving_model import KV_TOKENS, SLOTS, llama_config, random_llama

PAGE_TOKENS: Final = 32  # 256 is its default and as fast
PASS_TOKENS: Final = 512  # prompts and answers of one pass
SILENCE_S_MAX: Final = 120.0  # without a result


class Transformers:
    """One model, and both paths over it."""

    def __init__(self, shape: str, dtype: torch.dtype) -> None:
        self._model = random_llama(llama_config(SHAPES[shape]), dtype, torch.device("cpu"))
        self._batching: Any = None

    def answer(self, path: str, asks: Sequence[Ask]) -> Told:
        """One load by one path."""
        return {"generate": self._generate, "continuous": self._continuous}[path](asks)

    def _generate(self, asks: Sequence[Ask]) -> Told:
        ids_BT, new = torch.tensor([ask.prompt for ask in asks]), asks[0].new
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            made_BT = self._model.generate(
                input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=new, do_sample=False
            )
        return Told(
            tokens=made_BT.numel() - ids_BT.numel(),
            wall_s=time.perf_counter() - wall,
            cpu_s=time.process_time() - cpu,
        )

    def _continuous(self, asks: Sequence[Ask]) -> Told:
        batching = self._started()
        waiting, places, first_s, tokens = list(enumerate(asks)), dict[str, int](), dict[int, float](), 0
        began, cpu = time.perf_counter(), time.process_time()
        while waiting or len(first_s) < len(asks):
            while waiting and waiting[0][1].due_s <= time.perf_counter() - began:
                place, ask = waiting.pop(0)
                name = batching.add_request(list(ask.prompt), max_new_tokens=ask.new, record_timestamps=True)
                assert name is not None, "its thread has ended: it takes no requests any more"
                places[name] = place
            until_s = waiting[0][1].due_s - (time.perf_counter() - began) if waiting else SILENCE_S_MAX
            result = batching.get_result(timeout=max(1e-4, until_s))
            if result is None:
                assert waiting, f"continuous batching gave nothing for {SILENCE_S_MAX:.0f} s"
                continue
            assert result.is_finished(), result
            assert result.error is None, result.error
            place = places[result.request_id]
            tokens += len(result.generated_tokens)
            first_s[place] = result.timestamps[0] - began - asks[place].due_s
        return Told(
            tokens=tokens,
            wall_s=time.perf_counter() - began,
            cpu_s=time.process_time() - cpu,
            first_s=tuple(first_s[place] for place in range(len(asks))),
        )

    def _started(self) -> Any:
        """Its engine, in its thread; started once."""
        if self._batching is None:
            self._batching = self._model.init_continuous_batching(
                generation_config=GenerationConfig(
                    max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
                ),
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=PAGE_TOKENS,
                    num_blocks=KV_TOKENS // PAGE_TOKENS,
                    max_batch_tokens=PASS_TOKENS,
                    max_requests_per_batch=SLOTS,
                    allow_block_sharing=False,
                    default_compile_level=0,
                ),
            )
            self._batching.start()
        return self._batching

    def close(self) -> None:
        """Ends its thread."""
        if self._batching is not None:
            self._batching.stop(block=True, timeout=5)


def main(arguments: Sequence[str]) -> None:
    """Answer until the lines end."""
    shape, dtype, threads = arguments
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(int(threads))
    rival = Transformers(shape, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    answer_lines(rival.answer, version=transformers.__version__)
    rival.close()


if __name__ == "__main__":
    main(sys.argv[1:])
