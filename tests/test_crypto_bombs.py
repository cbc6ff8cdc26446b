"""The bomb corpus (SECURITY.md P3): each is refused quickly, without memory, and never ends the process.

Run as a script it is the child that meets the bombs; the test reads what the child measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from crypto.canonical import Limits

Met = tuple[str, bool, float, int]  # what it is, whether it was refused, CPU seconds, peak bytes

ROOT = Path(__file__).parent.parent
REFUSAL_BYTES_MAX = 5 << 20  # P3
SMALL_DOORS = ("/openagi/find/1", "/openagi/blob/1", "/openagi/direct/1")  # of one short map
SMALL_BYTES_MAX = 1 << 16
HANG_S = 5.0  # a hang guard; P3's 10 ms is printed with -s, not asserted on a shared machine


def bombs() -> dict[str, bytes]:
    """Name -> bytes that a peer could send. The first group is F5 and F6 as they were measured."""
    k64 = 65_536
    nested_ext = b"\xc0"
    for _ in range(200):  # F5: under 1 KB, ended Python where ext_hook recursed
        nested_ext = b"\xc7" + bytes([min(255, len(nested_ext))]) + b"\x40" + nested_ext[:255]
    return {
        "F5 nested ext": nested_ext,
        "F6 16 MiB of empty maps": b"\xdd\x00\xff\xff\xfb" + b"\x80" * (16 << 20),
        "F6 1 MiB of empty arrays": b"\xdd\x00\x0f\xff\xfb" + b"\x90" * ((1 << 20) - 5),
        "64 KiB of empty maps": b"\xdc\xff\xfc" + b"\x80" * (k64 - 4),
        "64 KiB of empty arrays in arrays of 4096": (b"\xdc\x10\x00" + b"\x90" * 4093) * 16,
        "arrays of 4096 nested": b"\xdc\x10\x00" * (k64 // 3),
        "arrays of 4096 nested by the first element, few deep": b"\xdc\x10\x00" * 15 + b"\xc0" * 60_000,
        "maps of 256 nested by value": b"\xde\x01\x00\xa0" * (k64 // 4),
        "nested arrays of 1": b"\x91" * k64,
        "nested arrays of 1, well formed": b"\x91" * (k64 - 1) + b"\xc0",
        "nested arrays, 17 deep": b"\x91" * 17 + b"\xc0",
        "nested maps of 1": b"\x81\xa0" * (k64 // 2),
        "nested arrays of 15": b"\x9f" * k64,
        "array16 of 65535, empty": b"\xdc\xff\xff",
        "array32 of 2^32-1": b"\xdd\xff\xff\xff\xff",
        "array32 of 2^31": b"\xdd\x80\x00\x00\x00",
        "array32 of 4096 and nothing": b"\xdd\x00\x00\x10\x00",
        "map16 of 65535": b"\xde\xff\xff",
        "map32 of 2^32-1": b"\xdf\xff\xff\xff\xff",
        "map32 of 256 and nothing": b"\xdf\x00\x00\x01\x00",
        "str32 of 2^32-1": b"\xdb\xff\xff\xff\xff",
        "str32 of 1 GiB": b"\xdb\x40\x00\x00\x00abc",
        "str16 cut off": b"\xda\xff\xff" + b"a" * 100,
        "bin32 of 2^32-1": b"\xc6\xff\xff\xff\xff",
        "bin32 of 1 GiB": b"\xc6\x40\x00\x00\x00abc",
        "key of 1 GiB": b"\x81\xdb\x40\x00\x00\x00abc",
        "ext8": b"\xc7\x01\x05x",
        "ext16 of 65535": b"\xc8\xff\xff\x05",
        "ext32 of 2^32-1": b"\xc9\xff\xff\xff\xff\x05",
        "fixext1": b"\xd4\x05x",
        "fixext16": b"\xd8\x05" + b"x" * 16,
        "hivemind's tuple ext": b"\xc7\x02\x40\x91\xc0",
        "timestamp 32": b"\xd6\xff\x00\x00\x00\x00",
        "timestamp 64": b"\xd7\xff" + b"\xff" * 8,
        "timestamp 96": b"\xc7\x0c\xff" + b"\xff" * 12,
        "timestamp as a key": b"\x81\xd6\xff\x00\x00\x00\x00\x01",
        "duplicate keys": b"\x82\xa1a\x01\xa1a\x02",
        "duplicate keys, two encodings": b"\x82\xa1a\x01\xd9\x01a\x02",
        "duplicate keys deep inside": b"\x91\x81\xa1k\x82\xa1a\x01\xa1a\x02",
        "256 times one key": b"\xde\x01\x00" + b"\xa1a\x01" * 256,
        "int key": b"\x81\x01\x01",
        "bin key": b"\x81\xc4\x01a\x01",
        "nil key": b"\x81\xc0\x01",
        "array key": b"\x81\x90\x01",
        "map key": b"\x81\x80\x01",
        "float key": b"\x81\xcb" + b"\x00" * 8 + b"\x01",
        "trailing byte": b"\x01\x01",
        "64 KiB of trailing zeros": b"\xc0" + b"\x00" * (k64 - 1),
        "NaN 64": b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
        "NaN 64, another payload": b"\xcb\xff\xf0\x00\x00\x00\x00\x00\x01",
        "NaN 32": b"\xca\x7f\xc0\x00\x00",
        "NaN 32, signalling": b"\xca\xff\x80\x00\x01",
        "inf 64": b"\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00",
        "-inf 64": b"\xcb\xff\xf0\x00\x00\x00\x00\x00\x00",
        "inf 32": b"\xca\x7f\x80\x00\x00",
        "never used 0xc1": b"\xc1",
        "64 KiB of 0xc1": b"\xdc\x10\x00" + b"\xc1" * 4096,
        "not UTF-8": b"\xd9\xff" + b"\xff" * 255,
        "UTF-8 of a surrogate": b"\xa3\xed\xa0\x80",
        "overlong UTF-8": b"\xa2\xc0\x80",
        "nothing": b"",
        "header only": b"\xcf",
        "64 KiB and one byte": b"\xc5\xff\xff" + b"\x00" * (k64 - 2),
    }


def doors() -> dict[str, tuple[Limits, Callable[[bytes], object], type[Exception]]]:
    """Name -> (its limits, what decodes there, its one error): everything that takes msgpack of a peer's."""
    from crypto.canonical import CONTROL, decode
    from crypto.digest import digest
    from crypto.envelope import _LIMITS as ENVELOPE
    from crypto.envelope import open_envelope
    from crypto.errors import BadEncoding
    from gossip.blob_wire import _LIMITS as BLOB
    from gossip.blob_wire import BlobAsk, decode_ask
    from gossip.errors import RemoteProtocolError as BadGossip
    from gossip.finding import _LIMITS as FIND
    from gossip.finding import find_of
    from gossip.transfer import _MANIFEST, decode_manifest
    from node.work import WORK_LIMITS, GenerateWork, from_wire, item_from_wire
    from p2p.direct import _LIMITS as DIRECT
    from p2p.direct import _decode
    from p2p.direct_frames import Ask
    from p2p.errors import RemoteProtocolError
    from p2p.rpc import Call, Item, decode_frame

    def infer(raw: bytes) -> None:
        frame = decode_frame(raw, WORK_LIMITS)
        if isinstance(frame, Call):
            from_wire(frame.body, GenerateWork)
        elif isinstance(frame, Item):
            item_from_wire(frame.body)

    return {
        "a body": (CONTROL, decode, BadEncoding),
        "/openagi/rpc/1": (CONTROL, decode_frame, RemoteProtocolError),
        "/openagi/infer/1": (WORK_LIMITS, infer, RemoteProtocolError),
        "/openagi/find/1": (FIND, find_of, BadGossip),
        "/openagi/blob/1": (BLOB, partial(decode_ask, kind=BlobAsk), BadGossip),
        "a manifest": (_MANIFEST, lambda raw: decode_manifest(raw, digest(raw)), BadGossip),
        "/openagi/direct/1": (DIRECT, partial(_decode, kind=Ask), RemoteProtocolError),
        "an envelope": (ENVELOPE, partial(open_envelope, domain="advert", network="main", now_ms=0), BadEncoding),
    }


# One element of each kind that costs a decoder something of its own, and how many elements it holds.
ELEMENTS = {
    "a number": (b"\x05", 0),
    "a number of 8 bytes": (b"\xcf" + b"\xff" * 8, 0),
    "a float": (b"\xcb\x3f\xf1" + b"\1" * 6, 0),
    "an empty text": (b"\xa0", 0),
    "a text with the longest head": (b"\xdb\0\0\0\1a", 0),
    "a text beyond ASCII": (b"\xa2\xce\xb1", 0),
    "a text of 33 bytes": (b"\xd9\x21" + b"a" * 33, 0),
    "bytes": (b"\xc4\x28" + b"z" * 40, 0),
    "no bytes": (b"\xc6\0\0\0\0", 0),
    "an empty array": (b"\x90", 0),
    "an empty array with the longest head": (b"\xdd\0\0\0\0", 0),
    "an array of one": (b"\x91\x05", 1),
    "an empty map": (b"\x80", 0),
    "an empty map with the longest head": (b"\xdf\0\0\0\0", 0),
    "a map of one": (b"\x81\xa1a\x05", 2),
    "a map in a map": (b"\x81\xa0\x80", 2),
    "a map of a long key": (b"\x81\xd9\x21" + b"k" * 33 + b"\xcb\x3f\xf1" + b"\1" * 6, 2),
}
TEXTS = {"ASCII": "a", "Greek": "\u03b1", "Chinese": "\u4e00", "emoji": "\U0001f600"}


def fullest(limits: Limits) -> dict[str, bytes]:
    """Name -> the fullest value that these limits let in, of each kind of element; and texts, widened by their last.

    Each is a whole value, so that a door of calls refuses it only after it was decoded.
    """
    frames = {}
    for name, (element, inside) in ELEMENTS.items():
        count = min((limits.items_max - 8) // (1 + inside), (limits.bytes_max - 64) // len(element))
        if element[0] & 0xF0 == 0x80 or element[0] == 0xDF:
            count = min(count, limits.maps_max // (2 if name == "a map in a map" else 1))
        rows = (
            [min(limits.array_max, count - at) for at in range(0, count, limits.array_max)] if limits.array_max else []
        )
        raw = b"".join(b"\xdd" + row.to_bytes(4, "big") + element * row for row in rows)
        frames[name] = b"\xdd" + len(rows).to_bytes(4, "big") + raw
    room = min(limits.str_max, limits.bytes_max - 16)
    for name, character in TEXTS.items():
        text = (character * (room // len(character.encode()))).encode()
        frames[f"a text in {name}"] = b"\xdb" + len(text).to_bytes(4, "big") + text
    widened = b"a" * (room - 4) + TEXTS["emoji"].encode()
    frames["a text widened by its end"] = b"\xdb" + len(widened).to_bytes(4, "big") + widened
    many = min(limits.bytes_max // len(widened), limits.array_max)
    frames["texts widened by their ends"] = (
        b"\xdd" + many.to_bytes(4, "big") + frames["a text widened by its end"] * many
    )
    return frames | _in_calls(frames["a text widened by its end"])


def _in_calls(text: bytes) -> dict[str, bytes]:
    """A text in the places of a call's frame where a message of ours might repeat it."""
    return {
        "a kind": b"\x91" + text,
        "a method": b"\x94\xa4call\x01" + text + b"\xc0",
        "an error's message": b"\x95\xa5error\x01\xa1c" + text + b"\xc3",
        "a request's type": b"\x94\xa4call\x01\xa8generate\x81\xa4type" + text,
        "a key of a request": b"\x94\xa4call\x01\xa8generate\x82\xa4type\xa8generate" + text + b"\xc0",
        "an item's type": b"\x93\xa4item\x01\x81\xa4type" + text,
    }


def met(name: str, raw: bytes, door: Callable[[bytes], object], error: type[Exception]) -> Met:
    """What a door makes of these bytes: the least CPU of three times, in seconds, and the peak of memory in bytes."""
    taken_s = []
    refused = False
    for _ in range(3):
        began = time.thread_time()
        try:
            door(raw)
        except error:
            refused = True
        taken_s.append(time.thread_time() - began)
    tracemalloc.start()
    try:
        door(raw)
    except error:
        pass
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return name, refused, min(taken_s), peak_bytes


def meet_all() -> dict[str, list[Met]]:
    """Door -> what it made of each bomb, and of the fullest values that its limits let in."""
    from crypto.canonical import CONTROL

    found = {}
    for door, (limits, decode, error) in doors().items():
        raws = bombs() | {f"control's full of {kind}": raw for kind, raw in fullest(CONTROL).items()}
        raws |= {f"full of {kind}": raw for kind, raw in fullest(limits).items()}
        found[door] = [met(name, raw, decode, error) for name, raw in raws.items()]
    return found


@pytest.mark.slow
def test_no_bomb_goes_off_at_any_door() -> None:
    child = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, timeout=240, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}
    )
    assert child.returncode == 0, f"the child ended with {child.returncode}: {child.stderr[-500:]}"
    found: dict[str, list[Met]] = json.loads(child.stdout)
    assert set(found) == set(doors())
    for door, rows in found.items():
        slowest = max(rows, key=lambda row: row[2])
        widest = max(rows, key=lambda row: row[3])
        print(
            f"{door}: slowest {slowest[2] * 1000:.2f} ms ({slowest[0]}), "
            f"widest {widest[3] / 1e6:.2f} MB ({widest[0]}), of {len(rows)}"
        )
        assert len(rows) >= 80
        assert [name for name, refused, _, _ in rows if not refused and name in bombs()] == []
        most = SMALL_BYTES_MAX if door in SMALL_DOORS else REFUSAL_BYTES_MAX
        assert [(name, peak) for name, _, _, peak in rows if peak > most] == []
        assert [(name, taken_s) for name, _, taken_s, _ in rows if taken_s > HANG_S] == []


def test_the_limits_let_few_elements_in() -> None:
    """What a frame costs the loop is a look at each element: 0.7 us at most, so 12,288 of them cost less than 10 ms."""
    for door, (limits, _, _) in doors().items():
        assert limits.items_max <= 12_288, door
        assert limits.maps_max <= 8_192, door


def test_a_prompt_of_100000_tokens_is_let_in_and_costs_one_element() -> None:
    from node.work import WORK_LIMITS, GenerateWork, from_wire, to_wire
    from p2p.rpc import Call, decode_frame, encode_frame

    work = GenerateWork(request_id="q", tokens=tuple(range(70_000, 170_000)))
    raw = encode_frame(Call(1, "generate", to_wire(work)), WORK_LIMITS)
    tracemalloc.start()
    frame = decode_frame(raw, WORK_LIMITS)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1 << 20
    assert isinstance(frame, Call)
    assert from_wire(frame.body, GenerateWork) == work


if __name__ == "__main__":
    json.dump(meet_all(), sys.stdout)
