"""What this node is about to serve, and how far it is with it: for requests that come too early.

Rules: core. The thread that loads writes `tensors`, one whole value at a time; all others only read it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Loading:
    """state: loading (a model, here) or waiting (for the server behind this node). tensors: loaded, and of how many;
    None: not known."""

    model: str
    state: str = "loading"
    tensors: tuple[int, int] | None = None

    def note(self, loaded: int, total: int) -> None:
        """So many tensors are there."""
        self.tensors = (loaded, total)

    def told(self) -> dict[str, object]:
        """For the body of an error: state, and progress where it is known."""
        tensors = self.tensors
        progress = None if tensors is None else {"tensors_loaded": tensors[0], "tensors_total": tensors[1]}
        return {"state": self.state, "model": self.model, "progress": progress}
