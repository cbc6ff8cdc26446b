"""The operator's text: what is read, what is refused and in which words, and rows that are a function of the seed."""

from __future__ import annotations

import json
import lzma
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from model import data
from model.batches import HELD_OUT_EVERY, Batches, permuted
from model.data import PIECE_CHARS, Reading, TrainingText, find_texts, finish, read_texts, text_of
from model.errors import BadText
from model.tokens import Tokens
from tests.tiny_models import END, byte_tokenizer, sentencepiece_tokenizer

TALE = "Once upon a time there was a king who had a daughter.\n"


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return Tokens(byte_tokenizer())


def read(tokens: Tokens, *paths: Path) -> TrainingText:
    return finish(read_texts(find_texts(paths), tokens))


def text_in(text: TrainingText, tokens: Tokens) -> list[str]:
    """The documents, told apart by the end tokens."""
    documents: list[list[int]] = [[]]
    for token in text.ids_N.tolist():
        if token == tokens.end_token:
            documents.append([])
        else:
            documents[-1].append(token)
    assert documents.pop() == []  # the last document has its end token too
    return [tokens.decode(ids) for ids in documents]


def test_a_folder_is_read_in_one_order_and_what_is_no_text_is_told(tmp_path: Path, tokens: Tokens) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "notes.txt").write_text("hidden")
    (tmp_path / "b" / "one.md").write_text("one")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "0.txt").write_text("two")
    (tmp_path / "z.TXT").write_text("zed")
    (tmp_path / "picture.png").write_bytes(b"\xff")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress("ä".encode()))
    (tmp_path / "empty.txt").write_text("")
    sources = find_texts([tmp_path, tmp_path / "z.TXT"])
    assert [file.name for file in sources.files] == ["a.txt.xz", "empty.txt", "z.TXT", "one.md", "0.txt"]
    assert sorted(file.name for file in sources.skipped) == [".git", "picture.png"]
    assert sources.skipped_count == 2
    text = finish(read_texts(sources, tokens))
    assert text_in(text, tokens) == ["ä", "zed", "one", "two"]
    assert (text.documents, text.text_bytes) == (4, 11)


def test_a_link_to_a_folder_is_not_walked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "again").symlink_to(tmp_path)
    sources = find_texts([tmp_path])
    assert len(sources.files) == 1
    assert [file.name for file in sources.skipped] == ["again"]


def test_each_line_of_jsonl_is_a_document(tmp_path: Path, tokens: Tokens) -> None:
    lines = [json.dumps({"text": "König", "id": 1}), "", json.dumps({"text": "a\nb"}, ensure_ascii=False)]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\r\n".join(lines))
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(b'{"text": "c"}\n{"text": ""}\n'))
    text = read(tokens, tmp_path)
    assert text_in(text, tokens) == ["König", "a\nb", "c"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"txt": "a"}', 'line 2 is no JSON object with a text in its field "text"'),
        ('{"text": 3}', "line 2 is no JSON object"),
        ('["text"]', "line 2 is no JSON object"),
        ("[" * 100_000, "line 2 is no JSON object"),
        ('{"text": "\\ud800"}', "line 2 is no JSON object"),
        ('{"text": "' + "a" * 100 + '"}', "line 2 is longer than 64 bytes"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(
    tmp_path: Path, tokens: Tokens, line: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "longer" in words:
        monkeypatch.setattr(data, "LINE_BYTES_MAX", 64)
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(BadText, match=r"a\.jsonl: ") as caught:
        read(tokens, tmp_path)
    assert words in str(caught.value)


def test_text_that_is_not_utf8_names_file_and_byte(
    tmp_path: Path, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "READ_BYTES", 512)
    half = ("ä" * 400).encode()[1:]
    cases = {"a.txt": b"abc\xff", "b.txt": half, "c.txt": b"x" + "ä ".encode() * 400 + b"\xc3", "d.jsonl": b'\n{"\xff'}
    wanted = {"a.txt": 3, "b.txt": 0, "c.txt": 1_201, "d.jsonl": 3}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadText, match=rf"{name}: byte {wanted[name]:,} is not UTF-8"):
            read(tokens, tmp_path / name)


def test_a_letter_across_two_reads_is_whole(tmp_path: Path, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "READ_BYTES", 7)
    written = "ä 🙂\r\n" * 20 + "end\r"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + written.encode())
    assert text_in(read(tokens, tmp_path), tokens) == [written.replace("\r\n", "\n").replace("\r", "\n")]


def test_each_fault_is_one_sentence(tmp_path: Path, tokens: Tokens) -> None:
    with pytest.raises(BadText, match=r"there is no file or folder .*missing; check the path"):
        find_texts([tmp_path / "missing"])
    (tmp_path / "a.pdf").write_bytes(b"")
    with pytest.raises(BadText, match=r"there is no text in .*: 1 files, none ends in \.txt \.md \.jsonl"):
        find_texts([tmp_path])
    with pytest.raises(BadText, match="there is no text in no path"):
        find_texts([])
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(BadText, match="the text is empty"):
        read(tokens, tmp_path)
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(TALE.encode() * 100)[:-20])
    with pytest.raises(BadText, match=r"b\.txt\.xz is no whole \.xz file"):
        read(tokens, tmp_path)
    (tmp_path / "b.txt.xz").write_bytes(b"no xz")
    with pytest.raises(BadText, match=r"b\.txt\.xz is no whole \.xz file"):
        read(tokens, tmp_path)


def test_a_file_that_goes_away_while_it_is_read_is_told(tmp_path: Path, tokens: Tokens) -> None:
    (tmp_path / "a.txt").write_text(TALE)
    sources = find_texts([tmp_path])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(BadText, match=r"a\.txt cannot be read \(No such file"):
        finish(read_texts(sources, tokens))


def test_files_and_tokens_have_bounds(tmp_path: Path, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(TALE)
    monkeypatch.setattr(data, "TOKENS_MAX", 30)
    with pytest.raises(BadText, match=r"\.txt brings the text to over 30 tokens; give fewer files"):
        read(tokens, tmp_path)
    monkeypatch.setattr(data, "FILES_MAX", 2)
    with pytest.raises(BadText, match="brings the files to over 2"):
        find_texts([tmp_path])


def test_reading_shows_how_far_it_is_and_can_be_stopped(tmp_path: Path, tokens: Tokens) -> None:
    (tmp_path / "a.txt").write_text(TALE * 2_000)
    (tmp_path / "b.txt").write_text(TALE)
    seen = list(read_texts(find_texts([tmp_path]), tokens))
    assert len(seen) > 2_000 * len(TALE) / PIECE_CHARS
    assert seen == sorted(seen, key=lambda reading: (reading.bytes_read, reading.tokens))
    last = Reading(files=2, files_total=2, bytes_read=2_001 * 54, bytes_total=2_001 * 54, tokens=seen[-1].tokens)
    assert seen[-1] == last
    reading = read_texts(find_texts([tmp_path]), tokens)
    next(reading)
    reading.close()


def test_equal_text_has_equal_digest_however_it_is_read(
    tmp_path: Path, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text((TALE + "Größe 🙂 ") * 1_500)
    text = read(tokens, tmp_path)
    monkeypatch.setattr(data, "READ_BYTES", 777)
    again = read(tokens, tmp_path)
    assert torch.equal(text.ids_N, again.ids_N)
    assert text.digest == again.digest
    wide = text_of(text.ids_N.to(torch.int32), text_bytes=1, documents=1)
    assert wide.digest == text.digest
    (tmp_path / "a.txt").write_text((TALE + "Größe 🙂 ") * 1_499 + TALE + "Größe 🙃 ")
    assert read(tokens, tmp_path).digest != text.digest


@settings(max_examples=30)
@given(st.text(st.sampled_from("ab \n"), max_size=60))
def test_pieces_are_the_text(written: str) -> None:
    pieces = list(data._cut(iter((written[:7], written[7:]))))
    assert "".join(pieces) == written
    assert all(0 < len(piece) <= PIECE_CHARS for piece in pieces)


def test_a_long_text_is_cut_between_words() -> None:
    pieces = list(data._cut(iter(("word " * 20_000,))))
    assert "".join(pieces) == "word " * 20_000
    assert max(map(len, pieces)) <= PIECE_CHARS
    assert all(piece.startswith(" ") for piece in pieces[1:])
    assert [len(piece) for piece in data._cut(iter(("x" * (PIECE_CHARS + 5),)))] == [PIECE_CHARS, 5]


def test_a_tokenizer_that_wraps_texts_wraps_no_piece(tmp_path: Path) -> None:
    wrapping = sentencepiece_tokenizer()
    wrapping._tokenizer.post_processor = TemplateProcessing(single=f"{END} $A {END}", special_tokens=[(END, 0)])
    spaced = Tokens(wrapping)
    assert spaced.encode("a")[0] == spaced.end_token
    (tmp_path / "a.txt").write_text("once upon a time")
    assert text_in(read(spaced, tmp_path), spaced) == ["once upon a time"]


def counted(rows: int, context: int = 3, spare: int = 0) -> TrainingText:
    """A text whose row i starts with token i * (context + 1)."""
    return text_of(torch.arange(rows * (context + 1) + spare, dtype=torch.int32), text_bytes=1, documents=1)


@settings(max_examples=30)
@given(st.integers(1, 3_000), st.binary(min_size=1, max_size=32))
def test_an_order_is_a_permutation(count: int, key: bytes) -> None:
    some = range(0, count, 1 if count < 200 else 17)
    placed = {permuted(index, count, key) for index in some}
    assert len(placed) == len(some)
    assert min(placed) >= 0
    assert max(placed) < count


@settings(max_examples=20)
@given(st.integers(20, 130), st.integers(1, 7), st.integers(0, 2**63 - 1))
def test_an_epoch_shows_each_row_once_and_none_that_is_held_out(rows: int, batch_rows: int, seed: int) -> None:
    batches = Batches(counted(rows, spare=2), context=3, rows=batch_rows)
    steps = -(-batches.training_rows // batch_rows)
    drawn = torch.cat([batches.batch(seed, step) for step in range(steps)])[: batches.training_rows]
    held_out = batches.held_out(1_000)
    assert drawn.shape == (batches.training_rows, 4)
    assert drawn.dtype == torch.int64
    assert sorted(torch.cat([drawn, held_out])[:, 0].tolist()) == list(range(0, rows * 4, 4))
    assert held_out[:, 0].tolist() == [4 * place for place in range(HELD_OUT_EVERY - 1, rows, HELD_OUT_EVERY)]
    assert torch.equal(drawn, drawn[:, :1] + torch.arange(4))


def test_a_batch_is_a_function_of_text_seed_and_step() -> None:
    batches, again = Batches(counted(200), context=3, rows=4), Batches(counted(200), context=3, rows=4)
    for step in (60, 3, 59):  # in any order, over the end of an epoch, as after a restart
        assert torch.equal(batches.batch(7, step), again.batch(7, step))
    even = Batches(counted(200), context=3, rows=5)
    epoch = even.training_rows // 5
    orders = {
        tuple(int(row[0]) for step in range(begin, begin + epoch) for row in source.batch(seed, step))
        for source, seed, begin in (
            (even, 7, 0),
            (even, 8, 0),
            (even, 7, epoch),
            (Batches(counted(200, spare=1), context=3, rows=5), 7, 0),
        )
    }
    assert len(orders) == 4


def test_neighbours_in_a_text_are_no_neighbours_in_an_order() -> None:
    batches = Batches(counted(2_000), context=3, rows=1)
    order = [int(batches.batch(1, step)[0, 0]) // 4 for step in range(batches.training_rows)]
    near = sum(abs(a - b) <= 10 for a, b in pairwise(order))
    assert near < 60  # by chance: 20 of 1,900


def test_held_out_rows_are_spread_and_turn() -> None:
    batches = Batches(counted(2_000), context=3, rows=1)
    first, other = batches.held_out(10), batches.held_out(10, turn=5)
    assert batches.held_out_rows == 100
    assert (first[:, 0] // 80).tolist() == list(range(0, 100, 10))
    assert (other[:, 0] // 80).tolist() == list(range(5, 100, 10))
    assert len(torch.unique(batches.held_out(1_000, turn=3)[:, 0])) == 100


@pytest.mark.parametrize(("tokens_found", "context", "rows"), [(19 * 4 + 3, 3, 1), (40 * 4 - 1, 3, 39), (10, 100, 1)])
def test_too_little_text_is_one_sentence(tokens_found: int, context: int, rows: int) -> None:
    text = text_of(torch.zeros(tokens_found, dtype=torch.int32), text_bytes=1, documents=1)
    with pytest.raises(BadText, match=rf"the text has {tokens_found} tokens, and .* give more text"):
        Batches(text, context=context, rows=rows)


def test_the_least_text_that_is_enough() -> None:
    assert Batches(counted(20), context=3, rows=19).batch(0, 0).shape == (19, 4)
    assert Batches(counted(41), context=3, rows=39).batch(0, 0).shape == (39, 4)
    with pytest.raises(ValueError, match="at least 1"):
        Batches(counted(20), context=3, rows=0)
