"""Error feedback: what a peer has trained and not yet said, carried from round to round.

Rules: core. `e = decay * e + delta`, once a round; what is sent is taken out of e; what the round did not take (it was
rejected, or came too late) is given back. All in place, slice by slice: beside e and the delta no third vector is held.
fp32 on the CPU. A delta that is not finite never reaches e.
Legend: N elements of the run's flat vector, S of a slice.

Source: SparseLoCo (arXiv 2508.15706), decay 0.95; Karimireddy et al., Error Feedback Fixes SignSGD (arXiv 1901.09847).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import safetensors
import torch
from safetensors.torch import load, save

from crypto.digest import Digest
from model.codecs import check_numbers, encode
from model.delta import Codec, Delta, HasEntries, Sections, slices
from model.errors import FOREIGN, BadModel, first_line

DECAY: Final = 0.95
Moved = Iterable[tuple[int, int, torch.Tensor]]  # (start, stop, delta_S), which together are all of a vector_N
_NAME: Final = "error_feedback."  # and the layout's digest: a state is of one layout


class Feedback:
    """What was not sent yet, vector_N. Make it anew for a run, or by `load` after a restart."""

    def __init__(self, n: int, *, decay: float = DECAY) -> None:
        assert 0.0 <= decay <= 1.0
        self.decay = decay
        self.unsent_N = torch.zeros(n, dtype=torch.float32)

    def add(self, delta_N: torch.Tensor) -> None:
        """Take up a round's training: e = decay * e + delta. Raises ComputeFailed, and then e is as it was."""
        assert delta_N.shape == self.unsent_N.shape
        assert delta_N.dtype is torch.float32
        self.add_moved(lambda: ((start, stop, delta_N[start:stop]) for start, stop in slices(len(delta_N))))

    def add_moved(self, moved: Callable[[], Moved], *, fades: bool = True) -> None:
        """The same, of a delta in slices; `moved` is asked twice, and first only looked at. fades: False for more
        training of a round that was taken up before, since e fades once a round: e = e + delta.

        Raises ComputeFailed, and then e is as it was.
        """
        for _, _, delta_S in moved():
            check_numbers(delta_S)
        for start, stop, delta_S in moved():
            unsent_S = self.unsent_N[start:stop]
            if fades:
                unsent_S.mul_(self.decay)
            unsent_S.add_(delta_S)

    def encode(self, codec: Codec) -> Sections:
        """What is worth sending of e; e stays as it is until `take`. Raises ComputeFailed."""
        return encode(self.unsent_N, codec)

    def take(self, sent: Delta) -> None:
        """What was sent is no longer unsent."""
        assert sent.n == len(self.unsent_N)
        for start, stop in slices(sent.n):
            if isinstance(sent, HasEntries):
                places_K, values_K = (part.numpy() for part in sent.entries(start, stop))
                self.unsent_N[start:stop].numpy()[places_K] -= values_K
            else:
                self.unsent_N[start:stop].sub_(sent.dense(start, stop))

    def give_back(self, sent: Delta) -> None:
        """Undo `take`, whatever came between.

        Right after `take` e is again what it was, to the bit wherever the sent value is zero, or between half and
        twice the unsent one (Sterbenz: their difference is exact); elsewhere within one rounding of the larger of both.
        """
        assert sent.n == len(self.unsent_N)
        for start, stop in slices(sent.n):
            self.unsent_N[start:stop].add_(sent.dense(start, stop))

    def save(self, layout: Digest) -> bytes:
        """The state as a safetensors file; it names the layout that it belongs to."""
        return save({_NAME + layout.hex(): self.unsent_N})

    @classmethod
    def load(cls, raw: bytes, layout: Digest, n: int, *, decay: float = DECAY) -> Feedback:
        """The state that `save` wrote. Raises BadModel when it is damaged or belongs to another layout."""
        try:
            tensors = load(raw)
        except (safetensors.SafetensorError, *FOREIGN) as exc:
            raise BadModel(f"the error feedback is no safetensors file ({first_line(exc)}); start without it") from exc
        unsent_N = tensors.get(_NAME + layout.hex())
        if len(tensors) != 1 or unsent_N is None or unsent_N.shape != (n,) or unsent_N.dtype is not torch.float32:
            raise BadModel("the error feedback belongs to another model or run; start without it")
        if not unsent_N.isfinite().all():
            raise BadModel("the error feedback has numbers that are not finite; start without it")
        feedback = cls(0, decay=decay)
        feedback.unsent_N = unsent_N
        return feedback
