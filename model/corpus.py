"""Text for training and held-out evaluation: how a corpus is split, and simple baselines to compare a model with.

Rules: the split is a pure function of the text, so that a figure can be made again by anyone who has the text.
Source: ../shared/data/README.md gives the hold-out rule (last book, every 20th 8 KiB block of the others).
"""

from __future__ import annotations

import lzma
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BOOK_BREAK = "\n\n\n"
HELD_OUT_BLOCK_CHARS = 8192
HELD_OUT_EVERY = 20
_TITLE_CHARS_MAX = 70


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Training and held-out passages; each passage is contiguous text of one book."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, plain or .xz. Raises OSError, UnicodeDecodeError, lzma.LZMAError."""
    if path.suffix == ".xz":
        with lzma.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    return path.read_text(encoding="utf-8")


def split_corpus(text: str) -> Split:
    """Hold out the last book and every 20th 8 KiB block of the others."""
    books = [book for book in text.split(BOOK_BREAK) if book.strip()]
    train: list[str] = []
    held_out: list[str] = []
    for book in books[:-1]:
        run_start = 0
        for number, start in enumerate(range(0, len(book), HELD_OUT_BLOCK_CHARS)):
            if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1:
                train.append(book[run_start:start])
                run_start = start + HELD_OUT_BLOCK_CHARS
                held_out.append(book[start:run_start])
        train.append(book[run_start:])
    held_out.append(books[-1])
    return Split(train=tuple(p for p in train if p.strip()), held_out=tuple(held_out))


def split_tales(passage: str) -> Iterator[str]:
    """Cut a passage at headings in capitals, so that each piece starts as a tale starts."""
    tale: list[str] = []
    for paragraph in passage.split("\n\n"):
        if _is_title(paragraph) and sum(map(len, tale)) > 2000:
            yield "\n\n".join(tale)
            tale = []
        tale.append(paragraph)
    if tale:
        yield "\n\n".join(tale)


def _is_title(paragraph: str) -> bool:
    line = paragraph.strip()
    capitals = bool(re.search("[A-Z]{3}", line)) and line.upper() == line
    return 6 < len(line) < _TITLE_CHARS_MAX and capitals and not line.startswith(('"', "'", "["))


def unigram_bits_per_byte(train: bytes, held_out: bytes) -> float:
    """Bits per byte of held-out text under byte frequencies of the training text, add-one smoothed."""
    counts = Counter(train)
    total = len(train) + 256
    return -sum(math.log2((counts[byte] + 1) / total) for byte in held_out) / len(held_out)


def ngram_bits_per_byte(train: bytes, held_out: bytes, *, order: int) -> float:
    """Bits per byte of held-out text under a byte n-gram model with Witten-Bell interpolation.

    Source: Witten and Bell 1991, The zero-frequency problem; interpolated down to uniform over 256 bytes.
    """
    counts: list[dict[bytes, Counter[int]]] = [defaultdict(Counter) for _ in range(order)]
    for width in range(order):
        table = counts[width]
        for end in range(width, len(train)):
            table[train[end - width : end]][train[end]] += 1
    totals = [{context: sum(seen.values()) for context, seen in table.items()} for table in counts]
    bits = 0.0
    for end in range(len(held_out)):
        byte, probability = held_out[end], 1 / 256
        for width in range(min(order, end + 1)):
            context = held_out[end - width : end]
            seen = counts[width].get(context)
            if seen is None:
                break
            kinds, total = len(seen), totals[width][context]
            probability = (seen[byte] + kinds * probability) / (total + kinds)
        bits -= math.log2(probability)
    return bits / len(held_out)
