"""What bad members of a simulated run send in place of what they trained: the attacks of TRAINING.md 4.

Rules: they know everything that the honest ones send before they send their own, they obey the wire form unless that is
the attack, and they train with as many tokens as anybody. Vectors are start - end, as deltas are. Two that would send
one and the same are made from different halves of what they know, so that they are no copies of each other.
Source: ALIE: Baruch et al. (arXiv 1902.06156); inner product: Xie et al. (arXiv 1903.03936); TRAINING.md 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from crypto.digest import digest
from model.batches import Batches
from model.codecs import encode
from model.delta import Sections
from model.update import Expected, write_update

TOKENS: Final = 1_280  # claimed where nothing was trained; no claim counts for more than twice the median
HUGE: Final = 1e9  # times the honest norm: over what a clip could leave anything of
LITTLE_Z: Final = 1.0  # standard deviations; Baruch et al. take 0.3 for 2 of 10, which is less still
STALE_ROUNDS: Final = 5
TURN: Final = 4
SYBILS: Final = 12  # keys more than the run has members
LATE: Final = 1_000  # a place in the order of arrival behind all the others
NAN, INF = b"\xc0\x7f", b"\x80\x7f"  # bf16, little-endian


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """What one key sends. late: it had to see others' first. probation: a key that has yet to earn a weight. held_by:
    how many of the honest have it before they report; None: all."""

    peer: str
    raw: bytes
    late: bool = False
    probation: bool = False
    held_by: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What the bad ones know in a round. own: the vector_N that each of them would honestly say; honest: those of the
    others; sections: what anybody honestly sends. first: what each of them honestly said in the first round."""

    number: int
    expected: Callable[[str], Expected]
    own: Mapping[str, torch.Tensor]
    honest: Mapping[str, torch.Tensor]
    sections: Mapping[str, Sections]
    first: Mapping[str, Sections]
    rng: np.random.Generator

    @property
    def bad(self) -> tuple[str, ...]:
        """The names of the bad ones."""
        return tuple(self.own)

    def of_vector(self, peer: str, vector_N: torch.Tensor) -> Payload:
        """A sound update that says this vector."""
        expected = self.expected(peer)
        return self.of_sections(peer, encode(vector_N.contiguous(), expected.codec))

    def of_sections(self, peer: str, sections: Sections) -> Payload:
        """A sound update with these sections."""
        return Payload(peer=peer, raw=write_update(self.expected(peer), sections, steps=1, tokens=TOKENS))

    def half(self, place: int) -> torch.Tensor:
        """vectors_HN: every second honest one, a half for each of two places."""
        return torch.stack(list(self.honest.values())[place % 2 :: 2])


Make = Callable[[View], list[Payload]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """make: a round's payloads of the bad ones. false_text: they train, honestly, on text with wrong answers.
    rebase_every: they take up every so many rounds' weights only."""

    name: str
    make: Make
    false_text: bool = False
    rebase_every: int = 1


class FalseText(Batches):
    """A text whose every second letter is another: what follows a true letter is wrong (label flip)."""

    def batch(self, seed: int, step: int) -> torch.Tensor:
        """ids_BT; letters at odd places count from the other end of the alphabet."""
        ids_BT = super().batch(seed, step)
        odd_BT = ids_BT[:, 1::2]
        is_letter_BT = (odd_BT >= ord("a")) & (odd_BT <= ord("z"))
        ids_BT[:, 1::2] = torch.where(is_letter_BT, ord("a") + ord("z") - odd_BT, odd_BT)
        return ids_BT


def honestly(view: View) -> list[Payload]:
    """What training gave."""
    return [view.of_sections(peer, view.sections[peer]) for peer in view.bad]


def times(factor: float) -> Make:
    """Sign flip for a factor below 0."""
    return lambda view: [view.of_vector(peer, own_N * factor) for peer, own_N in view.own.items()]


def inner_product(view: View) -> list[Payload]:
    """The mean of the honest, turned round."""
    return [view.of_vector(peer, -view.half(place).mean(0)) for place, peer in enumerate(view.bad)]


def little(view: View) -> list[Payload]:
    """A little is enough: so far beside the mean that each of the honest could be."""
    return [
        view.of_vector(peer, view.half(place).mean(0) - LITTLE_Z * view.half(place).std(0))
        for place, peer in enumerate(view.bad)
    ]


def noise(view: View) -> list[Payload]:
    """Nothing but noise, of an honest norm."""
    made = []
    for peer, own_N in view.own.items():
        noise_N = torch.from_numpy(view.rng.standard_normal(own_N.numel(), np.float32))
        made.append(view.of_vector(peer, noise_N * (own_N.norm() / noise_N.norm())))
    return made


def not_finite(view: View) -> list[Payload]:
    """NaN from one, infinity from the other, where the codec keeps its scales."""
    made = []
    for place, peer in enumerate(view.bad):
        sections = view.sections[peer]
        scale = (NAN, INF)[place % 2] * (len(sections.scale) // 2)
        made.append(view.of_sections(peer, replace(sections, scale=scale)))
    return made


def huge(view: View) -> list[Payload]:
    """Noise of HUGE times the honest norm."""
    made = []
    for peer, own_N in view.own.items():
        noise_N = torch.from_numpy(view.rng.standard_normal(own_N.numel(), np.float32))
        made.append(view.of_vector(peer, noise_N * (HUGE * own_N.norm() / noise_N.norm())))
    return made


def replay(view: View) -> list[Payload]:
    """The own payload of the first round, in an update of this round."""
    return [view.of_sections(peer, view.first[peer]) for peer in view.bad]


def copy(view: View) -> list[Payload]:
    """An honest one's payload, under an own name."""
    victims = list(view.honest)
    return [
        replace(view.of_sections(peer, view.sections[victims[place]]), late=True) for place, peer in enumerate(view.bad)
    ]


def equivocation(view: View) -> list[Payload]:
    """Two payloads each: the honest one to some, the flipped one to the smallest majority of the voters, so that it is
    that one which the manifest lists; with the bad ones' own votes that takes few of the honest."""
    most = (len(view.honest) + len(view.bad)) // 2 + 1 - len(view.bad)
    return [replace(payload, held_by=most) for payload in times(-1.0)(view)]


def sybils(view: View) -> list[Payload]:
    """Flipped tenfold, and a crowd of new keys that say the same: huge ones and tiny ones, to move the medians."""
    made = times(-10.0)(view)
    for place in range(SYBILS):
        own_N = view.own[view.bad[place % len(view.bad)]]
        factor = -1e3 if place % 3 else -1e-3
        made.append(replace(view.of_vector(f"sybil{place:02}", own_N * factor), probation=True))
    return made


def turncoat(view: View) -> list[Payload]:
    """A good name first, and then what it is for: flipped from round TURN on."""
    return honestly(view) if view.number < TURN else times(-1.0)(view)


def malformed(view: View) -> list[Payload]:
    """Other faults in each round."""
    made = []
    for place, peer in enumerate(view.bad):
        kinds = faulty(view, peer)
        made.append(Payload(peer=peer, raw=kinds[(2 * view.number + place) % len(kinds)]))
    return made


def faulty(view: View, peer: str) -> tuple[bytes, ...]:
    """Updates with one fault each."""
    expected, sections = view.expected(peer), view.sections[peer]
    raw, other = view.of_sections(peer, sections).raw, digest(b"another history")
    another = (
        replace(expected, base=other),
        replace(expected, round=expected.round + 1),
        replace(expected, peer="somebody"),
        replace(expected, layout=other),
    )
    damaged = (replace(sections, val=sections.val[:-1]), replace(sections, scale=bytes(len(sections.scale))))
    return (
        b"",
        view.rng.bytes(len(raw)),
        raw[:-1],
        raw + b"\0",
        *(write_update(each, sections, steps=1, tokens=1) for each in another),
        *(write_update(expected, each, steps=1, tokens=1) for each in damaged),
    )


ATTACKS: Final = (
    Attack(name="sign_flip_x1", make=times(-1.0)),
    Attack(name="sign_flip_x10", make=times(-10.0)),
    Attack(name="inner_product", make=inner_product),
    Attack(name="alie", make=little),
    Attack(name="label_flip", make=honestly, false_text=True),
    Attack(name="noise", make=noise),
    Attack(name="not_finite", make=not_finite),
    Attack(name="huge_norm", make=huge),
    Attack(name="lazy", make=times(0.0)),
    Attack(name="replay", make=replay),
    Attack(name="copy", make=copy),
    Attack(name="stale_base", make=honestly, rebase_every=STALE_ROUNDS),
    Attack(name="equivocation", make=equivocation),
    Attack(name="sybils", make=sybils),
    Attack(name="turncoat", make=turncoat),
    Attack(name="malformed", make=malformed),
)
CLEAN: Final = Attack(name="clean", make=honestly)
