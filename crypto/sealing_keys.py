"""The keys to which requests are sealed: the present one and the one before, and what was opened with each.

Rules: core; a new key pair is drawn by the library, from the system. A key is in memory only and made anew at the
start, after LIFE_S, and when SEEN_MAX requests were opened with it; the one before opens for another GRACE_S, so that
who has just read a statement is not refused. Whoever gets the memory reads what was sealed since: a day and an hour, no
more. What was opened once is not opened again while its key lives: each key knows the encapsulated keys that it took.
A key whose list is full is dropped without grace instead of growing or forgetting: who sealed to it seals anew, which
costs one round trip, and so no flood makes a replay possible or honest requests impossible. Only what opens is noted:
garbage fills no list.

Source: RFC 9180 section 9.7.3 (replay is the application's to refuse).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from crypto.errors import Replayed, UnknownSealingKey
from crypto.identity import Identity
from crypto.sealing import ENC_BYTES, Context, Opened, open_request, sign_key

LIFE_S: Final = 86_400.0
GRACE_S: Final = 3_600.0
SEEN_MAX: Final = 65_536  # about 8 MB for each of two keys
RESIGN_S: Final = 60.0  # a statement is signed anew, so that a clock that was set meanwhile counts


@dataclass(slots=True)
class _Held:
    """One key pair. `until`: when it opens no more."""

    private: X25519PrivateKey = field(repr=False)
    public: bytes
    made: float
    until: float
    seen: set[bytes] = field(default_factory=set, repr=False)


class SealingKeys:
    """See the module. `now` is monotonic seconds, `now_ms` Unix milliseconds."""

    def __init__(
        self,
        identity: Identity,
        network: str,
        now: float,
        make: Callable[[], X25519PrivateKey] = X25519PrivateKey.generate,
    ) -> None:
        self._identity, self._network, self._make = identity, network, make
        self._before: _Held | None = None
        self._present = self._made(now)
        self._statement: tuple[float, bytes] | None = None
        self.rotations = 0

    def tick(self, now: float) -> None:
        """Drop what is over, so that its private part is not in memory any more."""
        if self._before is not None and now >= self._before.until:
            self._before = None
        if now >= self._present.made + LIFE_S:
            self._rotate(now, grace_s=GRACE_S)

    def statement(self, now: float, now_ms: int) -> bytes:
        """The present key, signed (crypto.sealing.read_key reads it)."""
        self.tick(now)
        if self._statement is None or now >= self._statement[0] + RESIGN_S:
            expires_ms = now_ms + max(1, int((self._present.made + LIFE_S - now) * 1000))
            public, network = self._present.public, self._network
            signed = sign_key(self._identity, public, network=network, time_ms=now_ms, expires_ms=expires_ms)
            self._statement = now, signed
        return self._statement[1]

    def open(self, sealed: bytes, *, public: bytes, request_id: bytes, now: float) -> Opened:
        """A request that was sealed to `public`, once. Raises UnknownSealingKey, Replayed, BadSeal; nothing else."""
        self.tick(now)
        held = next((one for one in (self._present, self._before) if one is not None and one.public == public), None)
        if held is None:
            raise UnknownSealingKey("it is sealed to a key that this peer does not have, or not any more")
        context = Context(network=self._network, peer=self._identity.peer_id, request_id=request_id)
        enc = sealed[:ENC_BYTES]
        if enc in held.seen:
            raise Replayed("it was opened before: seal the request anew to ask again")
        opened = open_request(sealed, held.private, context)
        held.seen.add(enc)
        if len(held.seen) >= SEEN_MAX:
            self._full(held, now)
        return opened

    def _full(self, held: _Held, now: float) -> None:
        if held is self._before:
            self._before = None
        else:
            self._rotate(now, grace_s=0.0)

    def _rotate(self, now: float, *, grace_s: float) -> None:
        """A new present key. One without grace is gone at once, and the one before it stays."""
        if grace_s:
            self._before = self._present
            self._before.until = now + grace_s
        self._present = self._made(now)
        self._statement = None
        self.rotations += 1

    def _made(self, now: float) -> _Held:
        private = self._make()
        return _Held(private, private.public_key().public_bytes_raw(), now, now + LIFE_S + GRACE_S)
