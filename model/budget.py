"""What private training has spent of an operator's (epsilon, delta), and whether one more step may be taken.

Rules: the only importer of opacus, which is an extra of its own. Counted is the sampled Gaussian mechanism in Renyi
differential privacy, one release a step, neighbours differ by one row added or removed; the numbers are those of
opacus's RDPAccountant to the bit, here from a sum kept for each kind of step rather than computed anew each time. The
amplification by sampling that it counts holds for Poisson sampling only: who charges a step here must have drawn each
row by itself with just that rate, and told nobody which. A charge is saved before it is believed, and before the step
is taken: a kill in between counts a step that never was, never the other way round. The ledger is one for all runs of a
text; what it promises is about rows of one length.
Source: Mironov, Talwar, Zhang, "Renyi Differential Privacy of the Sampled Gaussian Mechanism" (arXiv 1908.10530);
pytorch/opacus opacus/accountants/rdp.py, analysis/rdp.py; RDP to (epsilon, delta): arXiv 1905.09982, theorem 21.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Annotated, Any, Final

import msgspec
import numpy as np

from crypto.canonical import convert, decode_canonical, encode_struct
from crypto.errors import BadEncoding
from model.config import PrivacyConfig
from model.errors import BadInput, BadState, BudgetSpent, BudgetUnsaved

VERSION: Final = 1
KINDS_MAX: Final = 1_024  # of (noise, rate): another text length or setting makes one; some 30 bytes each
STEPS_MAX: Final = 1 << 53  # a float counts so far without a gap
Kind = tuple[float, float]  # noise multiplier, sampling rate


class Spend(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Steps of one kind."""

    noise_multiplier: Annotated[float, msgspec.Meta(ge=0.0)]
    rate: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)]
    steps: Annotated[int, msgspec.Meta(ge=1, le=STEPS_MAX)]


class Ledger(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file keeps. context: tokens of a row but one. spends: sorted, each kind once."""

    context: Annotated[int, msgspec.Meta(ge=1)]
    spends: Annotated[tuple[Spend, ...], msgspec.Meta(max_length=KINDS_MAX)]
    version: int = VERSION


class Budget:
    """The steps charged so far. One object for all that train on a text: two would each forget the other's."""

    def __init__(
        self, config: PrivacyConfig, *, context: int, save: Callable[[bytes], bool], ledger: bytes | None = None
    ) -> None:
        """save: takes the ledger; true only when it would outlast the machine's power (crypto/disk.py StateFile.write).

        ledger: what was saved last; None for a text that was never trained on privately, and for no other reason.
        Raises BadInput (opacus is not installed), BadState (no ledger, or one of rows of another length).
        """
        self.config = config
        self.context = context
        self._save = save
        self._analysis, self._orders = _opacus()
        self._steps: dict[Kind, int] = {} if ledger is None else _spends(ledger, context)
        self._rdp_of_one: dict[Kind, Any] = {}

    @property
    def steps(self) -> int:
        """How many steps were charged, of all runs."""
        return sum(self._steps.values())

    def spent(self) -> float:
        """Epsilon at the configured delta, of all steps that were charged. inf when one of them had no noise."""
        return self._epsilon(self._steps)

    def check(self, rate: float) -> None:
        """Whether one more step, its rows drawn with this rate, may be taken. Raises BudgetSpent."""
        self._allowed(rate)

    def charge(self, rate: float) -> None:
        """Count one step, on disk first. Raises BudgetSpent, BudgetUnsaved, and then it may not be taken."""
        after = self._allowed(rate)
        if not self._save(_encoded(after, self.context)):
            raise BudgetUnsaved(
                "the ledger of spent privacy cannot be saved, so no private step is taken; make its folder writable, "
                "and training goes on"
            )
        self._steps = after

    def ledger(self) -> bytes:
        """What `save` was given last, as canonical msgpack: some 40 bytes, 30 for each kind of step."""
        return _encoded(self._steps, self.context)

    def _allowed(self, rate: float) -> dict[Kind, int]:
        """The steps with one more. Raises BudgetSpent."""
        assert 0.0 < rate <= 1.0, f"a row is drawn with a probability, not {rate}"
        kind = (float(self.config.noise_multiplier), float(rate))
        after = {**self._steps, kind: self._steps.get(kind, 0) + 1}
        epsilon, most = self._epsilon(after), self.config.epsilon_max
        # turned round, so that an epsilon that is no number is refused
        if not epsilon <= most or len(after) > KINDS_MAX or after[kind] > STEPS_MAX:
            raise BudgetSpent(
                f"one more private step would bring epsilon to {epsilon:.4g} at delta {self.config.delta:g}, and "
                f"{most:g} was allowed ({self.spent():.4g} is spent, in {self.steps:,} steps); private training of "
                "this text is over, unless its operator allows more"
            )
        return after

    def _epsilon(self, steps: dict[Kind, int]) -> float:
        if not steps:
            return 0.0
        rdp = sum(count * self._rdp(kind) for kind, count in steps.items())
        with warnings.catch_warnings():
            # opacus warns when its first or last order is the best: the bound holds all the same, a little loose
            warnings.filterwarnings("ignore", "Optimal order is")
            epsilon, _ = self._analysis.get_privacy_spent(orders=self._orders, rdp=rdp, delta=self.config.delta)
        return 0.0 if epsilon < 0.0 else float(epsilon)  # the bound of next to nothing goes below

    def _rdp(self, kind: Kind) -> Any:
        """Of one step, at each order: 10 to 200 ms, so once for each kind."""
        if kind not in self._rdp_of_one:
            noise_multiplier, rate = kind
            found = self._analysis.compute_rdp(q=rate, noise_multiplier=noise_multiplier, steps=1, orders=self._orders)
            self._rdp_of_one[kind] = np.asarray(found, dtype=np.float64)
        return self._rdp_of_one[kind]


def _opacus() -> tuple[Any, Any]:
    """opacus's analysis and the orders of its accountant. Raises BadInput."""
    try:
        from opacus.accountants import RDPAccountant
        from opacus.accountants.analysis import rdp
    except ImportError as exc:
        raise BadInput(f"private training needs opacus ({exc}): pip install -e '.[private]'") from exc
    return rdp, RDPAccountant.DEFAULT_ALPHAS


def _encoded(steps: dict[Kind, int], context: int) -> bytes:
    spends = tuple(Spend(*kind, count) for kind, count in sorted(steps.items()))
    return encode_struct(Ledger(context=context, spends=spends))


def _spends(raw: bytes, context: int) -> dict[Kind, int]:
    """Raises BadState: what was spent is unknown then, so nothing may be trained."""
    try:
        found = convert(decode_canonical(raw), Ledger)
    except BadEncoding as exc:
        raise BadState(
            f"the ledger of spent privacy is damaged ({exc}): what was spent is not known, so put back a copy of it"
        ) from exc
    if found.version != VERSION:
        raise BadState(f"the ledger of spent privacy has version {found.version}, wanted {VERSION}: run a newer node")
    if found.context != context:
        raise BadState(
            f"the ledger of spent privacy is about rows of {found.context:,} tokens, and these have {context:,}: train "
            "with that context"
        )
    steps = {(spend.noise_multiplier, spend.rate): spend.steps for spend in found.spends}
    if _encoded(steps, context) != raw:
        raise BadState("the ledger of spent privacy is damaged (its kinds are not sorted, each once): put back a copy")
    return steps
