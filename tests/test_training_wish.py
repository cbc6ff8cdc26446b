"""What the operator wants: the same after a restart, and nothing made up from a damaged file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from node.training_wish import FILE_BYTES_MAX, Begin, Join, Wish, Wished, absolute
from tests.test_training_plan import plan

WISH = Wish(run="tales", data=("/texts/a.txt",), seed=7, plan=plan().raw, paused=True)


def test_a_wish_outlives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "wish.state"
    assert Wished(path).read() is None
    for wish in (WISH, Wish(run="a1b2c3d4", data=("/x",), seed=0), None):
        Wished(path).write(wish)
        assert Wished(path).read() == wish


def test_a_wish_of_the_largest_size_is_kept(tmp_path: Path) -> None:
    wish = Wish(run="r", data=("/" + "x" * 900,) * 1024, seed=1, plan=bytes(32_768))
    wished = Wished(tmp_path / "wish.state")
    wished.write(wish)
    assert len(msgspec.json.encode(wish)) < FILE_BYTES_MAX
    assert wished.read() == wish


@pytest.mark.parametrize("place", ["head", "middle", "end"])
def test_a_damaged_file_is_no_wish_and_is_put_aside(tmp_path: Path, place: str) -> None:
    path = tmp_path / "wish.state"
    Wished(path).write(WISH)
    raw = path.read_bytes()
    at = {"head": 3, "middle": len(raw) // 2, "end": len(raw) - 1}[place]
    path.write_bytes(raw[:at] + bytes((raw[at] ^ 1,)) + raw[at + 1 :])
    wished = Wished(path)
    assert wished.read() is None
    assert "damaged" in wished.file.status().set_aside
    assert not path.exists()
    wished.write(WISH)
    assert Wished(path).read() == WISH


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b'{"run":"r","data":[],"seed":1}', b'{"run":"r","data":["/x"],"seed":-1}', b"\xff\xfe", b"12",
     b'{"run":"r","data":["/x"],"seed":1,"more":2}'],
)  # fmt: skip
def test_a_whole_file_of_something_else_is_no_wish(tmp_path: Path, content: bytes) -> None:
    wished = Wished(tmp_path / "wish.state")
    wished.file.write(content)
    assert Wished(tmp_path / "wish.state").read() is None


def test_a_disk_that_takes_nothing_is_told_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "training").write_text("a file where the folder should be")
    wished = Wished(tmp_path / "training" / "wish.state")
    wished.write(WISH)
    assert "training wish" in wished.file.status().problem


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": "Tales"}, "name"), ({"name": ""}, "name"), ({"data": []}, "data"), ({"data": [""]}, "data"),
        ({"steps": 0}, "steps"), ({"rows": 0}, "rows"), ({"context": 7}, "context"), ({"rate": 0}, "rate"),
        ({"rate": 1}, "rate"), ({"momentum": 1}, "momentum"), ({"outer_rate": 0}, "outer_rate"),
        ({"accumulation": True}, "accumulation"), ({"probation": 0}, "probation"), ({"absent_max": 0}, "absent_max"),
        ({"founders": "x"}, "founders"), ({"stepps": 1}, "stepps"), ({"codec": 4}, "codec"),
    ],
    ids=str,
)  # fmt: skip
def test_a_field_that_does_not_fit_is_named(changes: dict[str, Any], field: str) -> None:
    asked = msgspec.json.encode({"name": "tales", "data": ["/x"], **changes})
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.json.decode(asked, type=Begin)


def test_what_is_left_out_has_a_default() -> None:
    asked = msgspec.json.decode(b'{"name":"tales","data":["/x"]}', type=Begin)
    assert asked == Begin(name="tales", data=("/x",))
    assert (asked.codec, asked.rule, asked.steps) == (None, "adaptive", 20)
    with pytest.raises(msgspec.ValidationError, match="run"):
        msgspec.json.decode(b'{"data":["/x"]}', type=Join)


def test_paths_are_kept_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute(("a.txt", "~/b", "/c")) == (f"{tmp_path}/a.txt", f"{tmp_path}/b", "/c")
