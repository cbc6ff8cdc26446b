"""Machine code of our own: its numbers against torch's in fp64, each row's bits its own, and doing without it."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence

import pytest
import torch

from model import linears_int4, native, native_attention, native_linears, native_products
from model.linears import NativeLinear, PackedLinear, layer_of
from model.native_attention import Shape, attend, held, write
from model.paged_plan import Part, Pass

pytestmark = pytest.mark.skipif(not native.is_able(), reason="no kernels for this processor")
KINDS = [kind for kind in ("fp32", "bf16", "int8") if native_linears.is_here(kind)]
SIZE = 16


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=[16, 8])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Vectors of 512 and of 256 bits, as other processors have."""
    if request.param > native.lanes():
        pytest.skip("no vectors of that length here")
    if request.param < native.lanes():
        monkeypatch.setattr(native, "lanes", lambda: request.param)
    caches = (native_linears.code_here, native_linears._tried, native_attention._code, native_attention._tried)
    if request.param == 8:
        for cache in caches:
            cache.cache_clear()
    yield request.param
    if request.param == 8:
        for cache in caches:
            cache.cache_clear()


# --- linear layers ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_fp64(lanes: int, kind: str) -> None:
    draw, off = random.Random(3), {"fp32": 1e-6, "bf16": 5e-3, "int8": 2e-2}[kind]
    for _ in range(20):
        inputs, outputs, rows = draw.randint(1, 200), draw.randint(1, 300), draw.randint(1, 20)
        weight, x, bias = torch.randn(outputs, inputs), torch.randn(rows, inputs), torch.randn(outputs)
        laid = native_linears.lay(kind, weight)
        assert laid.words.shape[0] * native_linears.BLOCKS * lanes >= outputs
        for added in (None, bias):
            wanted = x.double() @ weight.double().t() + (0.0 if added is None else added)
            made = native_linears.products(x, laid, added)
            assert float((made - wanted).norm()) <= off * float(wanted.norm()), (inputs, outputs, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_bits_are_its_own_in_tiles_of_every_height(lanes: int, kind: str) -> None:
    del lanes
    x = torch.randn(23, 70)
    laid = native_linears.lay(kind, torch.randn(90, 70))
    alone = torch.cat([native_linears.products(x[row : row + 1], laid, None) for row in range(23)])
    for count in range(1, 24):
        assert torch.equal(native_linears.products(x[:count], laid, None), alone[:count]), count


def test_threads_share_without_changing_a_bit() -> None:
    x, before = torch.randn(40, 300), torch.get_num_threads()
    laid = [native_linears.lay(kind, torch.randn(1000, 300)) for kind in KINDS]
    made = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            if native.is_able():
                assert native.threads_for(1 << 30) == threads
            made.append([native_linears.products(x, each, None) for each in laid])
    finally:
        torch.set_num_threads(before)
    for other in made[1:]:
        assert all(torch.equal(one, two) for one, two in zip(made[0], other, strict=True))


def test_a_little_work_wakes_no_thread() -> None:
    assert native.threads_for(native.WORK_MIN - 1) == 1


def test_the_int8_kernel_reads_no_further_than_its_row() -> None:
    """What fills a row up must not count: the weights there are zeros."""
    weight, x = torch.randn(5, 7), torch.randn(3, 7)
    laid = native_linears.lay("int8", weight)
    padded = native_linears.lay("int8", torch.cat([weight, torch.zeros(5, 1)], 1))
    assert torch.equal(native_linears.products(x, laid, None), native_linears.products(
        torch.cat([x, torch.zeros(3, 1)], 1), padded, None))  # fmt: skip


def test_what_is_asked_of_no_kernel_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(layer_of("fp32", torch.randn(4, 4), None), NativeLinear)
    monkeypatch.setattr(native, "is_able", lambda: False)
    layer = layer_of("fp32", torch.randn(4, 4), None)
    assert isinstance(layer, PackedLinear)
    assert not isinstance(layer, NativeLinear)
    if linears_int4.is_here():
        assert layer_of("int4", torch.randn(64, 64), None).kind == "int4"


def test_more_threads_without_torchs_openmp_do_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_openmp", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not native.is_able()
    assert native.threads_for(1 << 30) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert native.is_able()


def test_a_processor_without_wide_vectors_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "features", lambda: frozenset({"sse2"}))
    assert native.lanes.__wrapped__() == 0
    monkeypatch.setattr(native, "lanes", lambda: 0)
    assert not native.is_able()
    assert not native_linears.is_here("int8")
    assert not native_attention.is_here(Shape(64, 64, 16, torch.float32))


def test_a_kernel_that_is_off_is_not_used_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native_products, "SCALE_MIN", 5.0)  # activations and weights are rounded to nothing
    native_linears.code_here.cache_clear()
    native_linears._tried.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not native_linears.is_here("int8")
        assert "int8 products in machine code of our own is not used here: its numbers are off" in caplog.text
    finally:
        native_linears.code_here.cache_clear()
        native_linears._tried.cache_clear()


def test_code_that_does_not_compile_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> bool:
        native.compiled(lambda module: {"there is none": (0, 0)})[""]()
        return True

    with caplog.at_level(logging.WARNING):
        assert not native.tried("this", fails)
    assert "this in machine code of our own is not used here" in caplog.text


# --- attention ---


def wanted_of(
    query_THD: torch.Tensor, key_NJD: torch.Tensor, value_NJE: torch.Tensor, begin: int, window: int | None
) -> torch.Tensor:
    """In fp64: tokens from `begin` on, of a sequence whose keys are all given."""
    shared = query_THD.shape[1] // key_NJD.shape[1]
    key, value = (each.double().repeat_interleave(shared, 1).transpose(0, 1) for each in (key_NJD, value_NJE))
    scores = query_THD.double().transpose(0, 1) @ key.transpose(1, 2) * 0.3
    at, position = torch.arange(key.shape[1]), torch.arange(begin, begin + len(query_THD))[:, None]
    seen = at <= position
    if window is not None:
        seen &= at > position - window
    return (torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ value).transpose(0, 1)


class Blocks:
    """Blocks of fp32 or bf16 with numbers that are none in them, and sequences that are put there in pieces."""

    def __init__(self, heads: int, width: int, value_width: int, dtype: torch.dtype) -> None:
        self.keys = torch.full((40, heads, SIZE, width), float("nan"), dtype=dtype)
        self.values = torch.full((40, heads, SIZE, value_width), float("nan"), dtype=dtype)

    def take(
        self, parts: Sequence[Part], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        rows = Pass(parts, SIZE, query.device).rows(query.shape[1] // key.shape[1], window)
        blocks = held(self.keys, self.values)
        write(blocks, key, value, rows)
        return attend(blocks, query, rows, 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "shared", "widths"), [(2, 1, (32, 32)), (1, 4, (64, 96)), (3, 2, (96, 32))])
@pytest.mark.parametrize("window", [None, 5, 40])
def test_attention_is_that_of_fp64(
    lanes: int, dtype: torch.dtype, heads: int, shared: int, widths: tuple[int, int], window: int | None
) -> None:
    assert Shape(*widths, SIZE, dtype).lanes in (lanes, lanes // 2)
    blocks, tables = Blocks(heads, *widths, dtype), [(7, 3, 30, 1, 9), (0, 12)]
    lengths = (SIZE * 4 + 5, 20)
    query = [torch.randn(n, heads * shared, widths[0]) for n in lengths]
    key, value = ([torch.randn(n, heads, width) for n in lengths] for width in widths)
    done, made = [0, 0], [list[torch.Tensor](), list[torch.Tensor]()]
    for steps in ((3, 1), (40, 0), (1, 1), (25, 18)):
        parts = [
            Part(table=tables[n], begin=done[n], end=done[n] + step, prompt=0) for n, step in enumerate(steps) if step
        ]
        spans = [(n, done[n], done[n] + step) for n, step in enumerate(steps) if step]
        asked, new, kept = (
            torch.cat([each[n][begin:end] for n, begin, end in spans]) for each in (query, key, value)
        )  # fmt: skip
        got = blocks.take(parts, asked, new, kept, window)
        for n, begin, end in spans:
            made[n].append(got[: end - begin])
            got, done[n] = got[end - begin :], end
    for n in (0, 1):
        wanted = wanted_of(query[n], key[n].to(dtype), value[n].to(dtype), 0, window)
        assert float((torch.cat(made[n]) - wanted).abs().max()) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_gets_the_same_bits_alone_in_a_chunk_and_in_a_crowd(lanes: int, dtype: torch.dtype) -> None:
    del lanes
    draw, length = random.Random(5), 70
    query, key, value = (torch.randn(length, heads, 32) for heads in (4, 2, 2))
    whole = None
    for cuts in ((1,) * length, (length,), (7, 33, 1, 29), (64, 6)):
        blocks, at, made = Blocks(2, 32, 32, dtype), 0, []
        table = draw.sample(range(30), 5)
        for step in cuts:
            others = draw.randint(0, 3) if cuts[0] > 1 else 0
            crowd = [Part(table=(31 + n,), begin=0, end=3, prompt=0) for n in range(others)]
            parts = [*crowd, Part(table=table, begin=at, end=at + step, prompt=0)]
            junk = 3 * others
            asked, new, kept = (
                torch.cat([torch.randn(junk, *each.shape[1:]), each[at : at + step]]) for each in (query, key, value)
            )
            made.append(blocks.take(parts, asked, new, kept, None)[junk:])
            at += step
        got = torch.cat(made)
        whole = got if whole is None else whole
        assert torch.equal(got, whole), cuts


def test_threads_share_attention_without_changing_a_bit() -> None:
    query, key, before, made = torch.randn(100, 8, 64), torch.randn(100, 4, 64), torch.get_num_threads(), []
    parts = [Part(table=range(7), begin=0, end=100, prompt=0)]
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(Blocks(4, 64, 64, torch.float32).take(parts, query, key, key, None))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, made[0]) for each in made)


def test_strides_of_any_kind_and_rows_that_fill_up() -> None:
    part, parts = torch.randn(3, 2, 32), [Part(table=(1,), begin=0, end=3, prompt=0)]
    turned = part.transpose(0, 1).contiguous().transpose(0, 1)
    one, other = (Blocks(2, 32, 32, torch.float32).take(parts, each, each, each, None) for each in (part, turned))
    assert torch.equal(one, other)
    blocks = Blocks(2, 32, 32, torch.float32)
    filled = blocks.take(parts, torch.cat([part, torch.full((2, 2, 32), 9.0)]), part, part, None)
    assert torch.equal(filled[:3], one)
    assert not filled[3:].any()


def test_widths_that_no_vector_fits_are_left_to_torch() -> None:
    assert not native_attention.is_here(Shape(30, 32, 16, torch.float32))
    assert not native_attention.is_here(Shape(32, 32, 6, torch.float32))
    assert not native_attention.is_here(Shape(64, 64, 16, torch.float16))
    assert native_attention.is_here(Shape(8, 4, 4, torch.float32))
    assert not native_attention.is_here(Shape(8, 4, 4, torch.bfloat16))
