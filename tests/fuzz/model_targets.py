"""Targets: what peers send of their training, and what this node keeps of its own: error feedback, privacy ledger."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from crypto import canonical
from crypto.digest import digest
from model.budget import Budget
from model.codecs import CODECS, encode
from model.config import PrivacyConfig
from model.delta import CHUNK
from model.errors import BadModel, BadState, BadUpdate
from model.feedback import Feedback
from model.update import Expected, read_update, write_update
from tests.fuzz.target import Target
from tests.vectors import KINDS, vector

SIZES: Final = {"ef64.2b": CHUNK + 65, "ef256.2b": CHUNK + 65}  # two chunks, the last one short
SIZE: Final = 131  # of the dense codecs: odd, and no whole number of blocks
LAYOUT: Final = digest(b"layout")


def update(codec_name: str) -> Target:
    """An update, and all values of its delta: what is taken is what `write_update` makes of what was read."""
    codec, n = CODECS[codec_name], SIZES.get(codec_name, SIZE)
    expected = Expected(
        run=digest(b"run"), round=3, base=digest(b"base"), peer="12D3KooW" + "a" * 44, layout=LAYOUT, n=n, codec=codec
    )

    def read(raw: bytes) -> None:
        found, delta = read_update(raw, expected)
        again = encode(delta.dense(0, n), codec)
        assert write_update(expected, again, steps=found.steps, tokens=found.tokens) == raw

    seeds = tuple(write_update(expected, encode(vector(kind, n), codec), steps=5, tokens=600) for kind in KINDS)
    return Target(read=read, errors=(BadUpdate,), seeds=seeds, values=tuple(map(canonical.decode, seeds)))


def feedback() -> Target:
    """A saved error feedback."""

    def read(raw: bytes) -> None:
        found = Feedback.load(raw, LAYOUT, SIZE)
        again = Feedback.load(found.save(LAYOUT), LAYOUT, SIZE)
        assert again.unsent_N.equal(found.unsent_N)

    kept = Feedback(SIZE)
    kept.add(vector("heavy", SIZE))
    return Target(read=read, errors=(BadModel,), seeds=(kept.save(LAYOUT), Feedback(SIZE).save(LAYOUT)))


def privacy_ledger() -> Target:
    """What private training has spent."""
    config = PrivacyConfig(noise_multiplier=1.0, clip_norm=1.0, delta=1e-6, epsilon_max=math.inf)

    def read(raw: bytes) -> None:
        found = Budget(config, context=8, save=lambda content: True, ledger=raw)
        assert found.ledger() == raw

    spent = Budget(config, context=8, save=lambda content: True)
    unspent = spent.ledger()
    spent.charge(1.0)
    spent.charge(1.0)
    return Target(read=read, errors=(BadState,), seeds=(unspent, spent.ledger()))


TARGETS: Final[Mapping[str, Callable[[], Target]]] = {
    **{f"update_{name}": partial(update, name) for name in CODECS},
    "feedback": feedback,
    "privacy_ledger": privacy_ledger,
}
