"""What a fuzz target is, and how input for one is made: by damage to right bytes, or to right values.

Rules: no clock; all chance comes from `rng`, so that an input behaves alike each time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from crypto import canonical
from crypto.errors import BadEncoding
from tests.fuzz.damage import damaged, odd_value

NESTED = 50_000
HOSTILE_JSON = (
    b"[" * NESTED, b"[" * NESTED + b"]" * NESTED, b'{"a":' * NESTED + b"1" + b"}" * NESTED, b"1" * 5000, b"-" * 5000,
    b"1e99999", b"NaN", b"-Infinity", b'"\\ud800"', b'"\\u0000"', b'{"a":1,"a":2}',
    b"\xff\xfe[\x00]\x00", b"\xef\xbb\xbf{}",
)  # fmt: skip


def packed(value: Any) -> bytes:
    """Canonical msgpack, or whatever msgpack makes of what has no canonical form."""
    try:
        return canonical.encode(value)
    except BadEncoding:
        return bytes(msgpack.packb(value, unicode_errors="surrogatepass"))


def jsoned(value: Any) -> bytes:
    """JSON; bytes become text, since JSON has none."""
    return json.dumps(value, default=lambda odd: odd.decode("latin-1")).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One decoder. `read` raises only `errors`. `values` become bytes by `pack`, and are damaged as values too."""

    read: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...] = ()
    values: tuple[Any, ...] = ()
    pack: Callable[[Any], bytes] = packed
    taken_bytes_max: int = 16 << 20  # of memory, for one input

    @property
    def corpus(self) -> tuple[bytes, ...]:
        """Right input, or nearly."""
        hostile = HOSTILE_JSON if self.pack is jsoned else ()
        return (*self.seeds, *map(self.pack, self.values), *hostile)

    def input(self, rng: random.Random) -> bytes:
        """Some input, most of it nearly right."""
        if self.values and rng.random() < 0.6:
            raw = self.pack(odd_value(rng, rng.choice(self.values)))
            return raw if rng.random() < 0.9 else damaged(rng, raw)
        return damaged(rng, rng.choice(self.corpus))

    def meet(self, raw: bytes) -> bool:
        """Read the input; whether it was taken. Any error but `errors` comes out."""
        try:
            self.read(raw)
        except self.errors:
            return False
        return True
