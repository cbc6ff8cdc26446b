"""gossip/gathering.py: when a round closes, which reports count, and the one manifest that follows from them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto.digest import digest
from crypto.identity import PeerId
from gossip.agreement import Place
from gossip.electors import Electors, Terms, turn_of
from gossip.gathering import NEWCOMERS_HEARD_MAX, NEWCOMERS_MAX, STATEMENTS_OF_ONE_MAX, Gathering, Lacking, Unsound
from gossip.rounds import Manifest, Statement
from tests.round_statements import BASE, ELECTORS, MEMBERS, RUN, Equal, header, ids, report

PLACE = Place(run=RUN, round=0, base=BASE, electors=ELECTORS, own=MEMBERS[0])
HEADERS = [header(peer) for peer in MEMBERS]


def gathering(*, held: int = 0, place: Place = PLACE) -> Gathering:
    """All headers, of which the payloads of the first `held` are here, from 1 s on, one a second."""
    made = Gathering(place, 0.0)
    for each in HEADERS:
        assert made.add_header(each, 0.5)
    for number, each in enumerate(HEADERS[:held]):
        made.hold(each.id, 100 + number, 1.0 + number)
    return made


def reported(made: Gathering, *reports: Statement) -> list[Statement]:
    for each in reports:
        assert made.add_report(each)
    return list(reports)


# ---- closing ----


def test_a_round_closes_when_all_are_here_and_not_before_a_quorum_is() -> None:
    assert gathering(held=2).closes_at(9.0) == float("inf")
    assert 3.0 < gathering(held=3).closes_at(9.0) <= 3.0 * 1.25
    assert gathering(held=4).closes_at(9.0) == 9.0


def test_the_grace_grows_with_how_far_apart_the_others_came() -> None:
    close, far = gathering(), gathering()
    for number, each in enumerate(HEADERS[:3]):
        close.hold(each.id, 0, 10.0)
        far.hold(each.id, 0, 8.0 + number)
    assert close.closes_at(11.0) == pytest.approx(10.2)
    assert far.closes_at(11.0) == pytest.approx(9.0 + 3 * 1.0)


def test_who_sits_out_is_present_and_who_gave_a_bad_payload_is_not_waited_for() -> None:
    made = Gathering(PLACE, 0.0)
    rests = header(MEMBERS[3], None)
    for each in (*HEADERS[:3], rests):
        made.add_header(each, 0.5)
    made.hold(HEADERS[0].id, 0, 1.0)
    made.hold(HEADERS[1].id, 0, 1.0)
    assert made.present == {MEMBERS[0], MEMBERS[1], MEMBERS[3]}
    assert made.closes_at(2.0) < 2.0
    made.refuse(HEADERS[2].id, "NaN at 7")
    assert made.closes_at(2.0) == 2.0
    assert made.refused_peers() == {MEMBERS[2]: "NaN at 7"}
    assert [held.header for held in made.report().held] == [HEADERS[0].id, HEADERS[1].id]
    assert made.report().present == (rests.id,)


def test_what_is_held_is_not_refused_later_and_what_is_refused_never_held() -> None:
    made = gathering(held=1)
    made.refuse(HEADERS[0].id, "no")
    made.refuse(HEADERS[1].id, "no")
    made.hold(HEADERS[1].id, 5, 2.0)
    assert [held.header for held in made.report().held] == [HEADERS[0].id]
    assert list(made.refused) == [HEADERS[1].id]


# ---- the manifest ----


def test_everybody_with_the_same_statements_and_payloads_has_the_same_manifest() -> None:
    reports = [report(peer, HEADERS) for peer in MEMBERS[:3]]
    found = []
    for seed in range(5):
        made = Gathering(PLACE, 0.0)
        statements = [*HEADERS]
        random.Random(seed).shuffle(statements)
        for each in statements:
            made.add_header(each, 0.0)
            made.hold(each.id, seed, 0.0)
        reported(made, *random.Random(seed).sample(reports, 3))
        found.append(made.manifest(ids(reports), Equal()))
    assert isinstance(found[0], Manifest)
    assert len(set(found)) == 1
    assert [share.peer for share in found[0].shares] == MEMBERS
    assert {share.weight for share in found[0].shares} == {1 << 20}


def test_what_half_of_the_reports_hold_is_not_in_and_more_than_half_is() -> None:
    made = gathering(held=4)
    reports = reported(
        made, report(MEMBERS[0], HEADERS), report(MEMBERS[1], HEADERS[:3]), report(MEMBERS[2], HEADERS[1:])
    )
    found = made.manifest(ids(reports), Equal())
    assert isinstance(found, Manifest)
    assert [share.peer for share in found.shares] == MEMBERS  # each by two of three
    reports += reported(made, report(MEMBERS[3], HEADERS[:3]))
    found = made.manifest(ids(reports), Equal())
    assert isinstance(found, Manifest)
    assert [share.peer for share in found.shares] == MEMBERS[:3]  # the last by two of four


def test_scores_are_those_of_others_and_no_author_counts_for_itself() -> None:
    made, policy = gathering(held=4), Equal()
    scores = {MEMBERS[0]: 1_000_000, MEMBERS[1]: -5, MEMBERS[2]: 7, MEMBERS[3]: 9}
    reports = reported(made, *(report(peer, HEADERS, score=score) for peer, score in scores.items()))
    made.manifest(ids(reports), policy)
    assert [each.scores for each in policy.asked[0]] == [
        (-5, 7, 9),
        (7, 9, 1_000_000),
        (-5, 9, 1_000_000),
        (-5, 7, 1_000_000),
    ]


def test_who_came_first_is_told_by_the_middle_of_the_reports() -> None:
    made, policy = gathering(held=4), Equal()
    first, second, *others = HEADERS
    orders = [(second, first, *others), (first, second, *others), (first, second, *others)]
    reports = reported(made, *(report(peer, held) for peer, held in zip(MEMBERS, orders, strict=False)))
    made.manifest(ids(reports), policy)
    assert [each.place for each in policy.asked[0]] == [0, 1, 2, 3]


def test_a_report_lists_payloads_as_their_headers_came_and_may_leave_the_score_out() -> None:
    made = Gathering(PLACE, 0.0)
    order = [HEADERS[2], HEADERS[0], HEADERS[1]]
    for each in order:
        made.add_header(each, 0.5)
    for each in HEADERS[:3]:
        made.hold(each.id, None, 1.0)
    assert [held.header for held in made.report().held] == [each.id for each in order]
    assert {held.score for held in made.report().held} == {None}
    reports = reported(made, *(report(peer, HEADERS[:3], score=None) for peer in MEMBERS[:3]))
    policy = Equal()
    made.manifest(ids(reports), policy)
    assert [each.scores for each in policy.asked[0]] == [(), (), ()]


def test_a_manifest_needs_the_statements_and_payloads_that_it_names() -> None:
    made = gathering(held=3)
    reports = [report(peer, HEADERS) for peer in MEMBERS[:3]]
    assert made.manifest(ids(reports), Equal()) == Lacking(statements=True, payloads=())
    reported(made, *reports)
    assert made.manifest(ids(reports), Equal()) == Lacking(statements=False, payloads=(HEADERS[3].id,))
    unknown = header(PeerId("newcomer"))
    other = report(MEMBERS[3], [*HEADERS[:3], unknown])
    reported(made, other)
    assert made.manifest(ids([*reports[:2], other]), Equal()) == Lacking(statements=True, payloads=())
    assert other not in made.usable()


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ([0, 1], "2 reports, wanted one each of 3 voters"),
        ([0, 1, 4], "3 reports, wanted one each of 3 voters"),  # two of one voter
        ([0, 1, 5], "a report names fewer voters than a quorum, or somebody twice"),
        ([0, 1, 6], "a report names fewer voters than a quorum, or somebody twice"),
    ],
)
def test_reports_that_prove_nothing_lead_to_nothing(names: list[int], why: str) -> None:
    made = gathering(held=4)
    other = header(MEMBERS[0], "another")
    made.add_header(other, 0.0)
    reports = [report(peer, HEADERS) for peer in MEMBERS]
    reports.append(report(MEMBERS[0], HEADERS[:3]))
    reports.append(report(MEMBERS[2], HEADERS[:2]))
    reports.append(report(MEMBERS[2], [*HEADERS[:3], other]))
    reported(made, *reports)
    found = made.manifest(ids(reports[number] for number in names), Equal())
    assert isinstance(found, Unsound)
    assert why in found.reason


def test_a_payload_that_is_not_sound_here_is_in_no_manifest() -> None:
    made = gathering(held=3)
    made.refuse(HEADERS[3].id, "of another layout")
    reports = reported(made, *(report(peer, HEADERS) for peer in MEMBERS[:3]))
    found = made.manifest(ids(reports), Equal())
    assert found == Unsound(f"{MEMBERS[3]}'s contribution is not sound: of another layout")


def test_who_sits_out_has_no_weight_and_who_leaves_says_so() -> None:
    made = Gathering(PLACE, 0.0)
    rests, leaves = header(MEMBERS[2], None), header(MEMBERS[3], leaves=True)
    for each in (*HEADERS[:2], rests, leaves):
        made.add_header(each, 0.0)
        made.hold(each.id, 0, 0.0)
    reports = reported(made, *(report(peer, [*HEADERS[:2], leaves], [rests]) for peer in MEMBERS[:3]))
    found = made.manifest(ids(reports), Equal())
    assert isinstance(found, Manifest)
    assert [(share.blob is None, share.weight, share.leaves) for share in found.shares] == [
        (False, 1 << 20, False),
        (False, 1 << 20, False),
        (True, 0, False),
        (False, 1 << 20, True),
    ]


@pytest.mark.parametrize(("roots", "agreed"), [("aaab", True), ("aabb", False)])
def test_a_root_is_told_when_a_quorum_names_it(roots: str, agreed: bool) -> None:
    made = Gathering(PLACE, 0.0)
    headers = [header(peer, root=digest(root.encode())) for peer, root in zip(MEMBERS, roots, strict=True)]
    for each in headers:
        made.add_header(each, 0.0)
        made.hold(each.id, 0, 0.0)
    reports = reported(made, *(report(peer, headers) for peer in MEMBERS))
    found = made.manifest(ids(reports), Equal())
    assert isinstance(found, Manifest)
    assert found.root == (digest(b"a") if agreed else None)


# ---- bounds ----


def test_newcomers_are_few_and_drawn_by_lot() -> None:
    made = gathering()
    newcomers = [PeerId(f"new{number}") for number in range(40)]
    for peer in newcomers:
        made.add_header(header(peer), 0.0)
    chosen = sorted(newcomers, key=lambda peer: turn_of(BASE, peer))[:NEWCOMERS_MAX]
    wanted = {each.sender for each in made.wanted()} - set(MEMBERS)
    assert wanted == set(chosen)


def test_whoever_stands_in_a_report_is_heard_however_many_there_are() -> None:
    made = gathering()
    newcomers = [header(PeerId(f"new{number}")) for number in range(40)]
    for each in newcomers[:-1]:
        made.add_header(each, 0.0)
    last = max(newcomers, key=lambda each: turn_of(BASE, each.sender))
    assert not made.add_header(last, 0.0)
    reported(made, report(MEMBERS[1], [*HEADERS, last]))
    assert made.add_header(last, 0.0)


def test_who_contradicts_itself_is_kept_a_few_times_and_its_first_word_counts() -> None:
    made = gathering(held=4)
    others = [header(MEMBERS[1], f"other {number}") for number in range(STATEMENTS_OF_ONE_MAX + 3)]
    assert [made.add_header(each, 0.0) for each in others].count(True) == STATEMENTS_OF_ONE_MAX - 1
    assert made.report().held[1].header == HEADERS[1].id
    reports = [report(MEMBERS[1], HEADERS[: 3 + number % 2], score=number) for number in range(10)]
    assert [made.add_report(each) for each in reports].count(True) == STATEMENTS_OF_ONE_MAX
    made.proposed_reports.add(reports[-1].id)
    assert made.add_report(reports[-1])


def test_only_voters_report() -> None:
    assert not gathering().add_report(report(PeerId("stranger"), HEADERS))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_reported_at_least_more_voters_than_may_lie_are_in(data: st.DataObject) -> None:
    names = [PeerId(f"m{number:02}") for number in range(data.draw(st.integers(1, 10)))]
    electors = Electors.of_founders(names, Terms())
    place = Place(run=RUN, round=0, base=BASE, electors=electors, own=names[0])
    made = Gathering(place, 0.0)
    headers = [header(peer) for peer in names]
    for each in headers:
        made.add_header(each, 0.0)
        made.hold(each.id, 0, 0.0)
    reporters = data.draw(st.lists(st.sampled_from(names), min_size=electors.quorum, unique=True))
    reports = []
    for peer in reporters:
        held = data.draw(st.lists(st.sampled_from(headers), min_size=electors.quorum, unique_by=lambda each: each.id))
        reports += reported(made, report(peer, held))
    found = made.manifest(ids(reports), Equal())
    assert isinstance(found, Manifest)
    assert len(found.shares) >= 2 * electors.quorum - len(names) > 0


def test_the_payload_of_a_second_header_does_not_make_its_author_present() -> None:
    made = gathering()
    other = header(MEMBERS[1], "another")
    made.add_header(other, 0.0)
    made.hold(other.id, 0, 1.0)
    assert made.present == frozenset()


def test_who_makes_keys_for_a_low_lot_is_not_heard_for_ever() -> None:
    made = gathering()
    newcomers = sorted(
        (PeerId(f"new{number}") for number in range(NEWCOMERS_HEARD_MAX + 1)), key=lambda peer: turn_of(BASE, peer)
    )
    for peer in newcomers[1:]:
        made.add_header(header(peer), 0.0)
    assert not made.add_header(header(newcomers[0]), 0.0)
