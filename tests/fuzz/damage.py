"""Right input made wrong: bytes flipped, cut and doubled, values with parts replaced, left out and added.

Rules: all chance comes from `rng`.
"""

from __future__ import annotations

import random
from typing import Any

ODD = (
    None, True, False, -1, 0, 1, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 0.5, -0.0, 1e308, "", "a", "\0", "../../x",
    "12D3KooW", "/ip4/1.2.3.4/tcp/1", "a" * 300, "\U0001f600", b"", b"\xff" * 40, [], {}, [[[]]], {"": {}}, [0] * 100,
    ["a"] * 40, {str(number): number for number in range(40)},
)  # fmt: skip
DAMAGED_BYTES_MAX = 60_000


def damaged(rng: random.Random, raw: bytes) -> bytes:
    """The bytes with some flipped, cut, doubled, inserted or replaced."""
    data = bytearray(raw or b"\0")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) or 1)
        match rng.randrange(6):
            case 0 if data:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + rng.randint(1, 16)]
            case 2:
                data[at:at] = rng.randbytes(rng.randint(1, 16))
            case 3:
                data[at:at] = data[at : at + 32]
            case 4:
                data[at : at + 8] = rng.choice([b"\xff" * 8, bytes(8), b"\x80" * 8, b"\x7f" + b"\xff" * 7])
            case _:
                data += rng.randbytes(rng.randint(0, 64))
    return bytes(data[:DAMAGED_BYTES_MAX])


def odd_value(rng: random.Random, value: Any) -> Any:
    """The value with one to three of its parts replaced, left out, added or doubled."""
    for _ in range(rng.randint(1, 3)):
        value = _odder(rng, value, 0)
    return value


def _odder(rng: random.Random, value: Any, depth: int) -> Any:
    if not value or not isinstance(value, dict | list | tuple) or rng.random() < 0.1 + 0.1 * depth:
        return rng.choice(ODD)
    if isinstance(value, dict):
        changed = dict(value)
        key = rng.choice(list(changed))
        match rng.randrange(4):
            case 0:
                del changed[key]
            case 1:
                changed[rng.choice(["x", "", str(key) + "x", "type", "protocol"])] = rng.choice(ODD)
            case _:
                changed[key] = _odder(rng, changed[key], depth + 1)
        return changed
    items = list(value)
    at = rng.randrange(len(items))
    match rng.randrange(4):
        case 0:
            del items[at]
        case 1:
            items *= rng.choice([2, 20])
        case _:
            items[at] = _odder(rng, items[at], depth + 1)
    return items[:2000]
