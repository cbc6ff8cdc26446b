"""Noise records: as many as there are in one system call, and each byte copied once.

Rules: the records on the wire are those of libp2p-noise, whole ones of RECORD_BYTES and a last smaller one, so that
any peer reads them. Both nonces stay with libp2p's own cipher states, which count each record once. What cannot be
decrypted ends the connection; nothing of it is given out. Unread plaintext is at most one read of the socket more
than what is asked for.

Source: NETWORK.md section 2 (bottleneck); libp2p specs, noise/README.md "Wire format"; Noise Protocol section 5.1.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from cryptography.exceptions import InvalidTag
from libp2p.io.exceptions import ConnectionClosedError, IncompleteReadError
from libp2p.security.noise.io import MAX_PLAINTEXT_LENGTH, NoiseTransportReadWriter
from libp2p.security.secure_session import SecureSession
from noise.exceptions import NoiseHandshakeError, NoiseInvalidMessage, NoiseValueError  # type: ignore[import-untyped]

LENGTH_BYTES = 2  # before each record, big endian
# what a handshake lets through when the peer's words are wrong, beside libp2p's own errors
HANDSHAKE = (InvalidTag, NoiseHandshakeError, NoiseInvalidMessage, NoiseValueError)
RECORD_BYTES = 65_519  # of plaintext in the largest record: 65,535 less its tag of 16


class GuardedSession(SecureSession):  # type: ignore[misc]  # libp2p's types are not followed
    """A secured connection that reads and writes many records at a time.

    Around: libp2p makes one system call a record in each direction, and passes every byte through six layers of copies.
    """

    def __init__(self, session: SecureSession) -> None:
        """Take over a session on which nothing was read or written yet."""
        super().__init__(
            local_peer=session.local_peer,
            local_private_key=session.local_private_key,
            remote_peer=session.remote_peer,
            remote_permanent_pubkey=session.remote_permanent_pubkey,
            is_initiator=session.is_initiator,
            conn=session.conn,
        )
        assert isinstance(session.conn, NoiseTransportReadWriter), "libp2p-noise changed: look at this workaround again"
        assert MAX_PLAINTEXT_LENGTH == RECORD_BYTES, "libp2p-noise changed: look at this workaround again"
        assert session.low_watermark == session.high_watermark, "a session that was read from already"
        states = session.conn.noise_state.noise_protocol
        self._encrypt = states.cipher_state_encrypt.encrypt_with_ad
        self._decrypt = states.cipher_state_decrypt.decrypt_with_ad
        self._raw = session.conn.read_writer.read_write_closer
        self._cut = bytearray()  # of a record whose rest is still to come
        self._plain: deque[memoryview] = deque()
        self._plain_bytes = 0

    @property
    def unread(self) -> int:
        """Bytes that can be read without waiting."""
        return self._plain_bytes

    async def write(self, data: Any, head: bytes = b"") -> None:
        """Send head and data by one write of the socket, whole even when cancelled. Raises ConnectionClosedError."""
        view = memoryview(data)
        start = RECORD_BYTES - len(head)
        records = [self._encrypt(None, head + view[:start] if head else view[:start])]
        for begin in range(start, len(view), RECORD_BYTES):
            records.append(self._encrypt(None, view[begin : begin + RECORD_BYTES]))
        await self._raw.write(
            b"".join([part for each in records for part in (len(each).to_bytes(LENGTH_BYTES, "big"), each)])
        )

    async def read(self, n: int | None = None) -> bytes:
        """n bytes, fewer only at the end; with None what is there, at least one. Cancelled: nothing is lost.

        Raises IncompleteReadError at the end, ConnectionClosedError when the connection broke or was tampered with.
        """
        if n == 0:
            return b""
        await self._fill_up_to(1 if n is None else n)
        return self._take(self._plain_bytes if n is None else min(n, self._plain_bytes))

    async def read_some(self, n: int) -> memoryview:
        """At least one and at most n bytes, not copied. Cancelled: nothing is lost. Raises as read does."""
        await self._fill_up_to(1)
        first = self._plain.popleft()
        if len(first) > n:
            self._plain.appendleft(first[n:])
            first = first[:n]
        self._plain_bytes -= len(first)
        return first

    async def _fill_up_to(self, n: int) -> None:
        """Read until n bytes are there, or fewer but some at the end. Raises IncompleteReadError at the end."""
        while self._plain_bytes < n:
            if not await self._fill():
                break
        if not self._plain_bytes:
            raise IncompleteReadError("the connection ended", expected_bytes=n, received_bytes=0)

    async def _fill(self) -> bool:
        """Read the socket once and decrypt the records that are complete; False at its end."""
        piece = await self._raw.read()
        if not piece:
            return False
        view = memoryview(piece)
        while self._cut and len(view):  # only the record that was cut is copied together
            size = _record_bytes(self._cut)
            part = view[: size - len(self._cut)]
            self._cut += part
            view = view[len(part) :]
            if len(self._cut) >= LENGTH_BYTES and len(self._cut) == _record_bytes(self._cut):
                self._open(memoryview(self._cut)[LENGTH_BYTES:])
                self._cut = bytearray()
        start = 0
        while len(view) - start >= LENGTH_BYTES:
            end = start + LENGTH_BYTES + int.from_bytes(view[start : start + LENGTH_BYTES], "big")
            if end > len(view):
                break
            self._open(view[start + LENGTH_BYTES : end])
            start = end
        self._cut += view[start:]
        return True

    def _open(self, record: memoryview) -> None:
        """Decrypt one record. Raises ConnectionClosedError."""
        try:
            plain = self._decrypt(None, record)
        except InvalidTag as exc:
            raise ConnectionClosedError("a record was not encrypted by the peer", transport="tcp") from exc
        if plain:
            self._plain.append(memoryview(plain))
            self._plain_bytes += len(plain)

    def _take(self, n: int) -> bytes:
        """Exactly n of the bytes that are there."""
        self._plain_bytes -= n
        first = self._plain[0]
        if len(first) > n:
            self._plain[0] = first[n:]
            return bytes(first[:n])
        taken: list[memoryview] = []
        while n > 0:
            first = self._plain.popleft()
            if len(first) > n:
                self._plain.appendleft(first[n:])
                first = first[:n]
            taken.append(first)
            n -= len(first)
        return b"".join(taken)


def _record_bytes(start: bytearray) -> int:
    """How long a record is with its length before it, as far as its first bytes tell: at least LENGTH_BYTES."""
    if len(start) < LENGTH_BYTES:
        return LENGTH_BYTES
    return LENGTH_BYTES + int.from_bytes(start[:LENGTH_BYTES], "big")
