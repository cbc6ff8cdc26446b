"""The operator's own text: which files it is made of, and the token ids that they become.

Rules: .txt, .md and .jsonl files (a text in the field "text" of each line), also as .xz; whatever else lies in a folder
is skipped and told. A file is a document, a line of .jsonl is one; the model's end token follows each. Texts are read
and tokenised a piece at a time, so that a caller can show how far it is and stop between two pieces, and only token ids
are kept, TOKENS_MAX of them at most. The ids, and so the digest, depend on files and tokenizer alone, not on how they
were read. Each fault names the file, and the byte or line where it has one.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import lzma
import os
from array import array
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec
import torch

from model.errors import BadInput, BadText, first_line
from model.tokens import Tokens

KINDS = (".txt", ".md", ".jsonl")
FILES_MAX = 100_000
SKIPPED_MAX = 20  # named; the rest are counted
TOKENS_MAX = 1 << 28  # 1 GiB of ids: months of training for a volunteer's machine
LINE_BYTES_MAX = 16 << 20  # of .jsonl: a line is parsed as a whole
PIECE_CHARS = 32_768  # tokenised at once: some 10 ms
READ_BYTES = 65_536
NARROW_IDS = 1 << 16  # ids below this are kept in two bytes
DIGEST_IDS = 1 << 20  # hashed at once
DIGEST_DOMAIN = b"openagi training text 1\0"
BYTE_ORDER_MARK = "\ufeff"
Result = TypeVar("Result")


class _Line(msgspec.Struct):
    """What counts in a line of .jsonl; other fields may stand beside it."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Files that will be read, in order; skipped: those that are no text, SKIPPED_MAX of skipped_count."""

    files: tuple[Path, ...]
    skipped: tuple[Path, ...]
    skipped_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How far the reading is: files opened, bytes of them on disk, tokens made."""

    files: int
    files_total: int
    bytes_read: int
    bytes_total: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingText:
    """Token ids of all documents. ids_N is uint16 or int32; text_bytes are those of the text as UTF-8, uncompressed;
    digest (32 bytes) is for records: whoever has the same text can tell, nobody can read it."""

    ids_N: torch.Tensor  # noqa: N815  # the suffix is its shape
    text_bytes: int
    documents: int
    digest: bytes


def find_texts(paths: Sequence[Path]) -> Sources:
    """The text files among these and in the folders among these, each once; hidden folders are skipped.

    Raises BadText: a path that is not there, no text at all, too many files.
    """
    found: dict[Path, Path] = {}
    skipped: list[Path] = []
    skipped_count = 0
    for path in paths:
        for file in _files_of(path.expanduser()):
            if _kind(file) in KINDS and file.is_file():
                found.setdefault(file.resolve(), file)
            else:
                skipped_count += 1
                skipped += [file] if len(skipped) < SKIPPED_MAX else []
            if len(found) + skipped_count > FILES_MAX:
                raise BadText(f"{path} brings the files to over {FILES_MAX:,}; put the text into fewer, larger ones")
    if not found:
        where = ", ".join(map(str, paths[:3])) or "no path"
        raise BadText(
            f"there is no text in {where}: {skipped_count:,} files, none ends in {' '.join(KINDS)} or these with .xz"
        )
    return Sources(files=tuple(found.values()), skipped=tuple(skipped), skipped_count=skipped_count)


def read_texts(sources: Sources, tokens: Tokens) -> Generator[Reading, None, TrainingText]:
    """Reads and tokenises, some 10 ms of work between two yields; returns the text. Closing it drops all.

    Raises BadText: unreadable, not UTF-8, not .jsonl, empty, over TOKENS_MAX, refused by the tokenizer.
    """
    ids = array("H" if tokens.size <= NARROW_IDS else "i")
    assert ids.itemsize == (2 if tokens.size <= NARROW_IDS else 4), "array's C types have other sizes here"
    text_bytes, documents, read_before, begin = 0, 0, 0, 0
    sizes = [_size(file) for file in sources.files]
    for number, file in enumerate(sources.files):
        with _opened(file) as (raw, stream):
            for piece in _pieces(file, stream):
                if piece is not None:
                    ids.extend(_encoded(file, piece, tokens))
                    text_bytes += len(piece.encode())
                elif len(ids) > begin:  # an empty document needs no end
                    ids.extend(() if tokens.end_token is None else (tokens.end_token,))
                    documents, begin = documents + 1, len(ids)
                if len(ids) > TOKENS_MAX:
                    raise BadText(f"{file} brings the text to over {TOKENS_MAX:,} tokens; give fewer files")
                yield Reading(
                    files=number + 1,
                    files_total=len(sizes),
                    bytes_read=read_before + raw.tell(),
                    bytes_total=sum(sizes),
                    tokens=len(ids),
                )
        read_before += sizes[number]
    if not ids:
        raise BadText(f"the text is empty: no words in {len(sizes):,} files, such as {sources.files[0]}")
    ids_N = torch.frombuffer(ids, dtype=torch.uint16 if ids.itemsize == 2 else torch.int32)
    return text_of(ids_N, text_bytes=text_bytes, documents=documents)


def finish(reading: Generator[object, None, Result]) -> Result:
    """Runs to the end what could be done a hop at a time."""
    while True:
        try:
            next(reading)
        except StopIteration as end:
            result: Result = end.value
            return result


def text_of(ids_N: torch.Tensor, *, text_bytes: int, documents: int) -> TrainingText:
    """A training text of ids that are there already (uint16 or int32), under the digest that they have in either."""
    total = hashlib.sha256(DIGEST_DOMAIN)
    for begin in range(0, len(ids_N), DIGEST_IDS):
        total.update(ids_N[begin : begin + DIGEST_IDS].numpy().astype("<i4").tobytes())
    return TrainingText(ids_N=ids_N, text_bytes=text_bytes, documents=documents, digest=total.digest())


def _encoded(file: Path, piece: str, tokens: Tokens) -> Sequence[int]:
    try:
        return tokens.encode_piece(piece)
    except BadInput as exc:
        raise BadText(f"{file}: {exc}") from exc


def _kind(file: Path) -> str:
    name = file.name.lower().removesuffix(".xz")
    return Path(name).suffix


def _files_of(path: Path) -> Iterator[Path]:
    """The path itself, or the files below it in an order that is the same on every machine. Raises BadText."""
    if not path.exists():
        raise BadText(f"there is no file or folder {path}; check the path")
    if not path.is_dir():
        yield path
        return

    def refuse(exc: OSError) -> None:
        raise BadText(f"the folder {exc.filename} cannot be read ({exc.strerror}); check its permissions") from exc

    for folder, folders, files in os.walk(path, onerror=refuse):
        unseen = [name for name in folders if name.startswith(".") or Path(folder, name).is_symlink()]
        folders[:] = sorted(set(folders).difference(unseen))
        yield from (Path(folder, name) for name in sorted((*files, *unseen)))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as exc:
        raise BadText(f"{file} cannot be read ({exc.strerror}); it was there a moment ago") from exc


@contextmanager
def _opened(file: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(the file as on disk, its text uncompressed). Raises BadText, also for what fails while it is read."""
    try:
        with file.open("rb") as raw:
            if file.suffix.lower() == ".xz":
                with lzma.LZMAFile(raw) as stream:
                    yield raw, stream  # type: ignore[misc]  # has read and readline, which are all that is used
            else:
                yield raw, raw
    except (lzma.LZMAError, EOFError) as exc:
        raise BadText(f"{file} is no whole .xz file ({first_line(exc)}); compress it again") from exc
    except OSError as exc:
        raise BadText(f"{file} cannot be read ({exc.strerror}); check its permissions") from exc


def _pieces(file: Path, stream: BinaryIO) -> Iterator[str | None]:
    """The text in pieces of at most PIECE_CHARS; None ends a document. Raises BadText."""
    if _kind(file) != ".jsonl":
        yield from _cut(_decoded(file, stream))
        yield None
        return
    for text in _lines(file, stream):
        yield from _cut(iter((text,)))
        yield None


def _decoded(file: Path, stream: BinaryIO) -> Iterator[str]:
    """Text as it is read, its line ends as "\\n"."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(utf8, translate=True)
    begin = 0
    while True:
        raw = stream.read(READ_BYTES)
        try:
            text = newlines.decode(raw, final=not raw)
        except UnicodeDecodeError as exc:
            raise _not_utf8(file, begin - len(utf8.getstate()[0]) + exc.start) from exc
        yield text.removeprefix(BYTE_ORDER_MARK) if begin == 0 else text
        begin += len(raw)
        if not raw:
            return


def _lines(file: Path, stream: BinaryIO) -> Iterator[str]:
    """The texts of a .jsonl file's lines."""
    decoder = msgspec.json.Decoder(_Line)
    begin, number = 0, 0
    while line := stream.readline(LINE_BYTES_MAX + 1):
        number += 1
        if len(line) > LINE_BYTES_MAX:
            raise BadText(f"{file}: line {number:,} is longer than {LINE_BYTES_MAX:,} bytes; split it")
        try:
            plain = line.decode()
        except UnicodeDecodeError as exc:
            raise _not_utf8(file, begin + exc.start) from exc
        if plain := plain.removeprefix(BYTE_ORDER_MARK).strip():
            try:
                yield decoder.decode(plain).text
            except (msgspec.DecodeError, RecursionError) as exc:
                raise BadText(
                    f'{file}: line {number:,} is no JSON object with a text in its field "text" ({first_line(exc)})'
                ) from exc
        begin += len(line)


def _not_utf8(file: Path, byte: int) -> BadText:
    return BadText(f"{file}: byte {byte:,} is not UTF-8; save the file as UTF-8, or leave it out")


def _cut(texts: Iterator[str]) -> Iterator[str]:
    """The same text in pieces: behind a line end if one is near, else before a space, else anywhere."""
    kept = ""
    for text in texts:
        kept += text
        begin = 0
        while len(kept) - begin > PIECE_CHARS:
            half, whole = begin + PIECE_CHARS // 2, begin + PIECE_CHARS
            end = kept.rfind("\n", half, whole) + 1 or kept.rfind(" ", half, whole)
            end = end if end > half else whole
            yield kept[begin:end]
            begin = end
        kept = kept[begin:]
    if kept:
        yield kept
