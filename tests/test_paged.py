"""Passes over blocks: to the bit what a sequence alone gets, whatever goes with it and wherever its blocks lie."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model import native, paged
from model.config import EngineConfig
from model.engine import Engine
from model.execute import Blockwise, Single, Task, executor_for
from model.linears import kinds_here, pack
from model.load import Loaded
from model.paged_plan import SCORES_MAX, Part, Pass, _runs
from tests.test_engine import load_path, make, prompt_of, run
from tests.tiny_models import CONTEXT, byte_tokenizer, causal_config, save_causal

BLOCK = 16  # as many as a vector register holds numbers, or a whole number of them
BLOCKS = 20
INVARIANT = [kind for kind in ("fp32", "bf16", "int8") if kind in kinds_here()]


def packed_llama(path: Path, kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> Loaded:
    """A Llama with two small layers, wide enough that a BLAS could add up in several orders."""
    torch.manual_seed(0)
    config = causal_config("llama", 320)
    config.update({"hidden_size": 64, "intermediate_size": 1_280, "initializer_range": 0.2, **more})
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    loaded = load_path(path)
    model = loaded.model.to(dtype)
    pack(model, kind)
    return replace(loaded, model=model)


class Sequence:
    """A sequence on its way through an executor."""

    def __init__(self, name: str, tokens: list[int], table: list[int]) -> None:
        self.name, self.tokens, self.table = name, tokens, table
        self.prompt = 1 + len(tokens) // 2
        self.done = 0
        self.logits: dict[int, torch.Tensor] = {}  # after so many tokens

    def task(self, count: int) -> Task:
        end = min(self.done + count, len(self.tokens))
        return Task(
            request_id=self.name, table=self.table, tokens=self.tokens, begin=self.done, end=end, samples=True,
            prompt=self.prompt,
        )  # fmt: skip

    def took(self, task: Task, made: dict[str, torch.Tensor]) -> None:
        self.done = task.end
        self.logits[task.end] = made[self.name]


def tokens_of(seed: int, length: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(320) for _ in range(length)]


def alone(loaded: Loaded, tokens: list[int]) -> dict[int, torch.Tensor]:
    """Token by token, with nothing beside it, in blocks that follow one another."""
    executor = executor_for(loaded, BLOCKS, BLOCK)
    sequence = Sequence("alone", tokens, list(range(BLOCKS)))
    while sequence.done < len(tokens):
        task = sequence.task(1)
        sequence.took(task, executor.run([task]))
    return sequence.logits


@pytest.fixture(scope="module", params=["ours", "torch"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """By kernels of our own, and by torch as where these are not to be had."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(native, "is_able", lambda: False)
        elif not native.is_able():
            pytest.skip("no kernels for this processor")
        yield request.param


@pytest.fixture(scope="module")
def models(way: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    made = {kind: packed_llama(tmp_path_factory.mktemp(kind), kind) for kind in INVARIANT}
    if "bf16" in INVARIANT:
        made["bf16 throughout"] = packed_llama(tmp_path_factory.mktemp("b"), "bf16", torch.bfloat16)
    for heads in (1, 4):
        made[f"{heads} key heads"] = packed_llama(
            tmp_path_factory.mktemp("heads"), "fp32", num_key_value_heads=heads
        )  # fmt: skip
    return made


LENGTHS = (75, 60, 9, 1)


@pytest.fixture(scope="module")
def references(models: dict[str, Loaded]) -> dict[str, list[dict[int, torch.Tensor]]]:
    return {
        name: [alone(loaded, tokens_of(seed, size)) for seed, size in enumerate(LENGTHS)]
        for name, loaded in models.items()
    }


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_logits_are_those_of_a_sequence_alone_to_the_bit(
    models: dict[str, Loaded], references: dict[str, list[dict[int, torch.Tensor]]], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(models)))
    draw = random.Random(data.draw(st.integers(0, 1 << 32)))
    blocks = list(range(BLOCKS))
    if data.draw(st.booleans()):
        draw.shuffle(blocks)
    sequences = []
    for seed, size in enumerate(LENGTHS):
        count = -(-size // BLOCK)
        sequences.append(Sequence(str(seed), tokens_of(seed, size), blocks[:count]))
        del blocks[:count]
    executor = executor_for(models[name], BLOCKS, BLOCK)
    while left := [s for s in sequences if s.done < len(s.tokens)]:
        chosen = draw.sample(left, draw.randint(1, len(left)))
        tasks = [(s, s.task(draw.choice((1, 1, 2, 3, 5, 16, 40)))) for s in chosen]
        made = executor.run([task for _, task in tasks])
        for sequence, task in tasks:
            sequence.took(task, made)
    for sequence, reference in zip(sequences, references[name], strict=True):
        for at, logits_V in sequence.logits.items():
            assert torch.equal(logits_V, reference[at]), f"{name}: sequence {sequence.name} after {at} tokens"


@pytest.mark.slow
@pytest.mark.parametrize("kind", INVARIANT)
def test_an_answer_is_the_same_to_the_bit_of_its_logprobs(models: dict[str, Loaded], kind: str) -> None:
    """Through the engine: alone; in a crowd; without room, so that it is computed again; and after a shared prompt."""
    loaded = models[kind]
    prompt = prompt_of(60)
    fields = {"temperature": 0.7, "seed": 3, "logprobs": 4, "max_tokens": 30}
    whole = run(Engine(loaded, EngineConfig(block_tokens=BLOCK)), make(prompt, "r", **fields))["r"]
    others = [make(prompt_of(n)[::-1], f"o{n}", max_tokens=40, temperature=0.0) for n in (3, 50, 70, 5)]
    tight = Engine(loaded, EngineConfig(slots=4, kv_tokens=224, prefill_chunk=24, block_tokens=BLOCK))
    crowded = run(tight, *others, make(prompt, "r", **fields))["r"]
    assert tight.statistics().preemptions > 0
    assert crowded == whole
    shared = Engine(loaded, EngineConfig(slots=4, prefill_chunk=24, block_tokens=BLOCK))
    run(shared, make((*prompt[:43], 9, 9, 9), "before"))
    assert run(shared, make(prompt, "r", **fields))["r"] == whole
    assert shared.statistics().reused_tokens == 32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp32", "1 key heads"])
def test_the_next_turn_is_the_same_to_the_bit(models: dict[str, Loaded], way: str, name: str) -> None:
    """Blocks of an answer serve the prompt that repeats it only where they are what they would be in a prompt."""
    loaded, shared = models[name], 48 if (way, name) == ("torch", "fp32") else 96
    engine = Engine(loaded, EngineConfig(block_tokens=BLOCK))
    prompt = prompt_of(50)
    answer = run(engine, make(prompt, max_tokens=50, temperature=0.0))["r"]
    turn = make((*prompt, *answer.tokens, 5, 6), max_tokens=5, temperature=0.9, logprobs=4)
    before = engine.statistics().reused_tokens
    assert run(engine, turn) == run(Engine(loaded, EngineConfig(block_tokens=BLOCK)), turn)
    assert engine.statistics().reused_tokens - before == shared


@pytest.mark.slow
def test_a_long_answer_is_the_same_however_its_blocks_are_added_up(tmp_path: Path) -> None:
    loaded = packed_llama(tmp_path, "fp32", max_position_embeddings=4_096)
    tokens = tokens_of(5, 2_300)
    made = []
    for begins, other in (([0, 2_299], 1), ([0, 1, 700, 1_500, 2_298, 2_299], 900), ([0, 2_000], 2_100)):
        executor = executor_for(loaded, 400, BLOCK)
        sequence = Sequence("s", tokens, list(range(150)))
        beside = Sequence("o", tokens_of(6, 2_300), list(range(399, 150, -1)))
        for begin, end in zip(begins, [*begins[1:], 2_300], strict=True):
            task, more = sequence.task(end - begin), beside.task(other)
            logits = executor.run([task, more] if more.end > more.begin else [task])
            sequence.took(task, logits)
            beside.done = more.end
        made.append(sequence.logits[2_300])
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_what_an_earlier_user_left_in_a_block_reaches_nobody(tmp_path: Path) -> None:
    save_causal(tmp_path)
    loaded = load_path(tmp_path)
    good = run(Engine(loaded), make((1, 2, 3), max_tokens=6))["r"]
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[7] = float("nan")
    engine = Engine(loaded, EngineConfig(slots=1, kv_tokens=32, block_tokens=32))
    assert run(engine, make((1, 7, 3), "bad"))["bad"].error is not None
    assert run(engine, make((1, 2, 3), max_tokens=6))["r"].tokens == good.tokens


def test_a_model_that_embeds_attends_as_before(tmp_path: Path) -> None:
    save_causal(tmp_path)
    loaded = load_path(tmp_path)
    ids = torch.tensor([[1, 2, 3, 0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    with torch.inference_mode():
        before = loaded.model(input_ids=ids, attention_mask=mask).logits
        run(Engine(loaded), make((1, 2, 3)))
        assert torch.equal(loaded.model(input_ids=ids, attention_mask=mask).logits, before)


# which models go over blocks

OTHERS: dict[str, Any] = {
    "gemma3": lambda c: transformers.Gemma3TextConfig(
        **c, head_dim=8, sliding_window=24, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda c: transformers.Phi3Config(**c, sliding_window=24),
    "mixtral": lambda c: transformers.MixtralConfig(**c, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda c: transformers.GptOssConfig(
        **c, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=24
    ),  # has sinks
    "deepseek_v3": lambda c: transformers.DeepseekV3Config(
        **{**c, "num_key_value_heads": 4}, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
        moe_intermediate_size=16,
    ),  # keys are wider than values
    "llama4": lambda c: transformers.Llama4TextConfig(**c, head_dim=8, num_local_experts=4, attention_chunk_size=24),
    "bloom": lambda c: transformers.BloomConfig(
        vocab_size=c["vocab_size"], hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4, bos_token_id=0,
        eos_token_id=0, pad_token_id=0,
    ),
    "falcon": lambda c: transformers.FalconConfig(
        vocab_size=c["vocab_size"], hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.4,
        bos_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip
BY_ITSELF = {"llama4": "chunked_attention", "bloom": "not told positions", "falcon": "not behind transformers'"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_equal_generate(kind: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    common = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.4, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(OTHERS[kind](common)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = Engine(load_path(tmp_path), EngineConfig(slots=3, prefill_chunk=32, block_tokens=BLOCK))
    assert BY_ITSELF.get(kind, "") in engine.why_single
    assert bool(engine.why_single) == (kind in BY_ITSELF)
    prompts = {"one": prompt_of(1), "short": prompt_of(7), "chunks": prompt_of(100)}
    made = run(engine, *(make(prompt, name) for name, prompt in prompts.items()))
    for name, prompt in prompts.items():
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        assert made[name].tokens == tuple(whole[0, len(prompt) :].tolist()), name


class Strange:
    """A model whose attention is not what the interface is told."""

    def __init__(self, inner: Any, trouble: str) -> None:
        self.inner, self.trouble = inner, trouble

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, **fields: Any) -> Any:
        if self.inner.config._attn_implementation == paged.NAME:
            if self.trouble == "fails":
                raise RuntimeError("no such thing")
            if self.trouble == "asks":
                fields["position_bias"] = 1
            if self.trouble == "is off":
                fields["position_ids"] = fields["position_ids"] // 2
        return self.inner(**fields)


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        ("fails", "trial pass failed (RuntimeError)"), ("asks", "asks for position_bias"), ("is off", "was off by"),
        ("window", "window of attention does not reach"), ("none", ""),
    ],
)  # fmt: skip
def test_a_model_is_tried(trouble: str, why: str, tmp_path: Path) -> None:
    save_causal(tmp_path)
    loaded = load_path(tmp_path)
    if trouble == "window":
        loaded.model.config.sliding_window = 24
    executor = executor_for(replace(loaded, model=Strange(loaded.model, trouble)), 4, BLOCK)
    assert why in executor.why
    assert isinstance(executor, Single) == bool(why)


# the plan of a pass


@given(st.lists(st.integers(0, 30), max_size=40))
@example([])
@example([3, 4, 5, 5, 6, 2])
def test_runs_are_whole(blocks: list[int]) -> None:
    runs = _runs(blocks)
    assert [block + k for begin, end, block in runs for k in range(end - begin)] == blocks
    assert all(blocks[end] != blocks[end - 1] + 1 for _, end, _ in runs[:-1])


def test_sequences_that_share_blocks_make_runs() -> None:
    parts = [Part(table=(4, 5, 6, 10 + k), begin=60, end=61, prompt=20) for k in range(3)]
    (group,) = Pass(parts, BLOCK, torch.device("cpu")).groups(1, 1)
    assert [end - begin for begin, end, _ in group.runs] == [3, 3, 3, 3]
    assert group.pairs == 12


def test_a_short_sequence_is_not_padded_to_a_long_ones_length() -> None:
    parts = [Part(table=range(20), begin=319, end=320, prompt=320), Part(table=(30,), begin=3, end=4, prompt=1)]
    groups = Pass(parts, BLOCK, torch.device("cpu")).groups(1, 1)
    assert sorted(group.longest for group in groups) == [1, 20]


def test_a_long_chunk_is_cut_so_that_its_scores_stay_small() -> None:
    work = Pass([Part(table=range(50), begin=100, end=800, prompt=800)], BLOCK, torch.device("cpu"))
    groups = work.groups(1, 64)
    assert len(groups) > 1
    assert [int(row) for group in groups for row in group.rows] == list(range(700))
    for group in groups:
        assert group.longest * BLOCK * group.rows_padded * 64 <= SCORES_MAX


@pytest.mark.parametrize(("stated", "blocks"), [(0, 12), (10**6, 12), (None, 12), (64, 3)])
def test_blocks_take_no_more_memory_than_was_stated(tmp_path: Path, stated: int | None, blocks: int) -> None:
    """Two layers, two key heads of eight numbers, keys and values, in fp32: 256 bytes a token."""
    save_causal(tmp_path)
    loaded = load_path(tmp_path)
    assert loaded.facts.kv_token_bytes == 256
    if stated is not None:
        loaded = replace(loaded, facts=replace(loaded.facts, kv_token_bytes=stated))
    engine = Engine(loaded, EngineConfig(kv_tokens=12 * BLOCK, block_tokens=BLOCK))
    assert engine.statistics().kv_tokens_total == blocks * BLOCK


def test_the_trial_takes_no_part_of_the_blocks(tmp_path: Path) -> None:
    save_causal(tmp_path)
    executor = executor_for(load_path(tmp_path), 5, BLOCK)
    assert isinstance(executor, Blockwise)
    assert (executor._pool.blocks, executor._pool.block_tokens) == (5, BLOCK)
