"""node/training*.py together: real text, engines, rounds and disks, over the loopback network. Real time."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.tiny_models import save_causal
from tests.training_world import SMALL, World, common_rounds, until, world

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_causal(path)
    return path


async def test_one_member_alone_trains_and_serves_what_it_learnt(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        one = await all_of_them.start(0)
        before = one.revision
        assert one.status["state"] == "idle"
        told = await one.begin()
        await all_of_them.rounds(3)
        status = one.status
        assert status["run"]["name"] == "tales"
        assert status["run"]["id"] == told["id"]
        assert status["run"]["started_from"] == before
        assert [each["round"] for each in status["rounds"]] == list(range(len(status["rounds"])))
        assert all(each["contributed"] == (one.id,) for each in status["rounds"])
        assert all(each["moved"] > 0 for each in status["rounds"])
        await until(lambda: one.revision == one.status["revision"] and one.revision.startswith("tales-r"))
        print(status)
