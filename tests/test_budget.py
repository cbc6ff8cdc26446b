"""The privacy budget: opacus's own numbers, counted over restarts, saved before they are believed, refused in time."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opacus.accountants import RDPAccountant

from crypto.canonical import decode, encode
from crypto.disk import StateFile
from model.budget import KINDS_MAX, STEPS_MAX, VERSION, Budget
from model.config import PrivacyConfig
from model.errors import BadInput, BadState, BudgetSpent, BudgetUnsaved

CONFIG = PrivacyConfig(noise_multiplier=1.0, clip_norm=1.0, delta=1e-6, epsilon_max=8.0)
CONTEXT = 8


class Disk:
    """Takes ledgers, or not."""

    def __init__(self) -> None:
        self.saved: list[bytes] = []
        self.is_full = False

    def write(self, content: bytes) -> bool:
        if not self.is_full:
            self.saved.append(content)
        return not self.is_full


def budget(config: PrivacyConfig = CONFIG, disk: Disk | None = None, ledger: bytes | None = None) -> Budget:
    return Budget(config, context=CONTEXT, save=(disk or Disk()).write, ledger=ledger)


def charged(config: PrivacyConfig, rates: list[float], ledger: bytes | None = None) -> Budget:
    made = budget(replace(config, epsilon_max=math.inf), ledger=ledger)
    for rate in rates:
        made.charge(rate)
    return made


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Optimal order is")
@pytest.mark.parametrize(
    ("noise", "rates"),
    [
        (1.0, [0.01] * 300),
        (0.7, [0.02] * 5 + [0.3] * 2 + [0.02] * 4),
        (30.0, [0.001] * 3),  # best at opacus's last order, of which it warns
        (0.05, [0.01]),  # at its first
        (2.0, [1.0] * 4),
    ],
)
def test_epsilon_is_that_of_opacus(noise: float, rates: list[float]) -> None:
    accountant = RDPAccountant()
    for rate in rates:
        accountant.step(noise_multiplier=noise, sample_rate=rate)
    made = charged(replace(CONFIG, noise_multiplier=noise), rates)
    assert made.spent() == pytest.approx(accountant.get_epsilon(CONFIG.delta), rel=1e-9)
    assert made.steps == len(rates)


def test_without_sampling_it_is_the_gaussian_mechanism_worked_out_by_hand() -> None:
    orders = RDPAccountant.DEFAULT_ALPHAS
    by_hand = min(
        7 * a / (2 * 3.0**2) + math.log((a - 1) / a) - (math.log(CONFIG.delta) + math.log(a)) / (a - 1) for a in orders
    )
    assert charged(replace(CONFIG, noise_multiplier=3.0), [1.0] * 7).spent() == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.slow
def test_a_known_setting() -> None:
    """Abadi et al., section 3.2: sigma 4, q 0.01 and 10,000 steps give epsilon 1.26 at delta 1e-5 by their moments
    accountant, whose conversion to epsilon was a little looser than today's."""
    setting = replace(CONFIG, noise_multiplier=4.0, delta=1e-5)
    assert 1.0 < charged(setting, [0.01] * 10_000).spent() < 1.26


def test_no_noise_promises_nothing() -> None:
    silent = replace(CONFIG, noise_multiplier=0.0)
    with pytest.raises(BudgetSpent, match="bring epsilon to inf"):
        budget(replace(silent, epsilon_max=1e300)).charge(0.1)
    assert charged(silent, [0.1]).spent() == math.inf


def test_nothing_spent_is_nothing_and_nothing_is_less() -> None:
    assert (budget().spent(), budget().steps) == (0.0, 0)
    generous = replace(CONFIG, noise_multiplier=50.0, delta=0.3)
    accountant = RDPAccountant()
    accountant.step(noise_multiplier=50.0, sample_rate=1.0)
    assert accountant.get_epsilon(0.3) < 0.0  # as opacus has it
    assert charged(generous, [1.0]).spent() == 0.0


def test_a_ledger_lasts_in_a_state_file(tmp_path: Path) -> None:
    """As the node is to bind them."""

    def file() -> StateFile:
        return StateFile(tmp_path / "privacy.ledger", kind="privacy_ledger", version=VERSION, bytes_max=65_536)

    first = file()
    assert first.read(bytes) is None
    made = Budget(CONFIG, context=CONTEXT, save=first.write)
    made.charge(0.05)
    made.charge(0.05)
    kept = file().read(bytes)
    assert kept is not None
    assert budget(ledger=kept).spent() == made.spent() > 0.0
    unwritable = tmp_path / "file"
    unwritable.touch()
    nowhere = StateFile(unwritable / "privacy.ledger", kind="privacy_ledger", version=VERSION, bytes_max=65_536)
    with pytest.raises(BudgetUnsaved):
        Budget(CONFIG, context=CONTEXT, save=nowhere.write).charge(0.05)


def test_a_restart_goes_on_counting_also_with_other_settings() -> None:
    once = charged(CONFIG, [0.02] * 7)
    again = charged(CONFIG, [0.02] * 2, ledger=once.ledger())
    assert again.steps == 9
    assert again.spent() == charged(CONFIG, [0.02] * 9).spent() > once.spent()
    louder = charged(replace(CONFIG, noise_multiplier=0.6), [0.3], ledger=again.ledger())
    accountant = RDPAccountant()
    accountant.history = [(1.0, 0.02, 9), (0.6, 0.3, 1)]
    assert louder.spent() == pytest.approx(accountant.get_epsilon(CONFIG.delta), rel=1e-9)
    assert charged(CONFIG, [], ledger=louder.ledger()).ledger() == louder.ledger()


def test_the_step_that_would_go_past_is_refused_and_nothing_is_written() -> None:
    limit = charged(CONFIG, [0.05] * 5).spent()
    disk = Disk()
    made = budget(replace(CONFIG, epsilon_max=limit), disk)
    for _ in range(5):
        made.check(0.05)
        made.charge(0.05)
    for refused in (made.check, made.charge):
        with pytest.raises(BudgetSpent, match=r"one more private step would bring epsilon to .* in 5 steps\)"):
            refused(0.05)
    assert len(disk.saved) == 5
    assert made.spent() == limit
    with pytest.raises(BudgetSpent):  # nor after a restart
        budget(replace(CONFIG, epsilon_max=limit), ledger=disk.saved[-1]).check(0.05)
    budget(replace(CONFIG, epsilon_max=limit * 2), ledger=disk.saved[-1]).check(0.05)


def test_what_is_not_saved_is_refused() -> None:
    disk = Disk()
    made = budget(disk=disk)
    made.charge(0.05)
    disk.is_full = True
    with pytest.raises(BudgetUnsaved, match="cannot be saved, so no private step is taken"):
        made.charge(0.05)
    assert made.steps == 1
    disk.is_full = False
    made.charge(0.05)
    assert made.steps == 2
    assert disk.saved[-1] == made.ledger()
    assert budget(ledger=disk.saved[-1]).steps == 2


def test_kinds_and_steps_have_bounds() -> None:
    full = {"context": CONTEXT, "spends": [[9.0, 1e-9, STEPS_MAX]], "version": VERSION}
    endless = replace(CONFIG, noise_multiplier=9.0, epsilon_max=math.inf)
    with pytest.raises(BudgetSpent):
        budget(endless, ledger=encode(full)).check(1e-9)
    full["spends"] = [[9.0 + number, 1e-9, 1] for number in range(KINDS_MAX)]
    crowded = budget(endless, ledger=encode(full))
    crowded._rdp = lambda kind: np.zeros(len(crowded._orders))  # type: ignore[method-assign]  # 10 s otherwise
    crowded.check(1e-9)
    with pytest.raises(BudgetSpent):
        crowded.check(1e-8)


def changed(**fields: Any) -> Callable[[dict[str, Any]], bytes]:
    return lambda ledger: encode({**ledger, **fields})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda ledger: b"", "is damaged"),
        (lambda ledger: encode(ledger)[:-1], "is damaged"),
        (changed(extra=1), "is damaged"),
        (changed(version=2), "version 2, wanted 1"),
        (changed(context=9), "rows of 9 tokens, and these have 8"),
        (changed(spends=[[1.0, 0.5, 0]]), "is damaged"),
        (changed(spends=[[1.0, 1.5, 1]]), "is damaged"),
        (changed(spends=[[-1.0, 0.5, 1]]), "is damaged"),
        (changed(spends=[[1.0, 0.5, STEPS_MAX + 1]]), "is damaged"),
        (changed(spends=[[2.0, 0.5, 1], [1.0, 0.5, 1]]), "not sorted, each once"),
        (changed(spends=[[1.0, 0.5, 900], [1.0, 0.5, 1]]), "not sorted, each once"),
        (changed(spends=[[1.0 + number, 0.5, 1] for number in range(KINDS_MAX + 1)]), "is damaged"),
    ],
)
def test_a_ledger_that_is_none_is_refused(damage: Callable[[dict[str, Any]], bytes], words: str) -> None:
    right = decode(charged(CONFIG, [0.5] * 3).ledger())
    assert right == {"context": CONTEXT, "spends": [[1.0, 0.5, 3]], "version": VERSION}
    with pytest.raises(BadState, match=words):
        budget(ledger=damage(right))


def test_without_opacus_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(BadInput, match=r"pip install -e '\.\[private\]'"):
        budget()


@pytest.mark.parametrize(
    "change",
    [{"noise_multiplier": -0.1}, {"noise_multiplier": math.nan}, {"noise_multiplier": math.inf}, {"clip_norm": 0.0},
     {"clip_norm": math.nan}, {"clip_norm": math.inf}, {"delta": 0.0}, {"delta": 1.0}, {"epsilon_max": 0.0},
     {"epsilon_max": math.nan}],
)  # fmt: skip
def test_a_number_out_of_range_is_no_configuration(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="not PrivacyConfig"):
        replace(CONFIG, **change)
