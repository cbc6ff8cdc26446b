"""Text <-> token ids for one model: its chat template, encoding without stalls, decoding for the stream.

Rules: encode goes through encode_batch, which lets other threads run (tokenizer.encode of 1 MB held the interpreter
for 0.8 s); a template comes from the model, so its size, its work and its output are bounded (model/template.py).
Source: SERVING.md "Threads"; transformers `tokenization_utils_tokenizers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from model.call_format import call_format
from model.errors import FOREIGN, BadInput, BadModel, first_line
from model.template import ChatTemplate, TakesNoTools, Turn, row_of
from model.text import TextStream

ENCODE_CHARS_MAX = 1 << 20


class _PanicsAreErrors:
    """The tokenizers library is Rust: its panics are no Exception, so they would end the node; here a ValueError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, _: object) -> None:
        if kind is not None and kind.__name__ == "PanicException":
            raise ValueError(f"the tokenizer gave up: {exc}") from None


class Tokens:
    """The tokenizer of one model."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a transformers tokenizer. Raises BadModel for a chat template that cannot be used."""
        self._tokenizer = tokenizer
        self._fast = getattr(tokenizer, "_tokenizer", None)
        if not hasattr(self._fast, "encode_batch_fast"):
            self._fast = None
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()
        template, special = tokenizer.chat_template, dict(tokenizer.special_tokens_map)
        with_tools = template
        if isinstance(template, dict):
            with_tools, template = template.get("tool_use", template.get("default")), template.get("default")
        self._template = ChatTemplate(template, special) if template else None
        self._with_tools = self._template
        if with_tools != template and with_tools:
            self._with_tools = ChatTemplate(with_tools, special)
        self.calls = None if not with_tools else call_format(with_tools)

    @classmethod
    def load(cls, path: Path) -> Tokens:
        """The tokenizer in a model's directory, with no code of the model's own. Raises BadModel."""
        try:
            with _PanicsAreErrors():
                tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
        except FOREIGN as exc:
            raise BadModel(f"{path}: the tokenizer cannot be loaded ({first_line(exc)}); fetch it again") from exc
        return cls(tokenizer)

    @property
    def size(self) -> int:
        """Token ids are below this."""
        return len(self._tokenizer)

    @property
    def end_token(self) -> int | None:
        """The id of the tokenizer's own end-of-text token."""
        token = self._tokenizer.eos_token_id
        return token if isinstance(token, int) else None

    @property
    def length_max(self) -> int | None:
        """How many tokens the tokenizer says that its model takes, if it says so."""
        length = self._tokenizer.model_max_length
        return length if isinstance(length, int) and 0 < length < 1 << 31 else None

    def render(self, messages: Sequence[Turn], tools: Sequence[Mapping[str, Any]] | None = None) -> tuple[int, ...]:
        """A chat of (role, content), or of messages as templates take them -> prompt ids, ready for the answer.

        A model without a chat template gets the contents, each followed by a blank line. Raises BadInput, TakesNoTools.
        """
        template = self._with_tools if tools else self._template
        if template is None:
            if tools:
                raise TakesNoTools("it has no chat template", param="tools")
            text = "".join(f"{row_of(turn)['content']}\n\n" for turn in messages)
            return self._encode(text, special=True)
        return self._encode(template.render(messages, tools), special=False)

    def encode(self, text: str) -> tuple[int, ...]:
        """Plain text -> prompt ids, with the special tokens that the model wants around a text. Raises BadInput."""
        return self._encode(text, special=True)

    def encode_piece(self, text: str) -> Sequence[int]:
        """A piece of running text -> ids, nothing put around it: for training. Raises BadInput."""
        return self._ids(text, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out. Raises ValueError if the tokenizer gives up."""
        with _PanicsAreErrors():
            if self._fast is not None:
                return str(self._fast.decode(ids, skip_special_tokens=True))
            return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def decode_token(self, token: int) -> str:
        """One token's own text, special ones spelled out: for lists of log probabilities."""
        with _PanicsAreErrors():
            if self._fast is not None:
                return str(self._fast.decode([token], skip_special_tokens=False))
            return str(self._tokenizer.decode([token], skip_special_tokens=False))

    def stream(self, prompt: Sequence[int], stop: tuple[str, ...] = (), skip_chars: int = 0) -> TextStream:
        """The incremental text of an answer to `prompt`."""
        return TextStream(self.decode, prompt, stop, skip_chars)

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        ids = self._ids(text, special=special)
        if not ids and isinstance(begin := self._tokenizer.bos_token_id, int):
            ids = [begin]
        return tuple(ids)

    def _ids(self, text: str, *, special: bool) -> Sequence[int]:
        if len(text) > ENCODE_CHARS_MAX:
            raise BadInput(f"the text has {len(text):,} characters; at most {ENCODE_CHARS_MAX:,} are taken")
        try:
            with _PanicsAreErrors():
                if self._fast is not None:
                    ids: Sequence[int] = self._fast.encode_batch_fast([text], add_special_tokens=special)[0].ids
                else:
                    ids = self._tokenizer.encode(text, add_special_tokens=special)
        except FOREIGN as exc:
            raise BadInput(f"the text cannot be turned into tokens ({first_line(exc)})") from exc
        return ids
