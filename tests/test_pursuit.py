"""node/pursuit.py: a model that nobody known serves is asked for once, before the client is told that nobody does."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from msgspec.structs import replace

from crypto.identity import PeerId
from gossip.messages import Advert, Capacity, ModelKind, ModelOffer
from gossip.offer import Offer
from gossip.routing import Candidate, Need, Why, WhyNot
from node.errors import NoRoom, NotReady, PeerFailed, UnknownModel
from node.front import Route, RouteHint
from node.pursuit import Pursuit, Seek, lineage_of, pursue
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
    loading: str = ""
    own = PeerId("us")
    hosting = None

    def rank(self, need: Need) -> tuple[Candidate, ...] | WhyNot:
        names = self.known if need.revision in (None, self.revision) else []
        found = tuple(candidate(name, self.revision) for name in names if name not in need.exclude)
        return found or WhyNot(why=self.why)

    def served_names(self) -> set[str]:
        return set()


def pursuit(around: Around, route: RouteHint | None = None, model: str | None = "tale") -> Pursuit:  # type: ignore[type-arg]
    work = GenerateWork(request_id="r", model=model, tokens=(1,), sampling=Sampling(max_tokens=3), remaining_ms=1000)
    return pursue(work, route or RouteHint(), around, 0.0)


def test_while_this_node_loads_its_model_nobody_is_told_that_there_is_none() -> None:
    one = pursuit(Around(loading="org/tale"))
    assert one.step() == Seek("tale")
    with pytest.raises(NotReady, match=r"still loading its own \(org/tale\)") as caught:
        one.step()
    assert caught.value.retry_after_s is not None


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
