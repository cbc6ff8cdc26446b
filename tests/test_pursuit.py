"""node/pursuit.py: a model that nobody known serves is asked for once, before the client is told that nobody does."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from msgspec.structs import replace

from crypto.identity import PeerId
from gossip.messages import Advert, Capacity, ModelKind, ModelOffer
from gossip.offer import Offer
from gossip.routing import Candidate, Need, Why, WhyNot
from node.errors import BadRequest, NoRoom, NotReady, PeerFailed, TooLong, UnknownModel
from node.front import Route, RouteHint
from node.lineage import lineage_of
from node.loading import Loading
from node.pursuit import HURRY_S, Pursuit, Seek, pursue
from node.work import GenerateWork, Sampling, Started

TALE = ModelOffer(name="tale", revision="r1", kind=ModelKind.CAUSAL, context_tokens=100, dtype="bf16")


def candidate(name: str, revision: str = "r1") -> Candidate:
    model = replace(TALE, revision=revision)
    said = Advert(instance="0" * 16, started_ms=0, agent="t", capacity=Capacity(models=(model,), slots_free=0))
    offer = Offer(peer=PeerId(name), sequence=1, advert=said, received_s=0.0, expires_s=9.0)
    return Candidate(offer=offer, model=model, cost_s=1.0, in_doubt=False)


@dataclass
class Around:
    """Surroundings in which `known` serve the model, at `revision`."""

    known: list[str] = field(default_factory=list)
    revision: str = "r1"
    why: Why = Why.NONE_SERVES
    own = PeerId("us")
    hosting = None
    loading: Loading | None = None

    def rank(self, need: Need) -> tuple[Candidate, ...] | WhyNot:
        names = self.known if need.revision in (None, self.revision) else []
        found = tuple(candidate(name, self.revision) for name in names if name not in need.exclude)
        return found or WhyNot(why=self.why)

    def served_names(self) -> set[str]:
        return set()


def pursuit(around: Around, route: RouteHint | None = None, model: str | None = "tale") -> Pursuit:  # type: ignore[type-arg]
    work = GenerateWork(request_id="r", model=model, tokens=(1,), sampling=Sampling(max_tokens=3), remaining_ms=1000)
    return pursue(work, route or RouteHint(), around, 0.0)


def test_an_unknown_model_is_searched_for_once() -> None:
    around = Around()
    one = pursuit(around)
    assert one.step() == Seek("tale")
    with pytest.raises(UnknownModel):
        one.step()


def test_who_was_found_is_asked() -> None:
    around = Around()
    one = pursuit(around)
    assert one.step() == Seek("tale")
    around.known.append("far")
    target = one.step()
    assert isinstance(target, Candidate)
    assert target.peer == "far"
    assert one.tries == 1  # the search is no attempt


@pytest.mark.parametrize("route", [RouteHint(route=Route.LOCAL), RouteHint(peer="them")])
def test_where_the_client_chose_nobody_else_is_searched_for(route: RouteHint) -> None:
    with pytest.raises(UnknownModel):
        pursuit(Around(), route).step()


def test_without_a_name_any_model_is_searched_for() -> None:
    one = pursuit(Around(), model=None)
    assert one.step() == Seek(None)
    with pytest.raises(UnknownModel):
        one.step()


def test_full_peers_are_known_peers() -> None:
    with pytest.raises(NoRoom):
        pursuit(Around(why=Why.ALL_FULL)).step()


def test_half_an_answer_is_worth_a_search_for_its_model() -> None:
    around = Around(["near"])
    one = pursuit(around, model=None)
    target = one.step()
    assert isinstance(target, Candidate)
    one.take(Started(served_by="near", model="tale", revision="r1", prompt_tokens=1))
    one.failed(target, PeerFailed("gone"))
    assert one.step() == Seek("tale")
    around.known.append("far")
    assert isinstance(one.step(), Candidate)


def begun(around: Around, revision: str) -> Pursuit:  # type: ignore[type-arg]
    """An answer of `near` at a revision, whose peer then failed."""
    around.known.append("near")
    around.revision = revision
    one = pursuit(around)
    target = one.step()
    assert isinstance(target, Candidate)
    one.take(Started(served_by="near", model="tale", revision=revision, prompt_tokens=1))
    one.failed(target, PeerFailed("gone"))
    return one


def test_an_answer_of_a_run_goes_on_under_its_next_round() -> None:
    around = Around()
    one = begun(around, "tales-r7-0123456789ab")
    around.known, around.revision = ["far"], "tales-r8-ba9876543210"
    target = one.step()
    assert isinstance(target, Candidate)
    assert target.peer == "far"
    assert one.continued(0.0).revision is None


@pytest.mark.parametrize(
    "later",
    ["other-r8-ba9876543210", "sha256-0123456789ab", "tales-r8-ba9876543210-int8", "tales-r7-0123456789ab-int4"],
)
def test_an_answer_never_goes_on_under_weights_of_another_run(later: str) -> None:
    around = Around()
    one = begun(around, "tales-r7-0123456789ab")
    around.known, around.revision = ["far"], later
    assert one.step() == Seek("tale")
    with pytest.raises(PeerFailed, match="tales-r7"):
        one.step()


def test_an_answer_of_quantized_weights_goes_on_under_such() -> None:
    around = Around()
    one = begun(around, "tales-r7-0123456789ab-int8")
    around.known, around.revision = ["far"], "tales-r8-ba9876543210-int8"
    assert isinstance(one.step(), Candidate)
    assert lineage_of("tales-r7-0123456789ab-int8") == "tales-int8"
    assert lineage_of("sha256-0123456789ab-int8") == ""


def test_an_answer_of_plain_weights_goes_on_under_the_same() -> None:
    around = Around()
    one = begun(around, "sha256-0123456789ab")
    around.known, around.revision = ["far"], "sha256-ba9876543210"
    assert one.step() == Seek("tale")


def test_the_same_revision_comes_before_a_later_one() -> None:
    around = Around()
    one = begun(around, "tales-r7-0123456789ab")
    around.known = ["far"]
    assert isinstance(one.step(), Candidate)
    assert one.continued(0.0).revision == "tales-r7-0123456789ab"


def test_only_a_takeover_with_a_choice_is_in_a_hurry() -> None:
    around = Around(["near", "far"])
    one = pursuit(around)
    target = one.step()
    assert one.hurry_s(target) == math.inf  # the client has nothing yet
    one.take(Started(served_by="near", model="tale", revision="r1", prompt_tokens=1))
    one.failed(target, PeerFailed("gone"))
    around.known.append("farther")
    assert one.hurry_s(one.step()) == HURRY_S
    around.known.remove("farther")
    assert one.hurry_s(candidate("far")) == math.inf  # nobody else


def test_who_was_passed_over_is_asked_again_when_nobody_else_is_left() -> None:
    around = Around(["near", "far", "farther"])
    one = pursuit(around)
    target = one.step()
    one.take(Started(served_by="near", model="tale", revision="r1", prompt_tokens=1))
    one.failed(target, PeerFailed("gone"))
    far = one.step()
    one.hurried(far)
    farther = one.step()
    assert [each.peer for each in (far, farther) if isinstance(each, Candidate)] == ["far", "farther"]
    one.failed(farther, PeerFailed("gone"))
    again = one.step()
    assert isinstance(again, Candidate)
    assert again.peer == "far"
    assert one.hurry_s(again) == math.inf
    one.failed(again, PeerFailed("gone"))
    assert one.step() == Seek("tale")
    with pytest.raises(PeerFailed):
        one.step()


def test_what_nobody_can_ever_serve_is_said_at_once() -> None:
    made = pursuit(Around())
    assert made.step() == Seek("tale")
    with pytest.raises(UnknownModel) as caught:
        made.step()
    assert caught.value.more == {"is_possible": False, "models": []}
    long = pursuit(Around(why=Why.TOO_LONG))
    with pytest.raises(TooLong) as too_long:
        long.step()
    assert too_long.value.more["is_possible"] is False
    assert isinstance(too_long.value, BadRequest)


def test_who_has_a_longer_context_is_asked_before_that_is_said() -> None:
    around = Around(["short", "long"])
    asked = pursuit(around)
    first = asked.step()
    asked.failed(first, TooLong("150 tokens"))  # type: ignore[arg-type]
    assert asked._need().tokens == TALE.context_tokens + 1
    second = asked.step()
    assert second != first
    asked.failed(second, TooLong("150 tokens"))  # type: ignore[arg-type]
    with pytest.raises(TooLong, match="150 tokens") as caught:
        asked.step()
    assert caught.value.more["is_possible"] is False


def test_while_those_with_a_longer_context_are_full_it_is_possible() -> None:
    asked = pursuit(Around(["short"], why=Why.ALL_FULL))
    asked.failed(asked.step(), TooLong("150 tokens"))  # type: ignore[arg-type]
    with pytest.raises(NoRoom) as caught:
        asked.step()
    assert not caught.value.more


def test_a_model_that_is_loading_here_may_be_asked_for_again() -> None:
    loading = Loading(model="tale")
    loading.note(3, 7)
    made = pursuit(Around(loading=loading))
    made.step()
    with pytest.raises(NotReady, match="tale is loading") as caught:
        made.step()
    progress = {"tensors_loaded": 3, "tensors_total": 7}
    assert caught.value.more == {"loading": {"state": "loading", "model": "tale", "progress": progress}}
    assert caught.value.retry_after_s == 1.0
    assert Loading(model="m", state="waiting for its server").told()["progress"] is None
