"""bench/poison.py at a size of nothing: each attack is what it says, and everything of a round is passed through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from bench.attacks import ATTACKS, CLEAN, SYBILS, Attack, FalseText, Payload, View, faulty, honestly, times
from bench.learning import Scale, Shards, byte_model, shards_of
from bench.poison import DENSE, PLAYED, SPARSE_64, SPARSE_256, Length, cases, played, rows_of
from bench.poison_run import MALFORMED, UNDEFENDED, Case, Family, Result, Tally
from crypto.digest import digest
from model.batches import Batches
from model.codecs import codec_named, encode
from model.corpus import BOOK_BREAK
from model.delta import Delta
from model.errors import BadUpdate
from model.evidence import norm
from model.layout import layout_of
from model.rules import Rule
from model.update import Expected, read_update

torch.set_num_threads(1)  # far too small to share
SCALE = Scale(workers=5, rows=1, context=8, width=16, layers=1)
LENGTH = Length(scale=SCALE, bad=1, rounds=3, late_rounds=3, micro_steps=8)
BY_NAME = {attack.name: attack for attack in (*ATTACKS, CLEAN)}
RUN = digest(b"a run")
FAMILIES = pytest.mark.parametrize("family", [DENSE, SPARSE_64], ids=lambda family: family.name)


@cache
def shards() -> Shards:
    return shards_of(BOOK_BREAK.join(f"{letter} book of {letter} tales. " * 400 for letter in "abcdefgh"), SCALE)


def run(attack: str, family: Family = DENSE, **changed: bool) -> Result:
    return played(Case(family=family, attack=BY_NAME[attack], **changed), shards(), LENGTH, None)


def view_of(family: Family, number: int = 3) -> View:
    """Two bad ones and four honest ones, whose vectors share a part."""
    model = byte_model(SCALE)
    layout = layout_of({name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad})
    codec, rng = codec_named(family.codec), np.random.default_rng(3)
    common = rng.standard_normal(layout.size, np.float32)
    names = [f"peer{at}" for at in range(6)]
    said = {name: torch.from_numpy(common + rng.standard_normal(layout.size, np.float32)) for name in names}

    def expected(peer: str) -> Expected:
        return Expected(
            run=RUN, round=number, base=RUN, peer=peer, layout=layout.digest, n=layout.size, codec=codec
        )  # fmt: skip

    sections = {name: encode(vector, codec) for name, vector in said.items()}
    bad, honest = names[:2], names[2:]
    return View(
        number=number,
        expected=expected,
        own={name: said[name] for name in bad},
        honest={name: said[name] for name in honest},
        sections=sections,
        first={name: encode(torch.from_numpy(common[::-1].copy()), codec) for name in names},
        rng=rng,
    )


def read(view: View, payloads: Sequence[Payload]) -> dict[str, Delta]:
    return {each.peer: read_update(each.raw, view.expected(each.peer))[1] for each in payloads}


def vector(delta: Delta) -> torch.Tensor:
    return delta.dense(0, delta.n)


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


@FAMILIES
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_every_attack_is_in_the_wire_form_unless_that_is_the_attack(attack: Attack, family: Family) -> None:
    view = view_of(family)
    payloads = attack.make(view)
    assert {each.peer for each in payloads if not each.probation} == set(view.bad)
    if attack.name in ("not_finite", "malformed"):
        for each in payloads:
            with pytest.raises(BadUpdate):
                read_update(each.raw, view.expected(each.peer))
    else:
        read(view, payloads)


@FAMILIES
def test_no_faulty_update_is_read(family: Family) -> None:
    view = view_of(family)
    raws = faulty(view, view.bad[0])
    assert len(raws) == len(set(raws)) == 10
    for raw in raws:
        with pytest.raises(BadUpdate):
            read_update(raw, view.expected(view.bad[0]))


@FAMILIES
def test_vectors_point_where_the_attack_wants(family: Family) -> None:
    view = view_of(family)
    bad = view.bad[0]
    honest = vector(read(view, [view.of_sections(bad, view.sections[bad])])[bad])
    mean = torch.stack(list(view.honest.values())).mean(0)

    def sent(name: str) -> torch.Tensor:
        return vector(read(view, BY_NAME[name].make(view))[bad])

    assert cosine(sent("sign_flip_x1"), honest) == pytest.approx(-1, abs=1e-3)
    assert float(sent("sign_flip_x10").norm() / honest.norm()) == pytest.approx(10, rel=0.01)
    assert cosine(sent("inner_product"), mean) < -0.3
    assert sent("alie").norm() > 0
    assert abs(cosine(sent("noise"), honest)) < 0.1
    assert float(sent("huge_norm").norm() / honest.norm()) > 1e8
    assert float(sent("lazy").norm()) == 0
    assert torch.equal(sent("replay"), vector(read(view, [view.of_sections(bad, view.first[bad])])[bad]))
    assert torch.equal(sent("copy"), vector(read(view, [view.of_sections(bad, view.sections["peer2"])])[bad]))
    assert torch.equal(sent("turncoat"), honest)
    assert cosine(vector(read(view, BY_NAME["turncoat"].make(replace(view, number=4)))[bad]), honest) < -0.9


def test_sybils_are_many_and_on_probation_and_copies_come_late() -> None:
    view = view_of(SPARSE_64)
    payloads = BY_NAME["sybils"].make(view)
    assert Counter(each.probation for each in payloads) == {True: SYBILS, False: 2}
    norms = [norm(delta) for delta in read(view, payloads).values()]
    assert max(norms) > 100 * sorted(norms)[len(norms) // 2 - 5] > 100 * min(norms)
    assert all(each.late for each in BY_NAME["copy"].make(view))
    assert [each.held_by for each in BY_NAME["equivocation"].make(view)] == [2, 2]  # with both liars four of six


def test_false_text_has_wrong_answers_at_every_other_place() -> None:
    own = shards().workers[0]
    assert isinstance(own, Batches)
    false = FalseText(own.text, context=own.context, rows=own.rows)
    true_BT, false_BT = own.batch(1, 0), false.batch(1, 0)
    assert torch.equal(true_BT[:, ::2], false_BT[:, ::2])
    pairs = list(zip(true_BT[:, 1::2].flatten().tolist(), false_BT[:, 1::2].flatten().tolist(), strict=True))
    letters = [(true, wrong) for true, wrong in pairs if chr(true).isalpha()]
    assert letters
    assert all(true + wrong == ord("a") + ord("z") for true, wrong in letters)
    assert all(true == wrong for true, wrong in pairs if not chr(true).isalpha())
    assert torch.equal(own.held_out(1), false.held_out(1))


@pytest.mark.slow
@FAMILIES
def test_a_clean_run_learns_and_refuses_nobody(family: Family) -> None:
    result = run("clean", family)
    assert result.loss < 5.5  # knowing nothing is log 256 = 5.55
    assert (result.tally.bad, result.tally.honest, result.tally.refused_honest.total()) == (0, 15, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attack", "reason"),
    [("sign_flip_x10", "score"), ("malformed", MALFORMED), ("lazy", "nothing"), ("copy", "copy")],
)
def test_the_bad_one_is_refused_for_what_it_does(attack: str, reason: str) -> None:
    tally = run(attack, SPARSE_64).tally
    assert tally.refused_bad == {reason: 3}
    assert (tally.bad, tally.honest) == (3, 12)
    assert tally.refused_honest.total() <= 2  # of a model that knows nothing, judged by two and a liar


@pytest.mark.slow
def test_false_text_old_weights_and_a_payload_of_which_few_know_make_another_run() -> None:
    plain = Attack(name="plain", make=honestly)
    few = Attack(name="few", make=lambda view: [replace(each, held_by=0) for each in times(-1.0)(view)])
    runs = (plain, BY_NAME["label_flip"], BY_NAME["stale_base"], few, BY_NAME["sign_flip_x1"])
    results = [played(Case(family=DENSE, attack=attack), shards(), LENGTH, None) for attack in runs]
    assert len({result.loss for result in results}) == len(runs)
    refused = [result.tally.refused_bad.total() for result in results]
    assert (refused[0], refused[3], refused[4]) == (0, 0, 3)  # nobody has scored what nobody has


@pytest.mark.slow
def test_sybils_change_nothing_but_their_own_keys_verdicts() -> None:
    assert run("sybils").loss == run("sign_flip_x10").loss
    assert run("sybils").tally.bad == 3


@pytest.mark.slow
def test_without_a_gate_a_flip_does_harm() -> None:
    naked = run("sign_flip_x10", replace(DENSE, rule=Rule.MEAN), is_gated=False)
    assert naked.tally.refused_bad.total() == 0
    assert naked.loss > run("sign_flip_x10").loss + 0.1


def test_every_attack_is_played_and_the_clean_run_comes_first() -> None:
    every = list(cases(quick=False))
    names = [case.name for case in every if case.group == DENSE.name]
    assert {attack.name for attack in ATTACKS} <= set(names)
    assert all(PLAYED[family.name] <= BY_NAME.keys() for family in (DENSE, SPARSE_64, SPARSE_256))
    first = {case.group: case.name for case in reversed(every)}
    assert set(first.values()) == {"clean"}
    assert f"{UNDEFENDED}_sign_flip_x10" in {case.name for case in every}
    assert all(case.attack is CLEAN or case.is_gated for case in cases(quick=True))


def test_figures_have_the_names_that_are_kept_and_the_worst_ratio() -> None:
    tally = Tally(bad=4, honest=10, refused_bad=Counter(score=3), refused_honest=Counter(copy=1))
    flip = BY_NAME["sign_flip_x1"]
    results = [
        (Case(family=DENSE, attack=CLEAN), Result(loss=2.0, tally=Tally(honest=10), cpu_s=1.0)),
        (Case(family=DENSE, attack=flip), Result(loss=2.1, tally=tally, cpu_s=1.0)),
        (Case(family=SPARSE_64, attack=CLEAN), Result(loss=4.0, tally=Tally(honest=10), cpu_s=1.0)),
        (Case(family=SPARSE_64, attack=flip), Result(loss=4.1, tally=tally, cpu_s=1.0)),
    ]
    assert {row.figure: row.value for row in rows_of(results)} == {
        "sign_flip_x1_loss_ratio": 1.05,
        "sign_flip_x1_refused": 0.75,
        "dense_clean_loss": 2.0,
        "dense_honest_refused": 0.05,
        "sparse64_clean_loss": 4.0,
        "sparse64_honest_refused": 0.05,
    }
