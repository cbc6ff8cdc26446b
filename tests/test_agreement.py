"""gossip/agreement.py: the rules one by one, and thousands of histories in an adversary's hands."""

from __future__ import annotations

import pytest

from crypto.digest import Digest, digest
from crypto.identity import PeerId
from gossip.agreement import VIEWS_AHEAD_MAX, Agreement, Check, Decided, Effect, Lack, Place, Saved, Say, Timing, Value
from gossip.ballots import VOTES_OF_ONE_MAX, Ballot
from gossip.electors import Electors, Terms
from gossip.rounds import Precommit, Prevote, Proposal
from tests.simulator_votes import BASE, RUN, Votes

VOTERS = [PeerId(f"v{number}") for number in range(4)]
ELECTORS = Electors.of_founders(VOTERS, Terms())
ORDER = [ELECTORS.proposer(BASE, view) for view in range(4)]  # who proposes in views 0 to 3
TIMING = Timing(propose_s=3.0, vote_s=1.0, growth_s=0.5, gone_s=0.25)
ONE = Value(digest(b"one"), (digest(b"r1"),))
TWO = Value(digest(b"two"), (digest(b"r2"),))


def voter(own: PeerId = ORDER[3]) -> Agreement:
    return Agreement(Place(run=RUN, round=0, base=BASE, electors=ELECTORS, own=own), TIMING)


def begun(own: PeerId = ORDER[3], *, sound: tuple[Value, ...] = (ONE, TWO)) -> Agreement:
    """A voter whose clock runs from 0, and who knows that these are sound."""
    agreement = voter(own)
    agreement.begin(0.0)
    for value in sound:
        agreement.judge(value, True, 0.0)
    return agreement


def proposal(view: int, value: Value, valid_view: int = -1) -> Proposal:
    return Proposal(
        run=RUN,
        round=0,
        base=BASE,
        view=view,
        valid_view=valid_view,
        manifest=value.manifest,
        reports=value.reports,
    )


def prevote(view: int, manifest: Digest | None) -> Prevote:
    return Prevote(run=RUN, round=0, base=BASE, view=view, manifest=manifest)


def precommit(view: int, manifest: Digest | None) -> Precommit:
    return Precommit(run=RUN, round=0, base=BASE, view=view, manifest=manifest)


def said(effects: list[Effect]) -> list[Proposal | Prevote | Precommit]:
    return [effect.body for effect in effects if isinstance(effect, Say)]


def locked_on_one(own: PeerId = ORDER[3]) -> Agreement:
    """A voter that precommitted ONE in view 0 and then went on to view 1."""
    agreement = begun(own)
    others = [peer for peer in ORDER if peer != own][:2]
    agreement.receive(ORDER[0], proposal(0, ONE), 0.1)
    agreement.receive(others[0], prevote(0, ONE.manifest), 0.2)
    assert said(agreement.receive(others[1], prevote(0, ONE.manifest), 0.3)) == [precommit(0, ONE.manifest)]
    for peer in others:
        agreement.receive(peer, precommit(0, None), 0.4)
    agreement.tick(agreement.deadline())
    assert agreement.view == 1
    return agreement


def test_the_good_way_takes_three_messages() -> None:
    first, other = begun(ORDER[0]), begun()
    proposed, own_prevote = said(first.offer(ONE, 0.0))
    assert (proposed, own_prevote) == (proposal(0, ONE), prevote(0, ONE.manifest))
    assert said(other.receive(ORDER[0], proposal(0, ONE), 0.1)) == [prevote(0, ONE.manifest)]
    other.receive(ORDER[0], prevote(0, ONE.manifest), 0.2)
    assert said(other.receive(ORDER[1], prevote(0, ONE.manifest), 0.2)) == [precommit(0, ONE.manifest)]
    assert other.receive(ORDER[0], precommit(0, ONE.manifest), 0.3) == []
    assert other.receive(ORDER[1], precommit(0, ONE.manifest), 0.3) == [Decided(ONE.manifest, 0)]
    assert other.precommitted(ONE.manifest, 0) == {ORDER[0], ORDER[1], ORDER[3]}
    assert other.deadline() == float("inf")


def test_a_proposal_is_checked_once_and_gets_no_prevote_before_it_is_judged() -> None:
    agreement = begun(sound=())
    assert agreement.receive(ORDER[0], proposal(0, ONE), 0.1) == [Check(ONE, ORDER[0])]
    assert agreement.receive(ORDER[1], prevote(0, ONE.manifest), 0.1) == []
    assert said(agreement.judge(ONE, False, 0.2)) == [prevote(0, None)]


def test_a_sound_manifest_with_false_reports_is_refused_and_good_again_with_its_own() -> None:
    agreement = begun(ORDER[2], sound=())
    twisted = Value(ONE.manifest, TWO.reports)
    assert agreement.receive(ORDER[0], proposal(0, twisted), 0.1) == [Check(twisted, ORDER[0])]
    assert said(agreement.judge(twisted, False, 0.2)) == [prevote(0, None)]
    for peer in (ORDER[1], ORDER[3]):
        agreement.receive(peer, precommit(0, None), 0.3)
        agreement.receive(peer, prevote(1, None), 0.4)
    assert agreement.view == 1
    assert agreement.receive(ORDER[1], proposal(1, ONE), 0.5) == [Check(ONE, ORDER[1])]
    assert said(agreement.judge(ONE, True, 0.6)) == [prevote(1, ONE.manifest)]


def test_a_proposal_from_whose_turn_it_is_not_counts_for_nothing() -> None:
    agreement = begun()
    assert agreement.receive(ORDER[1], proposal(0, ONE), 0.1) == []
    assert said(agreement.receive(ORDER[0], proposal(0, TWO), 0.2)) == [prevote(0, TWO.manifest)]


def test_who_does_not_vote_is_not_heard() -> None:
    agreement = begun()
    stranger = PeerId("stranger")
    for peer in (ORDER[0], ORDER[1], stranger):
        agreement.receive(peer, precommit(0, ONE.manifest), 0.1)
    assert agreement.decided is None


def test_a_lock_holds_against_another_manifest() -> None:
    agreement = locked_on_one()
    assert said(agreement.receive(ORDER[1], proposal(1, TWO), 3.0)) == [prevote(1, None)]


def test_a_lock_is_given_up_for_a_quorum_of_prevotes_in_a_later_view_only() -> None:
    agreement = locked_on_one()
    for view in (1, 2):
        agreement.tick(agreement.deadline())  # no proposal: prevotes nothing
        for peer in ORDER[:3]:
            agreement.receive(peer, prevote(view, TWO.manifest if view == 1 else None), 9.0)
            agreement.receive(peer, precommit(view, None), 9.0)
        agreement.tick(agreement.deadline())
    assert agreement.view == 3
    agreement.offer(TWO, 20.0)
    own = [each for each in agreement.said if isinstance(each, Proposal)]
    assert own == [proposal(3, ONE, valid_view=0)]  # what it knows to be valid, not what it would like
    follower = locked_on_one(ORDER[2])
    for peer in (ORDER[0], ORDER[1], ORDER[3]):
        follower.receive(peer, prevote(1, TWO.manifest), 9.0)
        follower.receive(peer, precommit(3, None), 9.0)
    assert follower.view == 3
    assert said(follower.receive(ORDER[3], proposal(3, TWO, valid_view=1), 20.0)) == [prevote(3, TWO.manifest)]


def test_a_claimed_quorum_is_asked_for_and_not_believed() -> None:
    agreement = locked_on_one()
    effects = agreement.receive(ORDER[1], proposal(1, TWO, valid_view=0), 3.0)
    assert effects == [Lack(ORDER[1], 0)]
    assert agreement.tick(3.1) == []
    assert said(agreement.tick(agreement.deadline())) == [prevote(1, None)]


def test_what_is_locked_is_proposed_again() -> None:
    agreement = locked_on_one(ORDER[1])
    assert proposal(1, ONE, valid_view=0) in agreement.said


def test_times_run_out_step_by_step_and_views_become_longer() -> None:
    agreement = begun()
    assert agreement.deadline() == 3.0
    assert said(agreement.tick(3.0)) == [prevote(0, None)]
    assert agreement.deadline() == float("inf")  # two more prevotes are needed
    for peer in ORDER[:2]:
        agreement.receive(peer, prevote(0, ONE.manifest if peer == ORDER[0] else None), 4.0)
    assert agreement.deadline() == 5.0
    assert said(agreement.tick(5.0)) == [precommit(0, None)]
    for peer in ORDER[:2]:
        agreement.receive(peer, precommit(0, None), 6.0)
    assert agreement.deadline() == 7.0
    agreement.tick(7.0)
    assert (agreement.view, agreement.deadline()) == (1, 7.0 + 3.0 + 0.5)


def test_a_proposer_without_a_connection_is_not_waited_for() -> None:
    agreement = voter()
    agreement.gone = frozenset({ORDER[0]})
    agreement.begin(0.0)
    assert agreement.deadline() == 0.25


def test_more_than_the_liars_in_a_later_view_take_a_voter_along() -> None:
    agreement = begun()
    agreement.receive(ORDER[0], prevote(7, None), 0.1)
    assert agreement.view == 0  # one may lie
    agreement.receive(ORDER[1], prevote(5 + VIEWS_AHEAD_MAX, None), 0.1)
    assert agreement.view == 7


def test_votes_far_ahead_are_not_kept() -> None:
    agreement = begun()
    far = VIEWS_AHEAD_MAX + 1
    agreement.receive(ORDER[0], precommit(far, ONE.manifest), 0.1)
    assert not agreement.kept_last
    assert agreement.precommitted(ONE.manifest, far) == frozenset()


def test_a_liars_votes_count_for_each_of_its_manifests_and_are_few() -> None:
    ballot = Ballot()
    for number in range(VOTES_OF_ONE_MAX + 5):
        ballot.add(ORDER[0], digest(b"%d" % number), is_proposed=False)
    assert len([each for each in ballot.by_manifest.values() if each]) == VOTES_OF_ONE_MAX
    assert ballot.add(ORDER[0], ONE.manifest, is_proposed=True)
    assert (ballot.count(ONE.manifest), ballot.voters) == (1, 1)
    assert not ballot.add(ORDER[0], ONE.manifest, is_proposed=True)


def test_after_a_restart_it_says_the_same_and_nothing_else() -> None:
    before = begun(ORDER[0])
    first = said(before.offer(ONE, 0.0))
    place = Place(run=RUN, round=0, base=BASE, electors=ELECTORS, own=ORDER[0])
    after = Agreement(place, TIMING, before.save())
    assert said(after.begin(10.0) + after.offer(TWO, 10.0)) == []
    assert after.said == first
    after.judge(ONE, True, 10.0)
    after.receive(ORDER[1], prevote(0, ONE.manifest), 10.0)
    assert said(after.receive(ORDER[2], prevote(0, ONE.manifest), 10.0)) == [precommit(0, ONE.manifest)]


def test_a_vote_that_was_kept_is_the_only_one_wherever_its_voter_thinks_to_stand() -> None:
    place = Place(run=RUN, round=0, base=BASE, electors=ELECTORS, own=ORDER[3])
    agreement = Agreement(place, TIMING, Saved(said=(prevote(0, ONE.manifest),)))
    agreement.begin(0.0)
    agreement.judge(TWO, True, 0.0)
    assert said(agreement.receive(ORDER[0], proposal(0, TWO), 0.1)) == []


def test_who_forgot_what_it_said_is_silent() -> None:
    agreement = begun()
    agreement.mute()
    assert agreement.receive(ORDER[0], proposal(0, ONE), 0.1) == []
    assert said(agreement.tick(100.0)) == []


def test_who_looks_on_decides_by_the_votes_of_others() -> None:
    looker = voter(PeerId("looker"))
    effects = [effect for peer in ORDER[:3] for effect in looker.receive(peer, precommit(2, ONE.manifest), 0.0)]
    assert effects == [Decided(ONE.manifest, 2)]


def test_one_voter_alone_decides_by_itself() -> None:
    alone = Electors.of_founders(VOTERS[:1], Terms())
    agreement = Agreement(Place(run=RUN, round=0, base=BASE, electors=alone, own=VOTERS[0]), TIMING)
    agreement.begin(0.0)
    assert Decided(ONE.manifest, 0) in agreement.offer(ONE, 0.0)


@pytest.mark.parametrize("name", ["propose_s", "vote_s", "growth_s", "gone_s"])
def test_times_are_more_than_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} = 0"):
        Timing(**{name: 0.0})


# ---- histories ----


def histories(seeds: range) -> None:
    for seed in seeds:
        voters = (4, 4, 4, 7, 5, 3)[seed % 6]
        outcome = Votes(seed, voters).run()
        assert outcome.wrong == (), f"Votes({seed}, {voters}).run()"


@pytest.mark.slow
def test_no_history_has_two_decisions_and_each_has_one() -> None:
    histories(range(150))


@pytest.mark.soak
def test_no_history_of_many_has_two_decisions_and_each_has_one() -> None:
    histories(range(20_000))
