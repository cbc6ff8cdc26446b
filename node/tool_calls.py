"""Finds the calls of functions in an answer's text while it comes: text goes on at once, a call when it is whole.

Rules: core. The answer's Started says how its model writes calls (model/call_format.py); a format that is not known
here, or JSON that is broken, is text like any other. Where a model writes a call without a mark around it (the marks of
Llama and Mistral are special tokens, which no text has), it is one only at the answer's beginning and by the name of a
function of the request. What is too long for a call is text, with all behind it. White space is held back until it is
known what follows: around calls it is left out. Of an answer that has as many calls as it may, the rest is left out:
one when parallel calls are not wanted, else CALLS_MAX.
Source: model/call_format.py names the templates; OpenAI API reference, "The chat completion object" (tool_calls).
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any, Final

import msgspec

from model.call_format import HERMES, LLAMA, MISTRAL
from node.tools import ARGUMENTS_CHARS_MAX, CALLS_MAX, NAME_PATTERN, ToolCall
from node.work import AnswerItem, Finished, GenerateWork, Piece, Started

CALL_CHARS_MAX: Final = ARGUMENTS_CHARS_MAX  # of one that is held back
BLANK_CHARS_MAX: Final = 4_096
ID_CHARS: Final = 9  # letters and digits, as Mistral's templates want them of every call in a chat
LETTERS: Final = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
KEYS: Final = tuple(f'"{key}"' for key in ("name", "type", "id", "parameters", "arguments", "function"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    """opening: what stands before a call. closing: behind it; "": its JSON says where it ends. bare: the first
    character of a call without `opening`, at the answer's beginning."""

    opening: str
    closing: str = ""
    bare: str = ""


FORMATS: Final = {
    HERMES: _Format(opening="<tool_call>", closing="</tool_call>"),
    LLAMA: _Format(opening="<|python_tag|>", bare="{"),
    MISTRAL: _Format(opening="[TOOL_CALLS]", bare="["),
}


class _Said(msgspec.Struct):
    """One call as a model writes it; what it has beside is ignored."""

    name: Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
    arguments: msgspec.Raw = msgspec.Raw(b"")
    parameters: msgspec.Raw = msgspec.Raw(b"")


_one: Final = msgspec.json.Decoder(_Said)
_several: Final = msgspec.json.Decoder(list[_Said])
Found = str | tuple[str, str]  # text, or a call: name and arguments


class CallReader:
    """Reads the text of one answer."""

    def __init__(self, form: str | None, names: frozenset[str]) -> None:
        """form: as Started says; names: of the functions that the request has."""
        self._format = None if form is None else FORMATS.get(form)
        self._names = names
        self._buffer = ""
        self._blank = ""
        self._opened: str | None = None  # a call's opening, while it is read; "" for one without
        self._may_be_bare = self._format is not None and bool(self._format.bare)
        self._value = _Value()
        self._looked = 0
        self._has_called = False

    def feed(self, text: str) -> list[Found]:
        """What is certain with this text."""
        if self._format is None:
            return [text] if text else []
        self._buffer += text
        found: list[Found] = []
        while self._in_call(self._format, found) if self._opened is not None else self._in_text(self._format, found):
            pass
        return found

    def end(self) -> list[Found]:
        """What is left when the answer is over."""
        found: list[Found] = []
        if self._opened is not None:
            whole = _calls(self._buffer) if self._format is not None and self._format.closing else None
            self._take(found, whole, self._opened + self._buffer)
        else:
            self._tell(found, self._buffer)
        if self._blank and not self._has_called:
            found.append(self._blank)
        self._buffer = self._blank = ""
        self._opened = None
        return found

    def _in_text(self, form: _Format, found: list[Found]) -> bool:
        """Go on in text; whether a call begins behind it."""
        if self._may_be_bare:
            rest = self._buffer.lstrip(" \t\r\n;" if self._has_called else " \t\r\n")
            is_bare = _opens(rest, form)
            if is_bare is None and len(self._buffer) <= BLANK_CHARS_MAX:
                return False
            self._may_be_bare = False
            if is_bare:
                self._blank += "" if self._has_called else self._buffer[: len(self._buffer) - len(rest)]
                self._begin("", rest)
                return True
            if self._has_called:
                self._buffer = rest
        at = self._buffer.find(form.opening)
        if at >= 0:
            self._tell(found, self._buffer[:at])
            self._begin(form.opening, self._buffer[at + len(form.opening) :])
            return True
        kept = _overlap(self._buffer, form.opening)
        self._tell(found, self._buffer[: len(self._buffer) - kept])
        self._buffer = self._buffer[len(self._buffer) - kept :]
        return False

    def _begin(self, opening: str, rest: str) -> None:
        self._opened, self._buffer, self._value, self._looked = opening, rest, _Value(), 0
        self._may_be_bare = False

    def _in_call(self, form: _Format, found: list[Found]) -> bool:
        """Go on in a call; whether it has ended."""
        assert self._opened is not None
        if form.closing:
            self._value.is_none = self._buffer.lstrip()[:1] not in ("", "{")
            end = -1 if self._value.is_none else self._buffer.find(form.closing, self._looked)
            after = end + len(form.closing)
            self._looked = after if end >= 0 else max(self._looked, len(self._buffer) - len(form.closing))
            if end >= 0 and self._value.is_in_text(self._buffer, end):  # an argument has the mark in it
                return True
        else:
            end = after = self._value.end(self._buffer)
        if end < 0 and len(self._buffer) <= CALL_CHARS_MAX and not self._value.is_none:
            return False
        if end < 0:  # no call after all: what is behind its opening may hold one
            if not self._value.is_none:  # too long: to look again behind each opening in it would hold the loop
                found.append(self._blank + self._opened + self._buffer)
                self._format = self._opened = None
                self._blank = self._buffer = ""
                return False
            opened, self._opened = self._opened, None
            self._tell(found, opened)
            if not opened:  # nor is this the beginning of another
                self._tell(found, self._buffer[:1])
                self._buffer = self._buffer[1:]
            return True
        inner, whole = self._buffer[:end], self._opened + self._buffer[:after]
        calls = _calls(inner)
        if calls is not None and not self._opened and not all(name in self._names for name, _ in calls):
            calls = None
        self._buffer, self._opened = self._buffer[after:], None
        self._take(found, calls, whole)
        self._may_be_bare = calls is not None and form.bare == "{"
        return True

    def _take(self, found: list[Found], calls: list[tuple[str, str]] | None, text: str) -> None:
        if calls is None:
            self._tell(found, text)
            return
        self._has_called, self._blank = True, ""
        found.extend(calls)

    def _tell(self, found: list[Found], text: str) -> None:
        """Text, its last white space held back."""
        whole = self._blank + text
        kept = whole.rstrip()
        self._blank = whole[len(kept) :]
        if len(self._blank) > BLANK_CHARS_MAX:
            kept, self._blank = whole, ""
        if kept:
            found.append(kept)


class _Value:
    """Where a JSON object or array ends that comes in parts."""

    def __init__(self) -> None:
        self.is_none = False  # it begins with neither
        self._at = self._depth = 0
        self._in_text = self._is_escaped = False

    def is_in_text(self, text: str, place: int) -> bool:
        """Whether this place, further on than any before, is inside one of its texts."""
        while self._at < place and self.end(text[:place]) >= 0:
            pass
        return self._in_text

    def end(self, text: str) -> int:
        """Behind it, -1 while it goes on. text: all so far."""
        for at in range(self._at, len(text)):
            letter = text[at]
            if self._in_text:
                self._in_text = self._is_escaped or letter != '"'
                self._is_escaped = letter == "\\" and not self._is_escaped
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self._at = at + 1
                    return at + 1
            elif not self._depth and not letter.isspace():
                self.is_none, self._at = True, len(text)
                return -1
            elif letter == '"':
                self._in_text = True
        self._at = len(text)
        return -1


def _opens(text: str, form: _Format) -> bool | None:
    """Whether a call without a mark begins here; None: that is open yet."""
    if not text or form.opening.startswith(text):
        return None
    for letter in "[{" if form.bare == "[" else "{":
        if not text.startswith(letter):
            return None if not text else False
        text = text[1:].lstrip()
    if any(text.startswith(key) for key in KEYS):
        return True
    return None if any(key.startswith(text) for key in KEYS) else False


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of the text may be the beginning of the mark."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)


def _calls(text: str) -> list[tuple[str, str]] | None:
    """The calls that stand in this JSON, None: it is broken, or something else."""
    try:
        said = _several.decode(text) if text.lstrip().startswith("[") else [_one.decode(text)]
        calls = [(one.name, _arguments(one)) for one in said]
    except (ValueError, RecursionError):
        return None
    return calls or None


def _arguments(said: _Said) -> str:
    """As text, its white space and order of keys kept. Raises ValueError, RecursionError."""
    raw = bytes(said.arguments) or bytes(said.parameters) or b"null"
    value = msgspec.json.decode(raw)
    if value is None:
        return "{}"
    if isinstance(value, str):  # a server's own words (node/upstream_telling.py), whatever they are
        return value
    if not isinstance(value, dict):
        raise ValueError("arguments are an object")
    return raw.decode()


def written(name: str, arguments: str) -> str:
    """A call as text in the format HERMES, from which the same is read."""
    text = msgspec.json.encode({"name": name, "arguments": arguments}).decode()
    return f"<tool_call>{text}</tool_call>"


class Reading:
    """The items of one answer with its calls taken out of its text. One for each answer of a client's request."""

    def __init__(self, work: GenerateWork) -> None:
        self._work = work
        self._reader: CallReader | None = None
        self._calls = 0
        self._calls_max = 0 if work.tools is None else CALLS_MAX if work.tools.parallel else 1

    def take(self, item: AnswerItem) -> list[AnswerItem | ToolCall]:
        """What a client gets for an item, in order."""
        tools = self._work.tools
        if tools is None:
            return [item]
        match item:
            case Started():
                if self._reader is None:
                    self._reader = CallReader(item.calls, frozenset(tool.name for tool in tools.tools))
            case Piece() if self._reader is not None:
                parts = self._told(self._reader.feed(item.text))
                # its tokens and their numbers come at once, whatever of its text is held back
                text = parts.pop(0).text if parts and isinstance(parts[0], Piece) else ""
                return [Piece(tokens=item.tokens, text=text, logprobs=item.logprobs), *parts]
            case Finished() if self._reader is not None:
                return [*self._told(self._reader.end()), item]
        return [item]

    def _told(self, found: list[Found]) -> list[Any]:
        told: list[Piece | ToolCall] = []
        for part in found:
            if self._calls >= self._calls_max:
                break
            if isinstance(part, str):
                told.append(Piece(tokens=(), text=part))
                continue
            told.append(ToolCall(id=self._id(), name=part[0], arguments=part[1]))
            self._calls += 1
        return told

    def _id(self) -> str:
        """Of the next call: the same for the same place of the same request, and of no other."""
        number = int.from_bytes(sha256(f"{self._work.request_id}/{self._calls}".encode()).digest()[:8], "little")
        letters = []
        for _ in range(ID_CHARS):
            number, place = divmod(number, len(LETTERS))
            letters.append(LETTERS[place])
        return "".join(letters)
