"""Machine code written by Python: loops, vectors and what a kernel needs of them, over llvmlite's builder.

Rules: no kernel is here, and nothing is compiled. A vector has `lanes` numbers of 32 bits. Every sum has an order that
does not depend on the machine's caches or threads: no flag lets LLVM reorder or fuse what was not written so.
Source: llvmlite, "IR layer"; LLVM language reference; Cephes, `expf` (the polynomial of `exp`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from llvmlite import ir

F32: Final = ir.FloatType()
I8: Final = ir.IntType(8)
I16: Final = ir.IntType(16)
I32: Final = ir.IntType(32)
I64: Final = ir.IntType(64)
POINTER: Final = ir.PointerType()
VOID: Final = ir.VoidType()
INFINITY: Final = float("inf")
BYTES: Final[dict[Any, int]] = {F32: 4, I8: 1, I16: 2, I32: 4, I64: 8}
LOG2_E: Final = 1.44269504088896341
LN_2_HIGH, LN_2_LOW = 0.693359375, -2.12194440e-4
EXP_LEAST: Final = -87.0  # below it e^x is no normal number
EXP_TERMS: Final = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)

Value = Any  # llvmlite's values have no types
Body = Callable[["Code", tuple[Value, ...]], None]


class BFloat(ir.Type):  # type: ignore[misc]  # llvmlite has no types
    """The number type bf16, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


class Variable:
    """A place that holds a value; LLVM makes registers of it."""

    def __init__(self, builder: ir.IRBuilder, place: Value, kind: Any) -> None:
        self._builder, self._place, self._kind = builder, place, kind

    def get(self) -> Value:
        """What it holds now."""
        return self._builder.load(self._place, typ=self._kind)

    def set(self, value: Value) -> None:
        """Hold this from now on."""
        self._builder.store(value, self._place)


class Code:
    """The body of one function, while it is written."""

    def __init__(self, function: ir.Function, lanes: int) -> None:
        """function: without blocks yet."""
        self.function, self.lanes = function, lanes
        self.floats, self.wholes = ir.VectorType(F32, lanes), ir.VectorType(I32, lanes)
        self._places = ir.IRBuilder(function.append_basic_block())
        self._first = function.append_basic_block()
        self.builder = ir.IRBuilder(self._first)

    def end(self) -> None:
        """The function returns here."""
        self.builder.ret_void()
        self._places.branch(self._first)

    # --- flow ---

    def variable(self, kind: Any, value: Value) -> Variable:
        """A new one, holding the value."""
        made = Variable(self.builder, self._places.alloca(kind), kind)
        made.set(value)
        return made

    @contextmanager
    def loop(self, begin: Value, end: Value, step: int = 1) -> Iterator[Value]:
        """The block is done for each number from begin on that is less than end."""
        at = self.variable(I64, whole(begin))
        head, body, after = (self.function.append_basic_block() for _ in range(3))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        self.builder.cbranch(self.builder.icmp_signed("<", at.get(), whole(end)), body, after)
        self.builder.position_at_end(body)
        yield at.get()
        at.set(self.builder.add(at.get(), I64(step)))
        self.builder.branch(head)
        self.builder.position_at_end(after)

    # --- whole numbers ---

    def add(self, *terms: Value) -> Value:
        """Their sum, in 64 bits."""
        made = whole(terms[0])
        for term in terms[1:]:
            made = self.builder.add(made, whole(term))
        return made

    def times(self, *factors: Value) -> Value:
        """Their product, in 64 bits."""
        made = whole(factors[0])
        for factor in factors[1:]:
            made = self.builder.mul(made, whole(factor))
        return made

    def least(self, one: Value, other: Value) -> Value:
        """The lesser, in 64 bits."""
        return self.builder.select(self.builder.icmp_signed("<", one, other), one, other)

    def parts(self, number: Value, size: Value) -> Value:
        """number / size, up."""
        return self.builder.sdiv(self.add(number, size, -1), whole(size))

    # --- memory: a place is a number of elements of a kind after a pointer ---

    def load(self, pointer: Value, at: Value, kind: Any, element: Any = None) -> Value:
        """A value of a kind at a place of `element`s (the kind itself, if there is none)."""
        element = element or kind
        made = self.builder.load(self.place(pointer, at, element), typ=kind)
        made.align = BYTES[element]
        return made

    def store(self, value: Value, pointer: Value, at: Value, element: Any) -> None:
        """Put a value at a place."""
        self.builder.store(value, self.place(pointer, at, element)).align = BYTES[element]

    def load_some(self, pointer: Value, at: Value, left: Value) -> Value:
        """A vector of which the first `left` numbers are at a place, and the rest are 0."""
        kept = self.builder.icmp_signed("<", self.numbered(), self.each(self.builder.trunc(left, I32)))
        place, width = self.place(pointer, at, F32), I32(BYTES[F32])
        return self.call(f"llvm.masked.load.v{self.lanes}f32.p0", self.floats, place, width, kept, self.constant(0.0))

    def store_some(self, value: Value, pointer: Value, at: Value, left: Value) -> None:
        """Put the first `left` numbers of a vector at a place."""
        kept = self.builder.icmp_signed("<", self.numbered(), self.each(self.builder.trunc(left, I32)))
        place, width = self.place(pointer, at, F32), I32(BYTES[F32])
        self.call(f"llvm.masked.store.v{self.lanes}f32.p0", VOID, value, place, width, kept)

    def place(self, pointer: Value, at: Value, element: Any) -> Value:
        """A pointer to a place."""
        return self.builder.gep(pointer, [whole(at)], source_etype=element)

    # --- vectors ---

    def constant(self, number: float) -> Value:
        """The number, in each lane."""
        return ir.Constant(self.floats, [number] * self.lanes)

    def same(self, number: int) -> Value:
        """A whole number, in each lane."""
        return ir.Constant(self.wholes, [number] * self.lanes)

    def numbered(self) -> Value:
        """0, 1, 2, ..."""
        return ir.Constant(self.wholes, list(range(self.lanes)))

    def each(self, value: Value) -> Value:
        """The value, in each lane."""
        kind = ir.VectorType(value.type, self.lanes)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
        return self.builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), self.same(0))

    def fused(self, one: Value, other: Value, more: Value) -> Value:
        """one * other + more, rounded once."""
        return self.call(f"llvm.fma.v{self.lanes}f32", self.floats, one, other, more)

    def half(self, value: Value) -> Value:
        """Numbers as bf16, in 16 bits: the nearest, the even one of two."""
        builder = self.builder
        bits = builder.bitcast(value, self.wholes)
        odd = builder.and_(builder.lshr(bits, self.same(16)), self.same(1))
        made = builder.lshr(builder.add(builder.add(bits, odd), self.same(0x7FFF)), self.same(16))
        made = builder.select(builder.fcmp_unordered("uno", value, value), self.same(0x7FC0), made)
        return builder.trunc(made, ir.VectorType(I16, self.lanes))

    def greater(self, one: Value, other: Value) -> Value:
        """The greater of each lane; `other` where one of both is no number."""
        return self.builder.select(self.builder.fcmp_ordered(">", one, other), one, other)

    def maximum(self, one: Value, other: Value) -> Value:
        """The greater of each lane; no number where one of both is none."""
        return self.call(f"llvm.maximum.v{self.lanes}f32", self.floats, one, other)

    def size(self, value: Value) -> Value:
        """Without its sign."""
        return self.call(f"llvm.fabs.v{self.lanes}f32", self.floats, value)

    def root(self, value: Value) -> Value:
        """The square root of each lane."""
        return self.call(f"llvm.sqrt.v{self.lanes}f32", self.floats, value)

    def even(self, value: Value) -> Value:
        """The nearest whole number, the even one of two."""
        return self.call(f"llvm.roundeven.v{self.lanes}f32", self.floats, value)

    def over(self, value: Value, join: Callable[[Value, Value], Value]) -> Value:
        """All lanes of a vector joined to one number, in halves: 0 with lanes/2, and so on."""
        half = self.lanes // 2
        while half:
            value = join(value, self.shuffled(value, value, [(lane + half) % self.lanes for lane in range(self.lanes)]))
            half //= 2
        return self.builder.extract_element(value, I32(0))

    def sums(self, vectors: Sequence[Value]) -> Value:
        """`lanes` vectors -> one whose lane t is the sum of vector t, added up in halves."""
        assert len(vectors) == self.lanes, f"{len(vectors)} vectors, wanted {self.lanes}"
        width = self.lanes
        while len(vectors) > 1:
            begins = [source * self.lanes + at for source in (0, 1) for at in range(0, self.lanes, width)]
            first = [begin + at for begin in begins for at in range(width // 2)]
            second = [at + width // 2 for at in first]
            vectors = [
                self.builder.fadd(self.shuffled(one, other, first), self.shuffled(one, other, second))
                for one, other in zip(vectors[::2], vectors[1::2], strict=True)
            ]
            width //= 2
        return vectors[0]

    def exp(self, value: Value) -> Value:
        """e^value of numbers that are not above 0, to 2 units of the last place; 0 of minus infinity."""
        builder = self.builder
        bounded = self.greater(value, self.constant(EXP_LEAST))
        twos = self.even(builder.fmul(bounded, self.constant(LOG2_E)))
        rest = self.fused(twos, self.constant(-LN_2_HIGH), bounded)
        rest = self.fused(twos, self.constant(-LN_2_LOW), rest)
        terms = self.constant(EXP_TERMS[0])
        for term in EXP_TERMS[1:]:
            terms = self.fused(terms, rest, self.constant(term))
        made = self.fused(builder.fmul(terms, rest), rest, builder.fadd(rest, self.constant(1.0)))
        shift = builder.shl(builder.fptosi(twos, self.wholes), self.same(23))
        made = builder.bitcast(builder.add(builder.bitcast(made, self.wholes), shift), self.floats)
        nothing = builder.fcmp_ordered("==", value, self.constant(-INFINITY))
        return builder.select(nothing, self.constant(0.0), made)

    def shuffled(self, one: Value, other: Value, lanes: list[int]) -> Value:
        """Lanes of both, numbered through."""
        return self.builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    def call(self, name: str, result: Any, *given: Value) -> Value:
        """What a function of the module, of LLVM's or of the process gives."""
        module = self.function.module
        kind = ir.FunctionType(result, [each.type for each in given])
        return self.builder.call(module.globals.get(name) or ir.Function(module, kind, name), given)


def whole(number: Value) -> Value:
    """Python's, as one of 64 bits; others as they are."""
    return I64(number) if isinstance(number, int) else number


def kernel(module: ir.Module, name: str, *, lanes: int, pointers: int, numbers: int, body: Body) -> None:
    """A function NAME(pointers..., numbers..., total, threads): `body` writes what one thread does.

    It is given the pointers, the numbers, begin, end and the number of the thread: its part of 0..total. With one
    thread nothing is shared; with more GNU's OpenMP runs the parts, on the very threads that torch's own work has.
    """
    own = [POINTER] * pointers + [I64] * numbers
    run = ir.Function(module, ir.FunctionType(VOID, [*own, I64, I64, I64]), f"{name}.run")
    run.linkage = "internal"
    for argument in run.args[:pointers]:
        argument.add_attribute("noalias")
    code = Code(run, lanes)
    body(code, tuple(run.args))
    code.end()
    kinds = [*own, I64]
    part = Code(ir.Function(module, ir.FunctionType(VOID, [POINTER]), f"{name}.part"), lanes)
    frame = part.function.args[0]
    given = [part.load(frame, at, kind, I64) for at, kind in enumerate(kinds)]
    thread = part.builder.zext(part.call("omp_get_thread_num", I32), I64)
    each = part.parts(given[-1], part.builder.zext(part.call("omp_get_num_threads", I32), I64))
    begin = part.least(part.times(thread, each), given[-1])
    part.builder.call(run, [*given[:-1], begin, part.least(part.add(begin, each), given[-1]), thread])
    part.end()
    entry = Code(ir.Function(module, ir.FunctionType(VOID, [*kinds, I64]), name), lanes)
    *given, threads = entry.function.args
    is_one = entry.builder.icmp_signed("<=", threads, I64(1))
    with entry.builder.if_else(is_one) as (alone, shared):
        with alone:
            entry.builder.call(run, [*given[:-1], I64(0), given[-1], I64(0)])
        with shared:
            held = entry._places.alloca(I64, size=len(kinds))
            for at, value in enumerate(given):
                number = value if value.type == I64 else entry.builder.ptrtoint(value, I64)
                entry.store(number, held, at, I64)
            wanted = entry.builder.trunc(threads, I32)
            entry.call("GOMP_parallel", VOID, part.function, held, wanted, I32(0))
    entry.end()
