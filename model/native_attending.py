"""The kernels of model/native_attention.py: keys and values put in their blocks, and what each token gets.

Rules: nothing is computed here, only written down.
Legend: as in model/native_attention.py; N of `longest` tokens.
Source: as there.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from model.native_code import F32, I16, I32, I64, INFINITY, VOID, Code, Value, kernel, whole

LINE: Final = 16  # numbers of 32 bits in a line of the cache


class Sizes(NamedTuple):
    """What the kernels are written for. halves: blocks hold bf16, else fp32."""

    width: int
    value_width: int
    block_tokens: int
    lanes: int
    halves: bool

    @property
    def step(self) -> int:
        """Numbers that a vector of a block has."""
        return self.lanes * (2 if self.halves else 1)


def build(module: Any, *, sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Write them into a module; how many pointers and numbers each takes."""
    takes = {"write": (5, 5), "attend": (9, 7)}
    for name, body in (("write", _write), ("attend", _attend)):
        pointers, numbers = takes[name]

        def written(code: Code, args: tuple[Value, ...], body: Any = body) -> None:
            body(code, args, sizes)

        kernel(module, name, lanes=sizes.lanes, pointers=pointers, numbers=numbers, body=written)
    return takes


def _write(code: Code, args: tuple[Value, ...], sizes: Sizes) -> None:
    """Strides: of tokens and of heads, in numbers. total: T."""
    key, value, keys, values, slots, heads, key_token, key_head, value_token, value_head, begin, end, _ = args
    size = whole(sizes.block_tokens)
    with code.loop(begin, end) as token:
        slot = code.load(slots, token, I64)
        block, at = code.builder.sdiv(slot, size), code.builder.srem(slot, size)
        with code.loop(0, heads) as head:
            place = code.add(code.times(code.add(code.times(block, heads), head), size), at)
            for source, strides, to, width in (
                (key, (key_token, key_head), keys, sizes.width),
                (value, (value_token, value_head), values, sizes.value_width),
            ):
                begins = code.add(code.times(token, strides[0]), code.times(head, strides[1]))
                for along in range(0, width, code.lanes):
                    some, there = code.load(source, code.add(begins, along), code.floats, F32), code.times(place, width)
                    if sizes.halves:
                        code.store(code.half(some), to, code.add(there, along), I16)
                    else:
                        code.store(some, to, code.add(there, along), F32)


class _Group(NamedTuple):
    """Rows that go over the same blocks, for one key head. room: of the thread; first, last: blocks."""

    head: Value
    row: Value
    lines: Value  # rows * G
    table: Value
    first: Value
    last: Value


class _Given(NamedTuple):
    query: Value
    keys: Value
    values: Value
    tables: Value
    spans: Value
    groups: Value
    made: Value
    room: Value
    scale: Value
    query_token: Value
    query_head: Value
    shared: Value
    heads: Value
    count: Value
    longest: Value
    most: Value


def _attend(code: Code, args: tuple[Value, ...], sizes: Sizes) -> None:
    """most: numbers of `room` that a thread has. total: J * groups; a key head's come one after the other."""
    *pointers, begin, end, thread = args
    given = _Given._make(pointers)
    builder, size = code.builder, sizes.block_tokens
    given = given._replace(room=code.place(given.room, code.times(thread, given.most), F32))
    with code.loop(begin, end) as task:
        head, number = builder.sdiv(task, given.count), code.times(builder.srem(task, given.count), 3)
        row, rows, table = (code.load(given.groups, code.add(number, at), I64) for at in range(3))
        first, _ = _span(code, given, row)
        _, stop = _span(code, given, code.add(row, rows, -1))
        group = _Group(
            head, row, code.times(rows, given.shared), table, builder.sdiv(first, whole(size)),
            code.parts(stop, size),
        )  # fmt: skip
        with code.loop(group.first, group.last) as block:
            _fetch(code, given, group, sizes, block)
            with code.loop(0, group.lines) as line:
                _score(code, given, group, sizes, (block, line))
        with code.loop(0, group.lines) as line:
            _weigh(code, given, group, sizes, line)
        with code.loop(group.first, group.last) as block:
            with code.loop(0, group.lines) as line:
                _gather(code, given, group, sizes, (block, line))
        if sizes.halves:
            with code.loop(0, group.lines) as line:
                _in_order(code, given, group, sizes, line)


def _fetch(code: Code, given: _Given, group: _Group, sizes: Sizes, block: Value) -> None:
    """Ask for the keys of the next block, and for this one's values, while this one's keys are met."""
    after = code.least(code.add(block, 1), code.add(group.last, -1))
    for source, number, width in ((given.keys, after, sizes.width), (given.values, block, sizes.value_width)):
        begin = _block(code, given, group, number, sizes.block_tokens * width)
        with code.loop(0, sizes.block_tokens * width, LINE * (2 if sizes.halves else 1)) as at:
            place = code.place(source, code.add(begin, at), I16 if sizes.halves else F32)
            code.call("llvm.prefetch.p0", VOID, place, I32(0), I32(2), I32(1))


def _held(code: Code, source: Value, at: Value, sizes: Sizes) -> list[Value]:
    """`step` numbers of a block, as fp32: of bf16 those at even places, and those at odd ones."""
    if not sizes.halves:
        return [code.load(source, at, code.floats, F32)]
    pairs = code.load(source, code.builder.sdiv(at, whole(2)), code.wholes, I32)
    each = code.builder.shl(pairs, code.same(16)), code.builder.and_(pairs, code.same(0xFFFF0000))
    return [code.builder.bitcast(half, code.floats) for half in each]


def _asked(code: Code, given: _Given, query: Value, sizes: Sizes) -> list[Value]:
    """A query, scaled, in the order in which `_held` gives a key."""
    scale = code.each(code.load(given.scale, 0, F32))
    parts = [
        code.builder.fmul(code.load(given.query, code.add(query, along), code.floats, F32), scale)
        for along in range(0, sizes.width, code.lanes)
    ]
    if not sizes.halves:
        return parts
    evens, odds = [2 * lane for lane in range(code.lanes)], [2 * lane + 1 for lane in range(code.lanes)]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [code.shuffled(*pair, places) for pair in pairs for places in (evens, odds)]


def _span(code: Code, given: _Given, row: Value) -> tuple[Value, Value]:
    """First token that a row sees, and the end."""
    return code.load(given.spans, code.times(row, 2), I64), code.load(given.spans, code.add(code.times(row, 2), 1), I64)


def _line(code: Code, given: _Given, group: _Group, line: Value) -> tuple[Value, Value, Value]:
    """Row, query head, and where its scores begin."""
    row = code.add(group.row, code.builder.sdiv(line, given.shared))
    head = code.add(code.times(group.head, given.shared), code.builder.srem(line, given.shared))
    return row, head, code.times(line, given.longest)


def _block(code: Code, given: _Given, group: _Group, block: Value, numbers: int) -> Value:
    """Where a block of the group's table begins, for its head, if a head has so many numbers."""
    number = code.load(given.tables, code.add(group.table, block), I64)
    return code.times(code.add(code.times(number, given.heads), group.head), numbers)


def _score(code: Code, given: _Given, group: _Group, sizes: Sizes, at: tuple[Value, Value]) -> None:
    """Of one line and block, if the row sees any of it."""
    block, line = at
    builder, size, lanes = code.builder, sizes.block_tokens, code.lanes
    row, head, scores = _line(code, given, group, line)
    first, stop = _span(code, given, row)
    begin = code.times(block, size)
    with builder.if_then(builder.icmp_signed("<", begin, stop)):
        query = code.add(code.times(row, given.query_token), code.times(head, given.query_head))
        parts = _asked(code, given, query, sizes)
        keys = _block(code, given, group, block, size * sizes.width)
        for token in range(0, size, lanes):
            dots = []
            for lane in range(lanes):
                dot = code.constant(0.0)
                begins = code.add(keys, (token + lane) * sizes.width)
                key = [each for along in range(0, sizes.width, sizes.step)
                       for each in _held(code, given.keys, code.add(begins, along), sizes)]  # fmt: skip
                for part, each in zip(parts, key, strict=True):
                    dot = code.fused(part, each, dot)
                dots.append(dot)
            place = code.add(begin, token)
            position = builder.add(code.each(builder.trunc(place, I32)), code.numbered())
            seen = builder.and_(
                builder.icmp_signed("<", position, code.each(builder.trunc(stop, I32))),
                builder.icmp_signed(">=", position, code.each(builder.trunc(first, I32))),
            )
            made = builder.select(seen, code.sums(dots), code.constant(-INFINITY))
            code.store(made, given.room, code.add(scores, place), F32)


def _weigh(code: Code, given: _Given, group: _Group, sizes: Sizes, line: Value) -> None:
    """Scores -> weights, and zeros where the values are to be added up."""
    builder, size, lanes = code.builder, sizes.block_tokens, code.lanes
    row, head, scores = _line(code, given, group, line)
    first, stop = _span(code, given, row)
    begin, end = (code.times(each, size) for each in (builder.sdiv(first, whole(size)), code.parts(stop, size)))
    most = code.variable(code.floats, code.constant(-INFINITY))
    with code.loop(begin, end, lanes) as token:
        most.set(code.greater(most.get(), code.load(given.room, code.add(scores, token), code.floats, F32)))
    largest = code.each(code.over(most.get(), code.greater))
    total = code.variable(code.floats, code.constant(0.0))
    with code.loop(begin, end, lanes) as token:
        place = code.add(scores, token)
        weight = code.exp(builder.fsub(code.load(given.room, place, code.floats, F32), largest))
        code.store(weight, given.room, place, F32)
        total.set(builder.fadd(total.get(), weight))
    share = builder.fdiv(code.constant(1.0), code.each(code.over(total.get(), builder.fadd)))
    with code.loop(begin, end, lanes) as token:
        place = code.add(scores, token)
        code.store(builder.fmul(code.load(given.room, place, code.floats, F32), share), given.room, place, F32)
    made = _made(code, given, sizes, row, head)
    for along in range(0, sizes.value_width, lanes):
        code.store(code.constant(0.0), given.made, code.add(made, along), F32)


def _gather(code: Code, given: _Given, group: _Group, sizes: Sizes, at: tuple[Value, Value]) -> None:
    """Add up the values of one block, by their weights."""
    block, line = at
    builder, size, lanes = code.builder, sizes.block_tokens, code.lanes
    row, head, scores = _line(code, given, group, line)
    first, stop = _span(code, given, row)
    begin = code.times(block, size)
    made, values = _made(code, given, sizes, row, head), _block(code, given, group, block, size * sizes.value_width)
    with builder.if_then(builder.icmp_signed("<", begin, stop)):
        sums = [
            code.variable(code.floats, code.load(given.made, code.add(made, along), code.floats, F32))
            for along in range(0, sizes.value_width, lanes)
        ]
        least = code.least(builder.sub(stop, begin), whole(size))
        since = builder.sub(first, begin)
        since = builder.select(builder.icmp_signed(">", since, whole(0)), since, whole(0))
        with code.loop(since, least) as token:
            weight = code.each(code.load(given.room, code.add(scores, begin, token), F32))
            begins = code.add(values, code.times(token, sizes.value_width))
            value = [each for along in range(0, sizes.value_width, sizes.step)
                     for each in _held(code, given.values, code.add(begins, along), sizes)]  # fmt: skip
            for total, each in zip(sums, value, strict=True):
                total.set(code.fused(weight, each, total.get()))
        for number, total in enumerate(sums):
            code.store(total.get(), given.made, code.add(made, number * lanes), F32)


def _in_order(code: Code, given: _Given, group: _Group, sizes: Sizes, line: Value) -> None:
    """Put what a line gets, even places and odd ones apart, in its order."""
    row, head, _ = _line(code, given, group, line)
    begin, lanes = _made(code, given, sizes, row, head), code.lanes
    places = [lane // 2 + lane % 2 * lanes for lane in range(2 * lanes)]
    for along in range(0, sizes.value_width, 2 * lanes):
        evens, odds = (
            code.load(given.made, code.add(begin, along + more), code.floats, F32) for more in (0, lanes)
        )  # fmt: skip
        for more in (0, lanes):
            code.store(
                code.shuffled(evens, odds, places[more : more + lanes]), given.made, code.add(begin, along + more), F32
            )


def _made(code: Code, given: _Given, sizes: Sizes, row: Value, head: Value) -> Value:
    """Where what a row gets for a head begins."""
    heads = code.times(given.heads, given.shared)
    return code.times(code.add(code.times(row, heads), head), sizes.value_width)
