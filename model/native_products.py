"""The kernels of model/native_linears.py and model/norms.py: rows made ready, weights laid out, sums; norms.

Rules: nothing is computed here, only written down. A tile is some rows times BLOCKS vectors of outputs, whose sums stay
in registers while the inputs go by. The int8 dot product takes unsigned activations, so ZERO is added to them and taken
out of each sum beforehand.
Legend: as in model/native_linears.py.
Source: Intel, "Instruction Set Extensions": VPDPBUSD, VDPBF16PS.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final, NamedTuple

from llvmlite import ir

from model import native
from model.native_code import F32, I8, I16, I32, I64, POINTER, VOID, BFloat, Code, Value, kernel, whole
from model.native_linears import BLOCKS
from model.quantized import LARGEST, SCALE_MIN

TILES: Final = {16: (6, 4, 2, 1), 8: (2, 1)}  # rows at once, by lanes: as many sums as there are registers for
LINE: Final = 16  # words in a line of the cache
ZERO: Final = 128  # of the unsigned activations


def build(module: Any, *, kinds: Collection[str]) -> dict[str, tuple[int, int]]:
    """Write the kernels of these kinds into a module; how many pointers and numbers each takes."""
    lanes = native.lanes()
    bodies: dict[str, tuple[int, int, Callable[..., None]]] = {
        "interleave": (2, 2, _interleave),
        "bf16_rows": (2, 2, _bf16_rows),
        "int8_rows": (3, 2, _int8_rows),
        "int8_weights": (4, 2, _int8_weights),
        "rms_norm": (4, 1, _rms_norm),
    }
    sums = {"fp32_sums": (4, 3, _fp32_sums), "bf16_sums": (4, 3, _bf16_sums), "int8_sums": (7, 3, _int8_sums)}
    bodies |= {name: each for name, each in sums.items() if name.removesuffix("_sums") in kinds}
    for name, (pointers, numbers, body) in bodies.items():
        kernel(module, name, lanes=lanes, pointers=pointers, numbers=numbers, body=body)
    takes = {name: (pointers, numbers) for name, (pointers, numbers, _) in bodies.items()}
    return takes | {f"{kind}_linear": _linear(module, kind, lanes) for kind in ("bf16", "int8") if kind in kinds}


def _linear(module: Any, kind: str, lanes: int) -> tuple[int, int]:
    """Rows made ready in `room`, of int8 their scales behind them, and then their sums, in one call. total: U."""
    pointers, numbers = (7, 4) if kind == "int8" else (5, 4)
    types = [POINTER] * pointers + [I64] * (numbers + 2)
    code = Code(ir.Function(module, ir.FunctionType(VOID, types), f"{kind}_linear"), lanes)
    x, room, words, bias, made, *more, rows, inputs, width, outputs, units, threads = code.function.args
    call, functions = code.builder.call, module.globals
    if kind == "int8":
        scales = code.place(room, code.times(rows, width), I32)
        call(functions["int8_rows"], [x, room, scales, inputs, width, rows, threads])
        given = [room, scales, words, bias, made, *more]
    else:
        call(functions["bf16_rows"], [x, room, inputs, width, rows, threads])
        given = [room, words, bias, made]
    call(functions[f"{kind}_sums"], [*given, rows, width, outputs, units, threads])
    code.end()
    return pointers, numbers


def _interleave(code: Code, args: tuple[Value, ...]) -> None:
    """int32 (rows, Q) -> (blocks, Q, lanes), zeros for rows that there are not. total: blocks."""
    source, to, rows, words, begin, end, _ = args
    builder = code.builder
    with code.loop(begin, end) as block:
        there = builder.sub(rows, code.times(block, code.lanes))
        with code.loop(0, words, LINE) as first:  # a line of each row, read once: rows may share their place in a cache
            last = code.least(code.add(first, LINE), words)
            with code.loop(0, code.lanes) as lane:
                has = builder.icmp_signed("<", lane, there)
                row = builder.select(has, code.add(code.times(block, code.lanes), lane), whole(0))
                with code.loop(first, last) as word:
                    value = code.load(source, code.add(code.times(row, words), word), I32)
                    place = code.add(code.times(code.add(code.times(block, words), word), code.lanes), lane)
                    code.store(builder.select(has, value, I32(0)), to, place, I32)


def _bf16_rows(code: Code, args: tuple[Value, ...]) -> None:
    """fp32 (M, K) -> bf16 (M, 2 Q). total: M."""
    x, room, inputs, words, begin, end, _ = args
    with code.loop(begin, end) as row:
        source, to = code.times(row, inputs), code.times(row, words, 2)
        even = code.times(code.builder.sdiv(inputs, whole(code.lanes)), code.lanes)
        with code.loop(0, even, code.lanes) as at:
            some = code.half(code.load(x, code.add(source, at), code.floats, F32))
            code.store(some, room, code.add(to, at), I16)
        with code.loop(even, inputs) as at:
            some = code.half(code.each(code.load(x, code.add(source, at), F32)))
            code.store(code.builder.extract_element(some, I32(0)), room, code.add(to, at), I16)
        with code.loop(inputs, code.times(words, 2)) as at:
            code.store(I16(0), room, code.add(to, at), I16)


def _largest(code: Code, x: Value, source: Value, inputs: Value) -> Value:
    """Of a row's numbers without their signs; no number if one is none."""
    even = code.times(code.builder.sdiv(inputs, whole(code.lanes)), code.lanes)
    most = code.variable(code.floats, code.constant(0.0))
    with code.loop(0, even, code.lanes) as at:
        value = code.load(x, code.add(source, at), code.floats, F32)
        most.set(code.maximum(most.get(), code.size(value)))
    with code.loop(even, inputs) as at:
        value = code.each(code.load(x, code.add(source, at), F32))
        most.set(code.maximum(most.get(), code.size(value)))
    return code.over(most.get(), code.maximum)


def _rounded_row(code: Code, x: Value, source: Value, inputs: Value, scale: Value) -> Any:
    """A function that gives whole numbers of -127 to 127 at a place of the row, of a vector or of one number."""

    def at(place: Value, *, is_one: bool) -> Value:
        if is_one:
            value = code.each(code.load(x, code.add(source, place), F32))
        else:
            value = code.load(x, code.add(source, place), code.floats, F32)
        made = code.even(code.builder.fdiv(value, code.each(scale)))
        made = code.greater(made, code.constant(-LARGEST))  # and what is no number becomes one: its scale is none
        made = code.builder.select(
            code.builder.fcmp_ordered("<", made, code.constant(LARGEST)), made, code.constant(LARGEST)
        )
        return code.builder.fptosi(made, code.wholes)

    return at


def _write_row(code: Code, at: Any, to: Value, room: Value, sizes: tuple[Value, Value], add: int) -> Value:
    """Put a row's whole numbers, `add` more, as bytes; behind them zeros, `add` more. Their sum, without `add`."""
    inputs, width = sizes
    bytes_ = ir.VectorType(I8, code.lanes)
    even = code.times(code.builder.sdiv(inputs, whole(code.lanes)), code.lanes)
    sums = code.variable(code.wholes, code.same(0))
    with code.loop(0, even, code.lanes) as place:
        made = at(place, is_one=False)
        sums.set(code.builder.add(sums.get(), made))
        code.store(
            code.builder.trunc(code.builder.add(made, code.same(add)), bytes_), room, code.add(to, place), I8
        )  # fmt: skip
    total = code.variable(I32, code.over(sums.get(), code.builder.add))
    with code.loop(even, inputs) as place:
        made = code.builder.extract_element(at(place, is_one=True), I32(0))
        total.set(code.builder.add(total.get(), made))
        code.store(code.builder.trunc(code.builder.add(made, I32(add)), I8), room, code.add(to, place), I8)
    with code.loop(inputs, width) as place:
        code.store(code.builder.trunc(I32(add), I8), room, code.add(to, place), I8)
    return total.get()


def _int8_rows(code: Code, args: tuple[Value, ...]) -> None:
    """fp32 (M, K) -> unsigned bytes (M, 4 Q), and a scale for each row. total: M."""
    x, room, scales, inputs, words, begin, end, _ = args
    with code.loop(begin, end) as row:
        source, width = code.times(row, inputs), code.times(words, 4)
        share, least = code.constant(1.0 / LARGEST), code.constant(SCALE_MIN)
        scale = code.fused(code.each(_largest(code, x, source, inputs)), share, least)
        scale = code.builder.extract_element(scale, I32(0))
        code.store(scale, scales, row, F32)
        at = _rounded_row(code, x, source, inputs, scale)
        _write_row(code, at, code.times(row, width), room, (inputs, width), ZERO)


def _int8_weights(code: Code, args: tuple[Value, ...]) -> None:
    """fp32 (rows, K) -> bytes (rows, 4 Q), a scale for each, and where its sums start. total: rows."""
    weight, room, scales, starts, inputs, words, begin, end, _ = args
    with code.loop(begin, end) as row:
        source, width = code.times(row, inputs), code.times(words, 4)
        most = code.maximum(code.each(_largest(code, weight, source, inputs)), code.constant(SCALE_MIN))
        scale = code.builder.extract_element(code.builder.fdiv(most, code.constant(LARGEST)), I32(0))
        code.store(scale, scales, row, F32)
        at = _rounded_row(code, weight, source, inputs, scale)
        total = _write_row(code, at, code.times(row, width), room, (inputs, width), 0)
        code.store(code.builder.mul(total, I32(-ZERO)), starts, row, I32)


def _rms_norm(code: Code, args: tuple[Value, ...]) -> None:
    """fp32 (M, K), K a whole number of vectors -> x / sqrt(mean of squares + epsilon) * weight. total: M."""
    x, weight, epsilon, made, inputs, begin, end, _ = args
    builder = code.builder
    count = code.each(builder.sitofp(inputs, F32))
    with code.loop(begin, end) as row:
        source = code.times(row, inputs)
        squares = code.variable(code.floats, code.constant(0.0))
        with code.loop(0, inputs, code.lanes) as at:
            value = code.load(x, code.add(source, at), code.floats, F32)
            squares.set(code.fused(value, value, squares.get()))
        mean = builder.fdiv(code.each(code.over(squares.get(), builder.fadd)), count)
        root = code.root(builder.fadd(mean, code.each(code.load(epsilon, 0, F32))))
        share = builder.fdiv(code.constant(1.0), root)
        with code.loop(0, inputs, code.lanes) as at:
            value = builder.fmul(code.load(x, code.add(source, at), code.floats, F32), share)
            value = builder.fmul(value, code.load(weight, at, code.floats, F32))
            code.store(value, made, code.add(source, at), F32)


class _How(NamedTuple):
    """kind: of a vector of sums; start: of the first output of one; dot: of sums, one word in all lanes, and weights;
    ended: of sums, row and first output."""

    kind: Any
    start: Callable[[Value], Value]
    dot: Callable[[Value, Value, Value], Value]
    ended: Callable[[Value, Value, Value], Value]


class _Product(NamedTuple):
    """What is to be summed up. room: the rows, as words; begin, end: units."""

    room: Value
    words: Value
    bias: Value
    made: Value
    rows: Value
    width: Value
    outputs: Value
    begin: Value
    end: Value


def _floats(code: Code, dot: Callable[[Value, Value, Value], Value]) -> _How:
    return _How(code.floats, lambda _: code.constant(0.0), dot, lambda sums, _row, _output: sums)


def _int8_sums(code: Code, args: tuple[Value, ...]) -> None:
    """total: U."""
    room, scales, words, bias, made, weight_scales, starts, rows, width, outputs, begin, end, _ = args
    builder, bytes_ = code.builder, ir.VectorType(I8, 4 * code.lanes)

    def start(output: Value) -> Value:
        return code.load(starts, output, code.wholes, I32)

    def dot(sums: Value, word: Value, weights: Value) -> Value:
        given = builder.bitcast(word, bytes_), builder.bitcast(weights, bytes_)
        return code.call(f"llvm.x86.avx512.vpdpbusd.{32 * code.lanes}", code.wholes, sums, *given)

    def ended(sums: Value, row: Value, output: Value) -> Value:
        of_output = code.load(weight_scales, output, code.floats, F32)
        value = builder.fmul(builder.sitofp(sums, code.floats), of_output)
        return builder.fmul(value, code.each(code.load(scales, row, F32)))

    how = _How(code.wholes, start, dot, ended)
    _sums(code, _Product(room, words, bias, made, rows, width, outputs, begin, end), how)


def _fp32_sums(code: Code, args: tuple[Value, ...]) -> None:
    """total: U."""

    def dot(sums: Value, word: Value, weights: Value) -> Value:
        one, other = (code.builder.bitcast(each, code.floats) for each in (word, weights))
        return code.fused(one, other, sums)

    _sums(code, _Product._make(args[:-1]), _floats(code, dot))


def _bf16_sums(code: Code, args: tuple[Value, ...]) -> None:
    """total: U."""
    halves = ir.VectorType(BFloat(), 2 * code.lanes)

    def dot(sums: Value, word: Value, weights: Value) -> Value:
        given = [code.builder.bitcast(each, halves) for each in (word, weights)]
        return code.call(f"llvm.x86.avx512bf16.dpbf16ps.{32 * code.lanes}", code.floats, sums, *given)

    _sums(code, _Product._make(args[:-1]), _floats(code, dot))


def _sums(code: Code, product: _Product, how: _How) -> None:
    """Every row times the units from begin to end. One row alone takes two units at a time: memory is read faster in
    twice as many places."""
    builder, (largest, *smaller) = code.builder, TILES[code.lanes]
    with builder.if_else(builder.icmp_signed("==", product.rows, whole(1))) as (one, more):
        with one:
            with code.loop(product.begin, code.add(product.end, -1), 2) as unit:
                _tile(code, product, how, _Tile(unit, whole(0), 1, 2 * BLOCKS))
            units = builder.sub(product.end, product.begin)
            with builder.if_then(builder.icmp_signed("==", builder.and_(units, whole(1)), whole(1))):
                _tile(code, product, how, _Tile(code.add(product.end, -1), whole(0), 1, BLOCKS))
        with more, code.loop(product.begin, product.end) as unit:
            done = code.variable(I64, whole(0))
            with code.loop(0, builder.sdiv(product.rows, whole(largest))):
                _tile(code, product, how, _Tile(unit, done.get(), largest, BLOCKS))
                done.set(code.add(done.get(), largest))
            for count in smaller:
                left = builder.sub(product.rows, done.get())
                with builder.if_then(builder.icmp_signed(">=", left, whole(count))):
                    _tile(code, product, how, _Tile(unit, done.get(), count, BLOCKS))
                    done.set(code.add(done.get(), count))


class _Tile(NamedTuple):
    """`rows` rows from the first on, times `blocks` vectors of outputs from a unit's first on."""

    unit: Value
    first: Value
    rows: int
    blocks: int


def _tile(code: Code, product: _Product, how: _How, tile: _Tile) -> None:
    unit, first, count, blocks = tile
    builder, lanes, width = code.builder, code.lanes, product.width
    begins = [code.times(code.add(code.times(unit, BLOCKS), block), lanes) for block in range(blocks)]
    sums = [[code.variable(how.kind, how.start(begin)) for begin in begins] for _ in range(count)]
    with code.loop(0, width) as word:
        beside = code.times(word, lanes)
        weights = [code.load(product.words, code.add(code.times(begin, width), beside), code.wholes, I32)
                   for begin in begins]  # fmt: skip
        for row in range(count):
            place = code.add(code.times(code.add(first, row), width), word)
            given = code.each(code.load(product.room, place, I32))
            for block in range(blocks):
                sums[row][block].set(how.dot(sums[row][block].get(), given, weights[block]))
    has_bias = builder.icmp_unsigned("!=", builder.ptrtoint(product.bias, I64), whole(0))
    for block, begin in enumerate(begins):
        left = builder.sub(product.outputs, begin)
        with builder.if_then(builder.icmp_signed(">", left, whole(0))):
            for row in range(count):
                number = code.add(first, row)
                value = code.variable(code.floats, how.ended(sums[row][block].get(), number, begin))
                with builder.if_then(has_bias):
                    value.set(builder.fadd(value.get(), code.load_some(product.bias, begin, left)))
                code.store_some(value.get(), product.made, code.add(code.times(number, product.outputs), begin), left)
