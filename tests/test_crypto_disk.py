"""crypto/disk.py: whole or not at all, whatever fails and wherever it is killed; what is damaged is moved aside."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto.disk import ASIDE_MAX, StateFile, System, whole_folder, write_whole
from crypto.errors import BadState

ROOT = Path(__file__).parent.parent
BYTES_MAX = 1000
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes and signals")


class Breaking(System):
    """Fails the call of one number with one errno; takes few bytes at a time, as a disk that is nearly full."""

    def __init__(self, at: int, code: int, *, forever: bool = False) -> None:
        self.at, self.code, self.forever, self.calls = at, code, forever, 0

    def _next(self) -> None:
        self.calls += 1
        if self.calls == self.at or (self.forever and self.calls > self.at):
            raise OSError(self.code, os.strerror(self.code))

    def create(self, path: Path, mode: int) -> int:
        self._next()
        return super().create(path, mode)

    def write(self, handle: int, content: memoryview) -> int:
        self._next()
        return super().write(handle, content[:40])

    def sync(self, handle: int) -> None:
        self._next()
        super().sync(handle)

    def rename(self, old: Path, new: Path) -> None:
        self._next()
        super().rename(old, new)

    def sync_folder(self, path: Path) -> None:
        self._next()
        super().sync_folder(path)


def file_at(
    path: Path,
    system: System | None = None,
    version: int = 1,
    kind: str = "test_state",
    bytes_max: int = BYTES_MAX,
) -> StateFile:
    times = iter(range(1_800_000_000, 1_900_000_000))
    return StateFile(
        path,
        kind=kind,
        version=version,
        bytes_max=bytes_max,
        system=system or System(),
        wall_clock_s=lambda: float(next(times)),
    )


def identical(raw: bytes) -> bytes:
    return raw


def content(path: Path) -> bytes | None:
    return file_at(path).read(identical)


def test_what_is_written_is_read_and_nothing_is_left_beside(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state"
    for raw in (b"", b"one\ntwo", b"x" * BYTES_MAX):
        assert file_at(path).write(raw)
        assert content(path) == raw
        assert [item.name for item in path.parent.iterdir()] == ["state"]
    assert file_at(tmp_path / "none").read(identical) is None


@posix
def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state"
    before = os.umask(0)
    try:
        file_at(path).write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@posix
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_failure_of_any_call_leaves_the_old_or_the_new_and_is_said_until_it_works(tmp_path: Path, code: int) -> None:
    path, at = tmp_path / "state", 0
    assert file_at(path).write(b"old" * 50)
    while True:
        at += 1
        disk = Breaking(at, code)
        file = file_at(path, disk)
        new = b"new %d " % at * 20
        before = content(path)
        if file.write(new):
            break
        assert disk.calls == at, "a call after the one that failed"
        assert content(path) in (before, new)
        assert [item.name for item in tmp_path.iterdir()] == ["state"]
        told = file.status()
        reason = {errno.ENOSPC: "no_space", errno.EIO: "io_error", errno.EROFS: "read_only"}[code]
        assert (told.reason, told.failures, told.writes) == (reason, {reason: 1}, 0)
        assert os.strerror(code) in told.problem
        assert str(path) in told.problem
        assert told.since_s == 1_800_000_000
        assert file.write(new), "it works again"
        told = file.status()
        assert (told.problem, told.reason, told.since_s, told.failures) == ("", "", None, {reason: 1})
        assert content(path) == new
    assert at > 8, "create, several writes, sync, rename, sync of the folder"


def test_content_is_flushed_before_its_name_and_the_name_before_it_is_promised(tmp_path: Path) -> None:
    calls: list[str] = []

    class Recording(System):
        def write(self, handle: int, content: memoryview) -> int:
            calls.append("write")
            return super().write(handle, content)

        def sync(self, handle: int) -> None:
            calls.append("sync")

        def rename(self, old: Path, new: Path) -> None:
            calls.append("rename")
            super().rename(old, new)

        def sync_folder(self, path: Path) -> None:
            calls.append(f"sync {path.name}")

    assert file_at(tmp_path / "folder" / "state", Recording()).write(b"x")
    assert calls == ["write", "sync", "rename", "sync folder"]


@posix
def test_a_flush_that_failed_is_never_believed(tmp_path: Path) -> None:
    """After a failed fsync the kernel may call the same pages clean: only a new file can be trusted."""
    created: list[Path] = []

    class Lying(System):
        failed = False

        def create(self, path: Path, mode: int) -> int:
            created.append(path)
            return super().create(path, mode)

        def sync(self, handle: int) -> None:
            if not self.failed:
                self.failed = True
                raise OSError(errno.EIO, "Input/output error")

    file = file_at(tmp_path / "state", Lying())
    assert not file.write(b"x")
    assert file.write(b"x")
    assert len(set(created)) == 2


def test_a_failure_that_lasts_is_logged_once_and_counted_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Breaking(0, errno.ENOSPC, forever=True)
    file = file_at(tmp_path / "state", disk)
    for _ in range(50):
        assert not file.write(b"x")
    assert file.status().failures == {"no_space": 50}
    assert file.status().since_s == 1_800_000_000
    disk.code = errno.EIO
    assert not file.write(b"x")
    assert file.status().reason == "io_error"
    assert file.status().since_s == 1_800_000_000, "the trouble is as old as before"
    disk.forever = False
    assert file.write(b"x")
    assert len(caplog.records) == 3


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    file = file_at(tmp_path / "state")
    assert not file.write(b"x" * (BYTES_MAX + 1))
    assert file.status().reason == "file_size_limit"
    assert not (tmp_path / "state").exists()


# --- what is found at start ---


@pytest.mark.slow
def test_nothing_damaged_is_ever_taken_for_a_state(tmp_path: Path) -> None:
    """Cut at every length, one byte changed at every place: all found out, moved aside, kept as they were."""
    path = tmp_path / "state"
    file_at(path).write(b'{"sequence": 17, "bans": []}')
    whole = path.read_bytes()
    damaged = [whole[:size] for size in range(len(whole))]
    damaged += [
        whole[:at] + bytes((whole[at] ^ bit,)) + whole[at + 1 :] for at in range(len(whole)) for bit in (1, 128)
    ]
    damaged += [whole + b"\n", b"\0" * len(whole)]
    for raw in damaged:
        path.write_bytes(raw)
        file = file_at(path)
        assert file.read(identical) is None, raw
        aside = path.with_name("state.corrupt-1")
        assert aside.read_bytes() == raw
        assert not path.exists()
        told = file.status()
        assert "state.corrupt-1" in told.set_aside
        assert told.problem == ""
        aside.unlink()


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_no_bytes_raise(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "state"
    path.write_bytes(raw)
    assert file_at(path).read(identical) is None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: file_at(path, version=2).write(b"x"), "a newer node wrote it"),
        (lambda path: file_at(path, kind="other_state").write(b"x"), "it holds 'other_state'"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: path.write_bytes(b"x" * (1 << 20)), "1257 bytes"),
        (lambda path: file_at(path, bytes_max=BYTES_MAX + 1).write(b"x" * (BYTES_MAX + 1)), "it has over 1000 bytes"),
    ],
    ids=["newer", "other", "folder", "huge", "over"],
)
def test_what_stands_in_the_place_is_said_and_moved(tmp_path: Path, make: Callable[[Path], object], said: str) -> None:
    path = tmp_path / "state"
    make(path)
    file = file_at(path)
    assert file.read(identical) is None
    assert said in file.status().set_aside
    assert file.write(b"mine")
    assert content(path) == b"mine"
    assert (tmp_path / "state.corrupt-1").exists()


@posix
def test_a_pipe_in_the_place_hangs_nobody(tmp_path: Path) -> None:
    path = tmp_path / "state"
    os.mkfifo(path)
    file = file_at(path)
    assert file.read(identical) is None
    assert "not a regular file" in file.status().set_aside


def test_a_decoder_that_refuses_moves_it_aside(tmp_path: Path) -> None:
    def refuse(raw: bytes) -> bytes:
        raise BadState("not what was meant")

    file_at(tmp_path / "state").write(b"x")
    file = file_at(tmp_path / "state")
    assert file.read(refuse) is None
    assert "not what was meant" in file.status().set_aside


@pytest.mark.slow
def test_each_damaged_file_is_kept_and_then_none_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for number in range(1, ASIDE_MAX + 1):
        path.write_bytes(b"damaged %d" % number)
        assert file_at(path).read(identical) is None
    path.write_bytes(b"one too many")
    file = file_at(path)
    assert file.read(identical) is None
    assert not file.write(b"mine"), "it would have overwritten what nobody has looked at"
    assert path.read_bytes() == b"one too many"
    assert "damaged files stand beside it" in file.status().problem
    (tmp_path / "state.corrupt-7").unlink()
    assert file.write(b"mine")
    assert (tmp_path / "state.corrupt-7").read_bytes() == b"one too many"
    assert {(tmp_path / f"state.corrupt-{n}").read_bytes() for n in (1, 2, 100)} == {
        b"damaged 1",
        b"damaged 2",
        b"damaged 100",
    }


def test_what_cannot_be_moved_yet_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"damaged")
    disk = Breaking(0, errno.EROFS, forever=True)
    file = file_at(path, disk)
    assert file.read(identical) is None
    assert not file.write(b"mine")
    assert path.read_bytes() == b"damaged"
    assert file.status().reason == "read_only"
    disk.forever = False
    assert file.write(b"mine")
    assert (tmp_path / "state.corrupt-1").read_bytes() == b"damaged"
    assert (file.status().problem, content(path)) == ("", b"mine")


def test_what_cannot_be_read_is_moved_aside_not_lost(tmp_path: Path) -> None:
    class Unreadable(System):
        def read(self, path: Path, bytes_max: int) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "state"
    file_at(path).write(b"x")
    file = file_at(path, Unreadable())
    assert file.read(identical) is None
    assert "cannot be read: Input/output error" in file.status().set_aside
    assert file.status().failures == {"io_error": 1}
    assert (tmp_path / "state.corrupt-1").exists()


def test_what_a_kill_left_beside_is_swept_at_start(tmp_path: Path) -> None:
    (tmp_path / ".state.tmp-1-00000000").write_bytes(b"half")
    (tmp_path / ".other.tmp-1-00000000").write_bytes(b"not ours")
    assert content(tmp_path / "state") is None
    assert [item.name for item in tmp_path.iterdir()] == [".other.tmp-1-00000000"]


@posix
def test_a_failure_of_any_call_leaves_a_whole_folder_or_none(tmp_path: Path) -> None:
    for at in range(1, 20):
        (path := tmp_path / f"{at}" / "out").parent.mkdir()
        system = Breaking(at, errno.ENOSPC)
        try:
            with whole_folder(path, system=system) as folder:
                assert not path.exists()
                (folder / "inner").mkdir()
                for name in ("one", "inner/two"):
                    (folder / name).write_bytes(b"content")
        except OSError:
            pass
        names = [each.relative_to(path.parent).as_posix() for each in sorted(path.parent.rglob("*"))]
        assert names in ([], ["out", "out/inner", "out/inner/two", "out/one"])
        if system.calls < at:
            break
    assert at > 6, "two files, two folders, the rename, the parent's sync"


def test_a_folder_whose_writer_fails_is_not_there_and_one_with_content_stays(tmp_path: Path) -> None:
    def write(path: Path, fault: Exception | None) -> None:
        with whole_folder(path) as folder:
            (folder / "one").write_bytes(b"content")
            if fault is not None:
                raise fault

    with pytest.raises(ValueError, match="no"):
        write(tmp_path / "a", ValueError("no"))
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "a", None)
    with pytest.raises(OSError, match="not empty"):
        write(tmp_path / "a", None)
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "one"]


def test_write_whole_can_refuse_to_replace(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_whole(path, b"first", over=False)
    with pytest.raises(FileExistsError):
        write_whole(path, b"second", over=False)
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


@posix
@pytest.mark.slow
def test_a_limit_on_file_sizes_is_a_sentence_and_no_death(tmp_path: Path) -> None:
    """RLIMIT_FSIZE, the one full disk that needs no root: the second write is too large, the third is not."""
    script = (
        "import resource, sys; from pathlib import Path; from crypto.disk import StateFile\n"
        "file = StateFile(Path(sys.argv[1]), kind='test_state', version=1, bytes_max=1 << 20)\n"
        "assert file.write(b'x' * 1000)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "assert not file.write(b'y' * 100_000), 'over the limit'\n"
        "told = file.status()\n"
        "assert told.reason == 'file_size_limit' and 'ulimit -f' in told.problem, told\n"
        "assert file.read(bytes) == b'x' * 1000\n"
        "assert file.write(b'z') and not file.status().problem\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "state")], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert child.returncode == 0, child.stderr
    assert [item.name for item in tmp_path.iterdir()] == ["state"]


# The child is killed by itself at the n-th line that a write runs, so that every place of a kill is met once.
KILL_AT_EACH_LINE = """
import os, signal, sys
from pathlib import Path
from crypto.disk import StateFile

def state(path):
    return StateFile(path, kind="test_state", version=1, bytes_max=1000)

def killed_at(n, path):
    lines = 0
    def count(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename.endswith("disk.py"):
            lines += event == "line"
            if lines == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return count
        return None
    state(path).write(b"old")
    child = os.fork()
    if child == 0:
        file = state(path)
        sys.settrace(count)
        file.write(b"new")
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

n = 1
while killed_at(n, Path(sys.argv[1], str(n), "state")):
    n += 1
print(n - 1)
"""


@posix
@pytest.mark.slow
def test_a_kill_at_any_line_of_a_write_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", KILL_AT_EACH_LINE, str(tmp_path)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert child.returncode == 0, child.stderr[-500:]
    kills = int(child.stdout)
    assert kills >= 30, "the tracing found no lines to kill at"
    found = []
    for n in range(1, kills + 1):
        path = tmp_path / str(n) / "state"
        file = file_at(path)
        found.append(file.read(identical))
        assert file.status().set_aside == ""
        assert [item.name for item in path.parent.iterdir()] == ["state"]
    assert set(found) == {b"old", b"new"}
    assert found == sorted(found, key=lambda raw: raw == b"new"), "once new, never old again"
