"""One peer's contribution to a round as bytes, and back: what it says, for which run, and the codec's three sections.

Rules: core. Canonical msgpack; the digest of these bytes is what a header of gossip/ signs, so every field that decides
anything stands in them. A reader knows beforehand all but how much was trained: run, round, base, peer, layout, size
and codec are compared, and the lengths of the sections follow from codec and size. Bytes of another length than these
allow are refused before a byte is read, any header before memory is taken for what it claims.

Source: TRAINING.md 2; canonical.py; psyche's commitment leaves out shape and nonce, this one does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from crypto.canonical import Limits, convert, decode_canonical, encode_struct
from crypto.digest import DIGEST_BYTES, Digest
from crypto.errors import BadEncoding
from model.codecs import decode
from model.delta import Codec, Delta, Sections
from model.errors import BadInput, BadUpdate
from model.layout import SIZE_MAX

UPDATE_VERSION: Final = 1
STEPS_MAX: Final = 1 << 20  # local steps of one round; DiLoCo takes 500
TOKENS_MAX: Final = 1 << 40  # of one round: a million steps of a million tokens
ROUND_MAX: Final = 1 << 40
PAYLOAD_BYTES_MAX: Final = 256 << 20  # of the sections: fp32 of 67M elements, ef64.2b of more than SIZE_MAX
HEAD_BYTES_MAX: Final = 512  # all but the sections' content: names, three ids of 32 bytes, a peer id, integers
_TEXT_CHARS_MAX: Final = 64  # a peer id has 52, a codec's name fewer

Id = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Text = Annotated[str, Meta(min_length=1, max_length=_TEXT_CHARS_MAX)]


class ModelUpdate(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a peer trained in one round.

    run: id of the run. base: digest of the history it started from. steps, tokens: how much it trained, by its own
    word. n: elements. k: how many coordinates of each chunk are sent at most. layout: digest of names and shapes.
    """

    v: Literal[1]
    run: Id
    round: Annotated[int, Meta(ge=0, le=ROUND_MAX)]
    base: Id
    peer: Text
    steps: Annotated[int, Meta(ge=1, le=STEPS_MAX)]
    tokens: Annotated[int, Meta(ge=1, le=TOKENS_MAX)]
    codec: Text
    n: Annotated[int, Meta(ge=1, le=SIZE_MAX)]
    k: Annotated[int, Meta(ge=1)]
    layout: Id
    idx: bytes
    val: bytes
    scale: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What every update of this peer in this round says. Raises BadInput when a payload would be too large."""

    run: Digest
    round: int
    base: Digest
    peer: str
    layout: Digest
    n: int
    codec: Codec

    def __post_init__(self) -> None:
        assert all(len(each) == DIGEST_BYTES for each in (self.run, self.base, self.layout))
        assert 0 <= self.round <= ROUND_MAX
        assert 1 <= self.n <= SIZE_MAX
        assert 1 <= len(self.peer) <= _TEXT_CHARS_MAX
        if self.sections_bytes > PAYLOAD_BYTES_MAX:
            raise BadInput(
                f"{self.codec.name} of {self.n} elements takes {self.sections_bytes} bytes, an update at most "
                f"{PAYLOAD_BYTES_MAX}: choose ef64.2b"
            )

    @property
    def sections_bytes(self) -> int:
        """Of all three sections."""
        return sum(self.codec.sizes(self.n))

    @property
    def limits(self) -> Limits:
        """One flat map of the update's fields."""
        fields = len(ModelUpdate.__struct_fields__)
        return Limits(
            bytes_max=self.sections_bytes + HEAD_BYTES_MAX,
            depth_max=1,
            array_max=0,
            map_max=fields,
            str_max=_TEXT_CHARS_MAX,
            bin_max=max(DIGEST_BYTES, *self.codec.sizes(self.n)),
            items_max=2 * fields,
            maps_max=1,
        )

    def update(self, sections: Sections, *, steps: int, tokens: int) -> ModelUpdate:
        """The update that says just this."""
        return ModelUpdate(
            v=UPDATE_VERSION,
            run=self.run,
            round=self.round,
            base=self.base,
            peer=self.peer,
            steps=steps,
            tokens=tokens,
            codec=self.codec.name,
            n=self.n,
            k=self.codec.k,
            layout=self.layout,
            idx=sections.idx,
            val=sections.val,
            scale=sections.scale,
        )


def write_update(expected: Expected, sections: Sections, *, steps: int, tokens: int) -> bytes:
    """The canonical bytes of our own update. steps: 1 to STEPS_MAX; tokens: 1 to TOKENS_MAX."""
    assert 1 <= steps <= STEPS_MAX
    assert 1 <= tokens <= TOKENS_MAX
    return encode_struct(expected.update(sections, steps=steps, tokens=tokens))


def read_update(raw: bytes, expected: Expected) -> tuple[ModelUpdate, Delta]:
    """An update and its delta, both checked to the last bit. The delta keeps the sections, not `raw`.

    Raises BadUpdate for any other bytes than `write_update` makes: that peer's fault, or it is in another round.
    """
    least = expected.sections_bytes
    if not least < len(raw) <= least + HEAD_BYTES_MAX:
        raise BadUpdate(
            f"{len(raw)} bytes came, an update of {expected.codec.name} for {expected.n} elements has {least} and at "
            f"most {HEAD_BYTES_MAX} more"
        )
    try:
        update = convert(decode_canonical(raw, expected.limits), ModelUpdate)
    except BadEncoding as exc:
        raise BadUpdate(f"no update of {UPDATE_VERSION}: {exc}") from exc
    sections = Sections(update.idx, update.val, update.scale)
    said = expected.update(sections, steps=update.steps, tokens=update.tokens)
    if said != update:
        raise BadUpdate(_difference(update, said))
    return update, decode(sections, expected.codec, expected.n)


def _difference(update: ModelUpdate, wanted: ModelUpdate) -> str:
    """Which field is otherwise, as a sentence."""
    names = ModelUpdate.__struct_fields__
    name = next(name for name in names if getattr(update, name) != getattr(wanted, name))
    came, right = (_text(getattr(each, name)) for each in (update, wanted))
    return f"the update says {name} {came}, wanted {right}: its author is in another run or round, or has another model"


def _text(value: object) -> str:
    """Short, and safe to print."""
    return value.hex()[:16] if isinstance(value, bytes) else ascii(value)
