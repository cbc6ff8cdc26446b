"""Canonical msgpack: the one way in which a value becomes bytes, and bytes from a peer become a value.

Rules: core, and the only importer of msgpack. A value is None, bool, int (-2^63..2^64-1), finite float, str, bytes,
a list of values, or a dict from str to values. Its canonical bytes are the shortest headers, keys sorted by code
point, floats as 64 bits. `decode` walks the headers and checks every count, length and depth BEFORE it builds
anything, so memory is bounded by the limits whatever the headers claim; ext and timestamp types do not exist here.
`decode` accepts a longer header than needed and unsorted keys (other languages' encoders write them);
`decode_canonical`, for what is signed or hashed, does not.

Source: msgpack specification (github.com/msgpack/msgpack, spec.md); SECURITY.md F5, F6, P3, P8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

import msgpack
import msgspec

from crypto.errors import BadEncoding

Value = None | bool | int | float | str | bytes | list["Value"] | dict[str, "Value"]
T = TypeVar("T")

ENCODE_DEPTH_MAX: Final = 64  # our own values are shallow; this ends a value that contains itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a decoder takes. Counts are of elements (pairs for a map), lengths are bytes.

    The defaults are for control frames (SECURITY.md F6: <= 64 KiB, arrays <= 4096, maps <= 256).
    """

    bytes_max: int = 65_536
    depth_max: int = 16  # containers inside each other; a scalar alone has depth 0
    array_max: int = 4_096
    map_max: int = 256
    str_max: int = 65_536
    bin_max: int = 65_536
    items_max: int = 8_192  # all elements of all arrays, plus keys and values of all maps
    maps_max: int = 8_192  # maps in all: each costs a call back into Python, ten times what an array does

    def __post_init__(self) -> None:
        """What is decoded can be encoded again."""
        assert 0 <= self.depth_max <= ENCODE_DEPTH_MAX, "deeper than `encode` goes"


CONTROL: Final = Limits()


def encode(value: object) -> bytes:
    """The canonical bytes of a value; tuples are written as arrays. Raises BadEncoding for anything else."""
    try:
        packed: bytes = msgpack.packb(_ordered(value, ENCODE_DEPTH_MAX), use_bin_type=True, strict_types=True)
    except (ValueError, OverflowError) as exc:  # half a surrogate pair in a str, an int over 64 bits
        raise BadEncoding(f"the value has no canonical bytes: {exc}") from exc
    return packed


def decode(raw: bytes, limits: Limits = CONTROL) -> Any:
    """The Value that these bytes stand for. Raises BadEncoding, and nothing else, for any bytes."""
    _scan(raw, limits, strict=False)
    return _build(raw, limits)


def decode_canonical(raw: bytes, limits: Limits = CONTROL) -> Any:
    """As `decode`, and these bytes are the only ones for this value. Raises BadEncoding.

    It is the headers that show it: no second copy of a large value is made to compare with.
    """
    _scan(raw, limits, strict=True)
    return _build(raw, limits)


def _build(raw: bytes, limits: Limits) -> Any:
    """The value of scanned bytes."""
    try:
        return msgpack.unpackb(
            raw,
            raw=False,
            use_list=True,
            strict_map_key=True,
            object_pairs_hook=_unique,
            ext_hook=_no_ext,
            max_str_len=limits.str_max,
            max_bin_len=limits.bin_max,
            max_array_len=limits.array_max,
            max_map_len=limits.map_max,
            max_ext_len=0,
        )
    except ValueError as exc:  # after the scan: a str that is not UTF-8
        raise BadEncoding(f"a text is not UTF-8 ({type(exc).__name__})") from exc


def encode_struct(struct: msgspec.Struct) -> bytes:
    """The canonical bytes of a struct. Raises BadEncoding when a field has none (NaN, an int over 64 bits)."""
    return encode(msgspec.to_builtins(struct, builtin_types=(bytes,)))


def decode_struct(raw: bytes, kind: type[T], limits: Limits = CONTROL) -> T:
    """Bytes to a checked struct (or union of tagged structs). Raises BadEncoding only."""
    return convert(decode(raw, limits), kind)


def convert(value: Any, kind: type[T]) -> T:
    """A decoded value to a checked struct, without coercion. Raises BadEncoding that names the field."""
    try:
        # Without builtin_types msgspec takes a str for bytes and reads it as base64.
        return msgspec.convert(value, kind, strict=True, builtin_types=(bytes,))
    except msgspec.ValidationError as exc:
        raise BadEncoding(f"not a {getattr(kind, '__name__', 'message')}: {str(exc)[:200]}") from exc


# --- writing ---

_EXACT: Final = frozenset({type(None), bool, int, str, bytes})  # scalars that need no look inside


def _ordered(value: object, depth_left: int) -> object:
    """The same value with sorted keys and lists for tuples, its scalars checked."""
    kind = type(value)
    if kind in _EXACT:
        return value
    if kind is float:
        if not math.isfinite(value):  # type: ignore[arg-type]  # kind says float
            raise BadEncoding(f"the float {value} came, only finite ones have canonical bytes")
        return value
    if depth_left == 0:
        raise BadEncoding(f"a value nested over {ENCODE_DEPTH_MAX} deep, or inside itself")
    if kind is list or kind is tuple:  # a named tuple (msgpack's ExtType is one) is no array
        return _ordered_array(cast(Sequence[object], value), depth_left - 1)
    if kind is dict:
        return _ordered_map(cast(dict[object, object], value), depth_left - 1)
    raise BadEncoding(f"a {kind.__name__} came; wanted None, bool, int, float, str, bytes, list or dict")


def _ordered_array(value: Sequence[object], depth_left: int) -> object:
    if _EXACT.issuperset(map(type, value)):  # token ids come by the ten thousand: asked at C speed
        return list(value)
    return [_ordered(item, depth_left) for item in value]


def _ordered_map(value: Mapping[object, object], depth_left: int) -> object:
    if any(type(key) is not str for key in value):
        raise BadEncoding("a map has a key that is not a str")
    return {key: _ordered(value[key], depth_left) for key in sorted(value)}  # type: ignore[type-var]  # all str


# --- reading ---

_ARRAY, _MAP, _STR, _BIN, _FLOAT = 1, 2, 3, 4, 5


def _fixed_sizes() -> bytes:
    """For each first byte: bytes of the whole element when that byte alone says so, else 0."""
    sizes = bytearray(256)
    for tag in range(256):
        if tag <= 0x7F or tag >= 0xE0 or tag in (0xC0, 0xC2, 0xC3):  # fixint, nil, false, true
            sizes[tag] = 1
    for tag, size in {0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9}.items():
        sizes[tag] = size
    return bytes(sizes)


_FIXED: Final = _fixed_sizes()
# First byte -> (what it opens, bytes of the length that follows).
_SIZED: Final[Mapping[int, tuple[int, int]]] = {
    0xC4: (_BIN, 1),
    0xC5: (_BIN, 2),
    0xC6: (_BIN, 4),
    0xCA: (_FLOAT, 4),
    0xCB: (_FLOAT, 8),
    0xD9: (_STR, 1),
    0xDA: (_STR, 2),
    0xDB: (_STR, 4),
    0xDC: (_ARRAY, 2),
    0xDD: (_ARRAY, 4),
    0xDE: (_MAP, 2),
    0xDF: (_MAP, 4),
}
_STR_TAGS: Final = frozenset({*range(0xA0, 0xC0), 0xD9, 0xDA, 0xDB})


# First byte of a long form -> (bytes of its number, the least number that needs it; where that is negative, the most).
_LONG: Final[Mapping[int, tuple[int, int]]] = {
    0xC5: (2, 1 << 8), 0xC6: (4, 1 << 16),  # bin
    0xCC: (1, 1 << 7), 0xCD: (2, 1 << 8), 0xCE: (4, 1 << 16), 0xCF: (8, 1 << 32),  # uint
    0xD0: (1, -33), 0xD1: (2, -(1 << 7) - 1), 0xD2: (4, -(1 << 15) - 1), 0xD3: (8, -(1 << 31) - 1),  # int
    0xCA: (4, 1 << 32),  # a float of 32 bits: never
    0xD9: (1, 1 << 5), 0xDA: (2, 1 << 8), 0xDB: (4, 1 << 16),  # str
    0xDC: (2, 1 << 4), 0xDD: (4, 1 << 16), 0xDE: (2, 1 << 4), 0xDF: (4, 1 << 16),  # array, map
}  # fmt: skip


def _check_shortest(raw: bytes, pos: int, tag: int) -> None:
    """Raises BadEncoding when a shorter form has the same value; what is cut off is found later."""
    width, edge = _LONG[tag]
    number = int.from_bytes(raw[pos + 1 : pos + 1 + width], "big", signed=edge < 0)
    if number > edge if edge < 0 else number < edge:
        raise BadEncoding(f"not canonical: the form at byte {pos} is longer than needed, or a float has 32 bits")


def _header(raw: bytes, pos: int, tag: int) -> tuple[int, int, int]:
    """(what opens, its count or length, where its content starts). Raises BadEncoding."""
    if tag < 0x90:
        return _MAP, tag & 0x0F, pos + 1
    if tag < 0xA0:
        return _ARRAY, tag & 0x0F, pos + 1
    if tag < 0xC0:
        return _STR, tag & 0x1F, pos + 1
    if tag not in _SIZED:
        raise BadEncoding(f"type 0x{tag:02x} at byte {pos}: ext and timestamp types are not allowed")
    what, width = _SIZED[tag]
    if what == _FLOAT:
        return _FLOAT, width, pos + 1
    field = raw[pos + 1 : pos + 1 + width]
    if len(field) < width:
        raise BadEncoding(f"cut off inside a header at byte {pos}")
    return what, int.from_bytes(field, "big"), pos + 1 + width


def _check_float(raw: bytes, pos: int, width: int) -> None:
    """IEEE 754: a float whose exponent bits are all ones is an infinity or no number."""
    if len(raw) < pos + width:
        raise BadEncoding(f"cut off inside a float at byte {pos}")
    exponent_low = 0x80 if width == 4 else 0xF0
    if raw[pos] & 0x7F == 0x7F and raw[pos + 1] & exponent_low == exponent_low:
        raise BadEncoding(f"the float at byte {pos} is not finite")


def _scan(raw: bytes, limits: Limits, *, strict: bool) -> None:
    """Walk the headers; raise BadEncoding unless exactly one value within the limits stands here.

    strict: every header is the shortest, and the keys of a map increase. UTF-8 sorts as code points do.
    """
    size = len(raw)
    if size > limits.bytes_max:
        raise BadEncoding(f"{size} bytes came, at most {limits.bytes_max} are allowed")
    length_max = {_STR: limits.str_max, _BIN: limits.bin_max}
    count_max = {_ARRAY: limits.array_max, _MAP: limits.map_max}
    pos, items, maps = 0, 0, 0
    left, in_map = 1, False  # elements to come in the open container; of a map, keys and values
    key: bytes | None = None  # the last one of the open map
    outer: list[tuple[int, bool, bytes | None]] = []
    while left or outer:
        if not left:
            left, in_map, key = outer.pop()
            continue
        if pos >= size:
            raise BadEncoding(f"cut off: {size} bytes came and {left} elements are missing")
        tag = raw[pos]
        at_key = in_map and not left & 1
        if at_key and tag not in _STR_TAGS:
            raise BadEncoding(f"a map has a key that is not a str, at byte {pos}")
        if strict and tag in _LONG:
            _check_shortest(raw, pos, tag)
        left -= 1
        if _FIXED[tag]:
            pos += _FIXED[tag]
            continue
        what, count, pos = _header(raw, pos, tag)
        if what == _FLOAT:
            _check_float(raw, pos, count)
            pos += count
        elif what in length_max:
            if count > length_max[what]:
                raise BadEncoding(f"a text or blob of {count} bytes, at most {length_max[what]} are allowed")
            if strict and at_key:
                key, before = raw[pos : pos + count], key
                if before is not None and key <= before:
                    raise BadEncoding(f"not canonical: the key at byte {pos} does not come after the one before it")
            pos += count
        else:
            if count > count_max[what]:
                raise BadEncoding(f"an array or map of {count} elements, at most {count_max[what]} are allowed")
            if len(outer) >= limits.depth_max:
                raise BadEncoding(f"nested over {limits.depth_max} deep at byte {pos}")
            outer.append((left, in_map, key))
            left, in_map, key = (2 * count, True, None) if what == _MAP else (count, False, None)
            items += left
            maps += in_map
            if items > limits.items_max or maps > limits.maps_max:
                raise BadEncoding(f"over {limits.items_max} elements or {limits.maps_max} maps in all")
    if pos > size:
        raise BadEncoding(f"cut off: {pos - size} bytes are missing at the end")
    if pos < size:
        raise BadEncoding(f"{size - pos} bytes after the end of the value")


def _unique(pairs: list[tuple[str, Value]]) -> dict[str, Value]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise BadEncoding("a map has the same key twice")
    return fields


def _no_ext(code: int, content: bytes) -> None:
    raise BadEncoding(f"ext type {code} came, none is allowed")
