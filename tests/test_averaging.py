"""gossip/averaging.py: what a member says, keeps, asks and applies; then whole runs over bad wires with liars."""

from __future__ import annotations

import pytest

from crypto.digest import digest
from crypto.identity import PeerId
from gossip.averaging import ASK_S, EARLY_MAX, REPORTS_GRACE_S, RESAY_S, Averaging
from gossip.errors import RemoteProtocolError
from gossip.gathering import STATEMENTS_OF_ONE_MAX
from gossip.round_effects import Accuse, Apply, Ask, Behind, Effect, Fetch, Keep, Kept, Tell
from gossip.round_state import Phase
from gossip.rounds import Body, Committed, Header, Precommit, Prevote, Proposal, Report, Statement
from tests.round_statements import CHAIN, MEMBERS, RUN, Equal, contribution, header, report, signed
from tests.simulator_rounds import Scenario, simulate

FIRST = CHAIN.electors.proposer(CHAIN.base, 0)
OTHERS = [peer for peer in MEMBERS if peer != FIRST]


def member(own: PeerId = FIRST, kept: Kept | None = None) -> tuple[Averaging, list[Effect]]:
    averaging = Averaging(CHAIN, own, lambda body: signed(own, body), Equal())
    return averaging, averaging.begin(0.0, kept)


def contributed(averaging: Averaging, own: PeerId = FIRST, now: float = 1.0) -> list[Effect]:
    body = header(own).body
    assert isinstance(body, Header)
    return averaging.contribute(body, 0, now)


def told(effects: list[Effect], kind: type[Body] | None = None) -> list[Statement]:
    statements = [effect.statement for effect in effects if isinstance(effect, Tell)]
    return [each for each in statements if kind is None or isinstance(each.body, kind)]


def one_round(averaging: Averaging, own: PeerId = FIRST) -> list[Effect]:
    """Everybody works, holds, reports and votes as it should; all effects up to the Apply."""
    effects = contributed(averaging, own)
    headers = [header(peer) for peer in MEMBERS]
    for each in headers:
        if each.sender != own:
            effects += averaging.receive(each, 1.1)
            effects += averaging.held(each.id, 0, 1.2)
    for peer in MEMBERS:
        if peer != own:
            effects += averaging.receive(report(peer, headers), 1.3)
    proposals = told(effects, Proposal)
    assert len(proposals) == 1
    place = proposals[0].body
    assert isinstance(place, Proposal)
    for kind in (Prevote, Precommit):
        for peer in MEMBERS:
            vote = kind(run=RUN, round=0, base=CHAIN.base, view=0, manifest=place.manifest)
            if peer != own:
                effects += averaging.receive(signed(peer, vote), 1.4)
    return effects


def record() -> Committed:
    effects = one_round(member()[0])
    return next(effect.committed for effect in effects if isinstance(effect, Apply))


def test_a_round_ends_in_one_record_that_everybody_can_check() -> None:
    averaging, _ = member()
    effects = one_round(averaging)
    applied = [effect for effect in effects if isinstance(effect, Apply)]
    assert len(applied) == 1
    assert averaging.phase is Phase.APPLYING
    assert len({vote.sender for vote in applied[0].committed.votes}) >= 3
    other, _ = member(OTHERS[0])
    assert other.receive_record(applied[0].committed, 2.0) == [Apply(applied[0].committed)]
    averaging.applied(3.0)
    other.applied(3.0)
    assert averaging.chain == other.chain
    assert (averaging.chain.round, averaging.phase) == (1, Phase.WORKING)


def test_what_is_said_is_kept_first() -> None:
    averaging, _ = member()
    effects = one_round(averaging)
    kept: set[bytes] = set()
    for effect in effects:
        match effect:
            case Keep(state):
                kept |= {each.id for each in state.said}
            case Tell(statement):
                assert statement.id in kept
            case _:
                pass
    assert len(kept) == 5  # header, report, proposal, prevote, precommit


def test_a_restart_says_what_was_said_and_nothing_else() -> None:
    averaging, _ = member()
    effects = one_round(averaging)
    kept = [effect.kept for effect in effects if isinstance(effect, Keep)][-1]
    again, first = member(kept=kept)
    assert {each.id for each in told(first)} == {each.id for each in told(effects)}
    assert contributed(again) == []
    assert told(again.receive(header(OTHERS[0]), 1.5)) == []


def test_why_it_is_locked_can_be_shown_after_a_restart() -> None:
    averaging, _ = member()
    kept = [effect.kept for effect in one_round(averaging) if isinstance(effect, Keep)][-1]
    assert {each.sender for each in kept.heard if isinstance(each.body, Report)} == set(OTHERS)
    again, _ = member(kept=kept)
    prevotes = {each.sender for each in again.known() if isinstance(each.body, Prevote)}
    assert len(prevotes) >= CHAIN.electors.quorum


def test_what_a_proposer_does_not_give_is_asked_of_others() -> None:
    averaging, _ = member(OTHERS[0])
    contributed(averaging, OTHERS[0])
    unknown = Proposal(
        run=RUN, round=0, base=CHAIN.base, view=0, valid_view=-1, manifest=digest(b"m"), reports=(digest(b"r"),)
    )
    asked = [each.peer for each in averaging.receive(signed(FIRST, unknown), 1.5) if isinstance(each, Ask)]
    for number in range(1, 4):
        effects = averaging.receive(header(PeerId(f"new{number}")), 1.5 + number * ASK_S)
        asked += [each.peer for each in effects if isinstance(each, Ask)]
    assert asked[0] == FIRST
    assert set(asked) == set(MEMBERS) - {OTHERS[0]}


def test_what_was_kept_of_another_round_is_of_no_use() -> None:
    kept = Kept(round=7, base=CHAIN.base, said=(header(FIRST),))
    averaging, effects = member(kept=kept)
    assert effects == []
    assert len(told(contributed(averaging))) == 1


def test_who_finds_that_it_forgot_what_it_said_is_silent_until_the_round_is_over() -> None:
    averaging, _ = member()
    averaging.receive(header(FIRST, "what it said before"), 0.5)
    assert contributed(averaging) == []
    headers = [header(peer) for peer in OTHERS]
    effects = []
    for each in headers:
        effects += averaging.receive(each, 1.0) + averaging.held(each.id, 0, 1.0)
    assert averaging.phase is Phase.WORKING
    effects += averaging.tick(averaging.deadline())
    assert averaging.phase is Phase.AGREEING
    assert told(effects) == []
    assert averaging.receive_record(record(), 2.0) == [Apply(record())]


def test_who_forgot_does_not_vote_either() -> None:
    own = OTHERS[0]
    proposer, _ = member()
    proposals = told(one_round(proposer), Proposal)
    averaging, _ = member(own)
    averaging.receive(header(own, "what it said before"), 0.5)
    headers = [header(peer) for peer in MEMBERS]
    effects = []
    for each in headers:
        effects += averaging.receive(each, 1.0) + averaging.held(each.id, 0, 1.0)
    for peer in MEMBERS:
        effects += averaging.receive(report(peer, headers), 1.1)
    effects += averaging.receive(proposals[0], 1.2)
    assert averaging.phase is Phase.AGREEING
    for _ in range(3):
        effects += averaging.tick(averaging.deadline())
    assert told(effects) == []


def test_the_last_reports_have_a_moment_to_come() -> None:
    averaging, _ = member()
    effects = contributed(averaging)
    headers = [header(peer) for peer in MEMBERS]
    for each in headers:
        if each.sender != FIRST:
            effects += averaging.receive(each, 1.1) + averaging.held(each.id, 0, 1.1)
    for peer in OTHERS[:2]:
        effects += averaging.receive(report(peer, headers), 1.2)
    assert told(effects, Proposal) == []
    assert averaging.deadline() == pytest.approx(1.2 + REPORTS_GRACE_S)
    assert len(told(averaging.tick(averaging.deadline()), Proposal)) == 1


def test_members_ask_each_other_in_turn_for_what_they_heard() -> None:
    averaging, _ = member()
    contributed(averaging)
    asked = []
    for _ in range(3):
        asked += [each.peer for each in averaging.tick(averaging.deadline()) if isinstance(each, Ask)]
    assert sorted(asked) == OTHERS


def test_payloads_are_fetched_from_who_has_them_and_again_when_they_do_not_come() -> None:
    averaging, _ = member()
    wanted = header(OTHERS[0])
    assert averaging.receive(wanted, 0.5) == [Fetch(wanted, (OTHERS[0],))]
    effects = averaging.receive(report(OTHERS[1], [wanted]), 0.6)
    assert effects == []
    again = [each for each in averaging.tick(RESAY_S) if isinstance(each, Fetch)]
    assert again == [Fetch(wanted, (OTHERS[0], OTHERS[1]))]
    averaging.held(wanted.id, 0, 3.0)
    assert [each for each in averaging.tick(averaging.deadline()) if isinstance(each, Fetch)] == []


def test_what_is_not_over_is_said_again_ever_more_rarely() -> None:
    averaging, _ = member()
    contributed(averaging, now=1.0)
    times = []
    for _ in range(4):
        times.append(averaging.deadline())
        assert len(told(averaging.tick(averaging.deadline()), Header)) == 1
    assert times == [3.0, 7.0, 15.0, 30.0]


def test_who_speaks_of_a_round_that_is_over_is_behind_and_who_is_ahead_is_asked() -> None:
    averaging, _ = member()
    one_round(averaging)
    averaging.applied(2.0)
    late = header(OTHERS[0], "too late")
    assert averaging.receive(late, 3.0) == [Behind(OTHERS[0], 0)]
    assert averaging.receive(header(OTHERS[0], "again"), 3.1) == []
    assert averaging.receive(header(OTHERS[0], "again and again"), 3.1 + ASK_S) == [Behind(OTHERS[0], 0)]
    assert averaging.receive(header(OTHERS[1]), 9.0) == []  # a copy of what was part of that round
    behind, _ = member(OTHERS[2])
    ahead = header(OTHERS[0], chain=averaging.chain)
    assert behind.receive(ahead, 3.0) == [Ask(OTHERS[0], 0)]
    assert behind.receive(header(OTHERS[1], chain=averaging.chain), 3.1) == []


def test_what_came_too_early_counts_when_its_round_begins() -> None:
    ahead, _ = member()
    one_round(ahead)
    ahead.applied(2.0)
    behind, _ = member(OTHERS[2])
    early = header(OTHERS[0], chain=ahead.chain)
    behind.receive(early, 1.0)
    behind.receive_record(record(), 2.0)
    assert behind.applied(3.0) == [Fetch(early, (OTHERS[0],))]


def test_what_comes_early_is_bounded() -> None:
    averaging, _ = member()
    ahead, _ = member()
    one_round(ahead)
    ahead.applied(2.0)
    for number in range(EARLY_MAX + 10):
        averaging.receive(header(OTHERS[0], f"{number}", chain=ahead.chain), 1.0)
    averaging.receive_record(record(), 2.0)
    averaging.applied(3.0)
    assert averaging.statistics().drops["of_no_use"] == EARLY_MAX - STATEMENTS_OF_ONE_MAX
    assert len(averaging.known()) == STATEMENTS_OF_ONE_MAX


@pytest.mark.parametrize("again", [0, 1])
def test_who_says_two_things_is_accused_once_and_who_says_one_twice_is_not(again: int) -> None:
    averaging, _ = member()
    first, same = header(OTHERS[0]), signed(OTHERS[0], header(OTHERS[0]).body, again=1)
    averaging.receive(first, 0.1)
    assert [each for each in averaging.receive(same, 0.2) if isinstance(each, Accuse)] == []
    other = header(OTHERS[0], "something else")
    effects = averaging.receive(other, 0.3)
    assert Accuse(OTHERS[0], first, other) in effects
    assert [each for each in averaging.receive(header(OTHERS[0], "a third"), 0.4) if isinstance(each, Accuse)] == []


def test_two_votes_of_one_voter_in_a_view_are_evidence() -> None:
    averaging, _ = member()
    one, two = (
        signed(OTHERS[0], Prevote(run=RUN, round=0, base=CHAIN.base, view=0, manifest=digest(what)))
        for what in (b"1", b"2")
    )
    averaging.receive(one, 0.1)
    assert averaging.receive(two, 0.2) == [Accuse(OTHERS[0], one, two)]


def test_statements_of_other_runs_histories_and_strangers_change_nothing() -> None:
    averaging, _ = member()
    stranger = PeerId("stranger")
    other_run = Header(run=digest(b"other"), round=0, base=CHAIN.base, contribution=contribution("x"))
    other_base = Header(run=RUN, round=0, base=digest(b"other"), contribution=contribution("x"))
    vote = Prevote(run=RUN, round=0, base=CHAIN.base, view=0, manifest=None)
    for sender, body in ((OTHERS[0], other_run), (OTHERS[0], other_base), (stranger, vote)):
        assert averaging.receive(signed(sender, body), 0.1) == []
    assert averaging.receive(report(stranger, []), 0.1) == []
    assert averaging.known() == ()
    assert averaging.statistics().drops == {"other_run": 1, "other_history": 1, "not_a_voter": 2}


@pytest.mark.parametrize("fault", ["few", "twice", "other", "views", "stranger", "prevotes"])
def test_a_record_that_proves_nothing_is_refused(fault: str) -> None:
    good = record()
    votes = {vote.sender: vote for vote in good.votes}
    three = [votes[peer] for peer in sorted(votes)[:3]]

    def changed(statement: Statement, **fields: object) -> Statement:
        body = statement.body
        assert isinstance(body, Precommit)
        values = {"run": body.run, "round": 0, "base": body.base, "view": body.view, "manifest": body.manifest}
        return signed(statement.sender, Precommit(**(values | fields)))  # type: ignore[arg-type]

    match fault:
        case "few":
            bad = three[:2]
        case "twice":
            bad = [*three[:2], changed(three[0])]
        case "other":
            bad = [*three[:2], changed(three[2], manifest=digest(b"other"))]
        case "views":
            bad = [*three[:2], changed(three[2], view=1)]
        case "stranger":
            bad = [*three[:2], signed(PeerId("stranger"), three[2].body)]
        case _:
            bad = [
                *three[:2],
                signed(three[2].sender, Prevote(run=RUN, round=0, base=CHAIN.base, view=0, manifest=None)),
            ]
    averaging, _ = member(OTHERS[2])
    with pytest.raises(RemoteProtocolError):
        averaging.receive_record(Committed(manifest=good.manifest, votes=tuple(bad)), 1.0)
    assert averaging.receive_record(Committed(manifest=good.manifest, votes=tuple(three)), 1.0) != []


def test_work_for_a_round_that_is_over_is_too_late() -> None:
    averaging, _ = member(OTHERS[0])
    averaging.receive_record(record(), 1.0)
    assert contributed(averaging, OTHERS[0]) == []
    averaging.applied(2.0)
    assert contributed(averaging, OTHERS[0]) == []


def test_the_round_is_told_for_people() -> None:
    averaging, _ = member()
    contributed(averaging)
    averaging.receive(header(OTHERS[0]), 1.0)
    averaging.refused(header(OTHERS[0]).id, "norm 1e30", 1.0)
    statistics = averaging.statistics()
    assert (statistics.round, statistics.phase, statistics.view) == (0, Phase.WORKING, 0)
    assert statistics.present == (FIRST,)
    assert statistics.refused == {OTHERS[0]: "norm 1e30"}
    assert statistics.voters == tuple(MEMBERS)


def test_a_report_is_made_once_the_round_is_closed() -> None:
    averaging, _ = member()
    contributed(averaging)
    for peer in OTHERS[:2]:
        averaging.receive(header(peer), 1.0)
        assert averaging.held(header(peer).id, 3, 1.0) == [] or averaging.phase is Phase.WORKING
    effects = averaging.tick(averaging.deadline())
    reports = told(effects, Report)
    assert len(reports) == 1
    body = reports[0].body
    assert isinstance(body, Report)
    assert {held.header for held in body.held} == {header(peer).id for peer in (FIRST, *OTHERS[:2])}


# ---- whole runs ----

SCENARIOS = (
    Scenario(),
    Scenario(members=4, newcomers=2),
    Scenario(liars=0, absent_max=3, crashes_per_min=15.0),
    Scenario(members=3, liars=0, absent_max=3),
    Scenario(members=10, newcomers=3, faults_s=25.0, quiet_s=40.0),
    Scenario(members=1, newcomers=1, liars=0, cuts_per_min=0.0),
    Scenario(members=2, newcomers=0, liars=0),
)


def runs(seeds: range) -> None:
    for seed in seeds:
        scenario = SCENARIOS[seed % len(SCENARIOS)]
        outcome = simulate(seed, scenario)
        assert outcome.wrong == (), f"tests.simulator_rounds.simulate({seed}, {scenario})"
        assert outcome.rounds >= scenario.rounds_after


@pytest.mark.slow
def test_no_two_honest_members_commit_different_manifests_and_all_go_on_when_faults_end() -> None:
    runs(range(50))


@pytest.mark.soak
def test_in_many_runs_no_two_honest_members_commit_different_manifests() -> None:
    runs(range(2_000))


def test_a_seed_is_a_history() -> None:
    scenario = Scenario(members=4, faults_s=10.0, quiet_s=20.0)
    assert simulate(3, scenario).digest == simulate(3, scenario).digest != simulate(4, scenario).digest


def test_liars_are_found_out() -> None:
    outcome = simulate(5, Scenario(members=4, newcomers=0, crashes_per_min=0.0, cuts_per_min=0.0, loss=0.0))
    assert len(outcome.accused) == 1
