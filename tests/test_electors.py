"""gossip/electors.py: quorums, whose turn it is, who becomes a voter and who ceases to be one."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crypto.digest import digest
from crypto.identity import PeerId
from gossip.electors import Electors, Terms, liars_max, quorum
from gossip.rounds import MEMBERS_MAX, Manifest, Share

RUN, BLOB = bytes(32), digest(b"blob")
NAMES = [PeerId(f"m{number:02}") for number in range(8)]


def manifest(there: list[PeerId], *, rests: tuple[PeerId, ...] = (), leaves: tuple[PeerId, ...] = ()) -> Manifest:
    shares = tuple(
        Share(peer=peer, header=digest(peer.encode()), blob=None if peer in rests else BLOB, leaves=peer in leaves)
        for peer in sorted(there)
    )
    return Manifest(run=RUN, round=0, base=RUN, shares=shares, reports=(RUN,))


@pytest.mark.parametrize("voters", range(1, MEMBERS_MAX + 1))
def test_two_quorums_share_an_honest_voter_and_the_honest_are_one(voters: int) -> None:
    assert 2 * quorum(voters) - voters > liars_max(voters)
    assert voters - liars_max(voters) >= quorum(voters)
    assert 3 * liars_max(voters) < voters


def test_everybody_proposes_once_before_anybody_does_twice_and_the_order_changes_with_the_base() -> None:
    electors = Electors.of_founders(NAMES, Terms())
    orders = [[electors.proposer(digest(base), view) for view in range(8)] for base in (b"one", b"two")]
    assert sorted(orders[0]) == sorted(orders[1]) == NAMES
    assert orders[0] != orders[1]
    assert electors.proposer(digest(b"one"), 8) == orders[0][0]


def test_who_misses_rounds_in_a_row_is_no_voter_any_more_and_one_round_does_no_harm() -> None:
    electors = Electors.of_founders(NAMES[:4], Terms(absent_max=2))
    once = electors.after(manifest(NAMES[:3]))
    assert once.voters == electors.voters
    assert once.after(manifest(NAMES[:4])).after(manifest(NAMES[:3])).is_voter(NAMES[3])
    assert once.after(manifest(NAMES[:3])).voters == tuple(NAMES[:3])


def test_who_sits_a_round_out_stays_and_who_leaves_goes_at_once() -> None:
    electors = Electors.of_founders(NAMES[:4], Terms(absent_max=1))
    after = electors.after(manifest(NAMES[:4], rests=(NAMES[0],), leaves=(NAMES[1],)))
    assert after.voters == (NAMES[0], NAMES[2], NAMES[3])


def test_a_newcomer_votes_after_its_probation_and_few_do_in_one_round() -> None:
    electors = Electors.of_founders(NAMES[:4], Terms(probation=2))
    first = electors.after(manifest(NAMES))
    assert (first.voters, first.is_proven(NAMES[4])) == (tuple(NAMES[:4]), False)
    second = first.after(manifest(NAMES))
    assert second.is_proven(NAMES[7])
    assert second.voters == tuple(NAMES[:5])  # a quarter of four
    assert second.after(manifest(NAMES)).voters == tuple(NAMES[:6])


def test_a_newcomer_that_only_sits_out_is_not_known_and_one_that_went_away_begins_again() -> None:
    electors = Electors.of_founders(NAMES[:2], Terms(probation=2, absent_max=1))
    assert NAMES[4] not in electors.after(manifest([*NAMES[:2], NAMES[4]], rests=(NAMES[4],))).members
    known = electors.after(manifest([*NAMES[:2], NAMES[4]]))
    assert known.members[NAMES[4]].there == 1
    back = known.after(manifest(NAMES[:2])).after(manifest([*NAMES[:2], NAMES[4]]))
    assert back.members[NAMES[4]].there == 1


def test_there_are_never_more_voters_than_the_terms_say() -> None:
    electors = Electors.of_founders(NAMES[:3], Terms(probation=1, voters_max=4))
    for _ in range(5):
        electors = electors.after(manifest(NAMES))
    assert len(electors.voters) == 4


def test_when_all_leave_nobody_votes() -> None:
    electors = Electors.of_founders(NAMES[:2], Terms())
    assert electors.after(manifest(NAMES[:2], leaves=tuple(NAMES[:2]))).voters == ()


@given(st.lists(st.sets(st.sampled_from(NAMES), min_size=1), max_size=12))
def test_the_same_chain_names_the_same_voters(history: list[set[PeerId]]) -> None:
    one = two = Electors.of_founders(NAMES[:4], Terms())
    for there in history:
        one, two = one.after(manifest(sorted(there))), two.after(manifest(sorted(there)))
        assert (one.voters, one.members) == (two.voters, two.members)
        assert set(one.voters) <= one.members.keys()


@pytest.mark.parametrize(("founders", "wanted"), [([], "0 founders came"), (NAMES, "8 founders came, wanted 1 to 4")])
def test_founders_are_few_and_somebody(founders: list[PeerId], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        Electors.of_founders(founders, Terms(voters_max=4))


@pytest.mark.parametrize("terms", [{"probation": 0}, {"absent_max": 0}, {"voters_max": 0}, {"voters_max": 65}])
def test_terms_that_mean_nothing_are_refused(terms: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="came, wanted"):
        Terms(**terms)


def test_any_two_quorums_of_seven_overlap_in_three() -> None:
    """The arithmetic above, by hand once."""
    assert quorum(7) == 5
    assert min(len(set(a) & set(b)) for a in combinations(range(7), 5) for b in combinations(range(7), 5)) == 3
