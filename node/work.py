"""One request for inference and its answer, as they travel between web, engine and peers: the wire form is here.

Rules: core. Everything has a bound with a name; unknown fields are refused; a number is finite. Token ids of a request
travel as bytes, four an id, little-endian: a prompt of 100,000 is one element of its frame, and WORK_LIMITS lets few
elements in, for each costs the loop its look. An answer is Started, then Progress and Piece in any order, then exactly
one Finished; every other end is an exception.
"""

from __future__ import annotations

import struct as packing
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, TypeVar, overload

import msgspec
from msgspec import Meta, Struct

from crypto.canonical import Limits, convert
from crypto.errors import BadEncoding
from node.requester import LOCAL
from node.tools import CALLS_MAX, CallId, ToolCall, Tooling
from p2p.errors import RemoteProtocolError
from p2p.transport import FRAME_BYTES_MAX

PROMPT_CHARS_MAX = 200_000
MESSAGES_MAX = 1_000
TOKENS_MAX = 131_072  # of a request, its prompt and what is delivered together
PIECE_TOKENS_MAX = 4_096
STOPS_MAX = 8
TEXTS_MAX = 256
LOGPROBS_MAX = 20
REMAINING_MS_MAX = 86_400_000  # a day
UNKNOWN_TOKEN: Final = (1 << 31) - 1  # a token whose id is not told; in no vocabulary, so no engine goes on after it
SAID: Final = "said:"  # opens the revision of weights that nobody hashed: what a server says of them

Name = Annotated[str, Meta(min_length=1, max_length=200)]
RequestId = Annotated[str, Meta(min_length=1, max_length=64)]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
TokenIds = Annotated[tuple[TokenId, ...], Meta(max_length=TOKENS_MAX)]
Text = Annotated[str, Meta(max_length=PROMPT_CHARS_MAX)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]


# What a frame of the inference protocol may hold. The most elements that are needed: 1,000 messages, 5,000; of half of
# them calls and of half their results, with TOOLS_MAX functions, 11,000.
WORK_LIMITS: Final = Limits(
    bytes_max=FRAME_BYTES_MAX, str_max=4 * PROMPT_CHARS_MAX, bin_max=FRAME_BYTES_MAX, items_max=12_288
)
ID_BYTES: Final = 4
TAG_CHARS_MAX: Final = 32
GENERATE: Final = "generate"
GENERATE_TOOLS: Final = "generate_tools"


class Message(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a chat, rendered by the serving model's own template. tool_calls: that the assistant made in it;
    tool_call_id: whose result it is."""

    role: Annotated[str, Meta(min_length=1, max_length=32)]
    content: Text
    tool_calls: Annotated[tuple[ToolCall, ...], Meta(max_length=CALLS_MAX)] = ()
    tool_call_id: CallId | None = None


class Sampling(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to choose tokens. temperature 0 is greedy. logprobs: None = none, n = also the n best alternatives."""

    max_tokens: Annotated[int, Meta(ge=1, le=TOKENS_MAX)] = 256
    temperature: Annotated[float, Meta(ge=0.0, le=10.0)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] = 1.0
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0  # msgspec takes bounds of 64 signed bits only
    stop: Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...], Meta(max_length=STOPS_MAX)] = ()
    logprobs: Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)] | None = None


class GenerateWork(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="generate"):
    """A completion to make. Exactly one of messages, text, tokens is the prompt.

    delivered: tokens that another peer already made and the client already has; the answer goes on after them.
    delivered_chars: characters of their text that the client already has. delivered_text: these characters, when the
    ids are UNKNOWN_TOKEN. remaining_ms: time left to the deadline. private: nothing of it is shared with others. keep:
    the answer may be kept for this asker, and be one that was: it wants so, speaks for one client, and the answer is
    always the same (greedy, or of a seed that was chosen). tools: functions that the answer may call; its calls are in
    its text, written as Started says.
    """

    request_id: RequestId
    model: Name | None = None  # None: the serving node's own default
    revision: Name | None = None  # set once a first peer has answered, so that a takeover is the same model
    messages: Annotated[tuple[Message, ...], Meta(min_length=1, max_length=MESSAGES_MAX)] | None = None
    text: Text | None = None
    tokens: TokenIds | None = None
    sampling: Sampling = Sampling()
    delivered: TokenIds = ()
    delivered_chars: Count = 0
    delivered_text: Text = ""
    remaining_ms: Annotated[int, Meta(ge=1, le=REMAINING_MS_MAX)] = 120_000
    private: bool = False
    keep: bool = False
    tools: Tooling | None = None

    @property
    def may_be_kept(self) -> bool:
        """Whether the answer may be kept, and be one that was."""
        return self.keep and not self.private

    @property
    def method(self) -> str:
        """By which method a peer is asked: who does not know of tools lacks the second, and another is asked then."""
        has_calls = any(message.tool_calls or message.tool_call_id for message in self.messages or ())
        return GENERATE if self.tools is None and not has_calls else GENERATE_TOOLS


class EmbedWork(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="embed"):
    """Texts (or token lists) to embed, in order. private and keep: as of GenerateWork, for each text."""

    request_id: RequestId
    model: Name | None = None
    texts: Annotated[tuple[Text | TokenIds, ...], Meta(min_length=1, max_length=TEXTS_MAX)]
    remaining_ms: Annotated[int, Meta(ge=1, le=REMAINING_MS_MAX)] = 120_000
    private: bool = False
    keep: bool = False

    @property
    def may_be_kept(self) -> bool:
        """Whether vectors may be kept, and be some that were."""
        return self.keep and not self.private


class Started(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="started"):
    """The request was admitted to an engine. prompt_tokens 0: not counted yet, Finished says. cached: the answer was
    kept from an earlier one: its speed is not the engine's. calls: the format in which the answer's text has calls of
    the request's tools (model/call_format.py); None: in none, or in one that is not known."""

    served_by: Name
    model: Name
    revision: Name
    prompt_tokens: Count
    cached: bool = False
    calls: Annotated[str, Meta(min_length=1, max_length=32)] | None = None


class Progress(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="progress"):
    """Evidence of work before the first token: any of these must grow, or the peer counts as frozen."""

    engine_steps: Count
    prefilled_tokens: Count
    queue_position: Count


class TokenLogprob(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Natural-log probability of a chosen token and of the best alternatives (text, logprob)."""

    text: Text
    logprob: float
    top: Annotated[tuple[tuple[str, float], ...], Meta(max_length=LOGPROBS_MAX)] = ()


class Piece(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="piece"):
    """New tokens and the text that became certain with them (may be empty inside a character or a stop string).

    Of a server that tells no ids each token is an UNKNOWN_TOKEN.
    """

    tokens: Annotated[tuple[TokenId, ...], Meta(max_length=PIECE_TOKENS_MAX)]
    text: Text
    logprobs: Annotated[tuple[TokenLogprob, ...], Meta(max_length=4096)] = ()


class Finished(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="finished"):
    """The one end of a complete answer. reason: stop (end token or stop string) or length."""

    reason: Literal["stop", "length"]
    prompt_tokens: Count
    completion_tokens: Count


class Embedded(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="embedded"):
    """Vectors in the order of the texts, as little-endian fp32, and which texts were cut to the model's length (None:
    who made them does not tell)."""

    served_by: Name
    model: Name
    revision: Name
    dimensions: Annotated[int, Meta(ge=1, le=65_536)]
    vectors: tuple[bytes, ...]
    truncated: tuple[bool | None, ...]
    prompt_tokens: Count


AnswerItem = Started | Progress | Piece | Finished


class _Boxed(Struct, frozen=True, array_like=True):
    """An item in a struct: msgspec keeps what it learns of a struct, and learns a bare union anew at each use."""

    item: AnswerItem


_T = TypeVar("_T")


def to_wire(struct: Struct) -> Any:
    """A struct as the plain values that an rpc body carries; bytes stay bytes, token ids of a request become bytes. A
    mark that is not set is left out."""
    plain = msgspec.to_builtins(struct, builtin_types=(bytes,))
    for field in _MARKS:
        if plain.get(field) is False:
            del plain[field]
    for field in _LATER:  # who does not know the field yet can still read the rest
        if field in plain and plain[field] is None:
            del plain[field]
    if isinstance(struct, GenerateWork):
        for field in _TOKEN_FIELDS:
            if plain[field] is not None:
                plain[field] = _packed(plain[field])
        if not plain["delivered_text"]:
            del plain["delivered_text"]  # who takes over by ids may not know the field yet
    elif isinstance(struct, EmbedWork):
        plain["texts"] = [text if isinstance(text, str) else _packed(text) for text in plain["texts"]]
    return plain


def from_wire(value: object, kind: type[_T]) -> _T:
    """Plain values as a struct of `kind`. Raises RemoteProtocolError that names the field at fault."""
    try:
        _check_tag(value)
        return convert(_unpacked(value) if kind in (GenerateWork, EmbedWork) else value, kind)
    except BadEncoding as exc:
        raise RemoteProtocolError(f"the peer's message does not fit: {exc}") from exc


def item_from_wire(value: object) -> AnswerItem:
    """Plain values as one item of an answer. Raises RemoteProtocolError that names the field at fault."""
    try:
        _check_tag(value)
        return convert((value,), _Boxed).item
    except BadEncoding as exc:
        raise RemoteProtocolError(f"the peer's message does not fit: {exc}") from exc


def _check_tag(value: object) -> None:
    """Raises BadEncoding for a `type` that is none: msgspec would write all of it into its error, thrice."""
    if isinstance(value, dict) and isinstance(tag := value.get("type"), str) and len(tag) > TAG_CHARS_MAX:
        raise BadEncoding(f"type: a text of {len(tag)} characters, at most {TAG_CHARS_MAX} are allowed")


@overload
def sent_on(work: GenerateWork, account: str) -> GenerateWork: ...


@overload
def sent_on(work: EmbedWork, account: str) -> EmbedWork: ...


def sent_on(work: GenerateWork | EmbedWork, account: str) -> GenerateWork | EmbedWork:
    """A client's request as a peer gets it, to whom all our clients are one: what it keeps for that one must be one
    client's, so the others have nothing kept there."""
    return work if account == LOCAL else msgspec.structs.replace(work, keep=False)


_MARKS: Final = ("private", "keep", "cached")
_LATER: Final = ("tools", "calls")
_TOKEN_FIELDS: Final = ("tokens", "delivered")


def _packed(ids: Sequence[int]) -> bytes:
    return packing.pack(f"<{len(ids)}I", *ids)


def _unpacked(value: object) -> object:
    """A request's plain values with ids in the place of their bytes. Raises BadEncoding."""
    if not isinstance(value, dict):
        return value
    plain, left = dict(value), TOKENS_MAX
    for field in _TOKEN_FIELDS:
        if field in plain:
            plain[field], left = _ids(plain[field], field, left)
    if isinstance(texts := plain.get("texts"), list):
        plain["texts"] = ids = []
        for text in texts:
            each, left = (text, left) if isinstance(text, str) else _ids(text, "texts", left)
            ids.append(each)
    return plain


def _ids(packed: object, field: str, left: int) -> tuple[tuple[int, ...] | None, int]:
    """The ids of these bytes, of which there may be `left`, and how many may follow. Raises BadEncoding."""
    if packed is None:
        return None, left
    if not isinstance(packed, bytes) or len(packed) % ID_BYTES:
        raise BadEncoding(f"{field}: token ids come as bytes, {ID_BYTES} an id, not as {type(packed).__name__}")
    count = len(packed) // ID_BYTES
    if count > left:
        raise BadEncoding(f"{field}: over {TOKENS_MAX} token ids in all")
    return packing.unpack(f"<{count}I", packed), left - count
