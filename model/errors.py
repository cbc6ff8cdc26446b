"""What can be wrong with a model, its files or a request to it.

    ModelError
    |- NotFound       no model of that name here, nor on the hub
    |- BadModel       the files are corrupt, do not fit together, are not supported or are not safe to open
    |- OutOfMemory    the machine has too little memory for the model, or for this request
    |- BadSetting     a setting of the model that there is not, or whose value cannot be
    |- BadInput       the request's fault: unknown token ids, a message the template refuses
    |  |- EmptyInput  there is no text in it
    |  `- TooLong     prompt and answer are longer than the model's context
    |- NotLoaded      the model was closed, is switched off, or its service has stopped
    |- EngineFull     the queue is full: try later or elsewhere
    |- ComputeFailed  the forward pass failed for this request, or training made numbers that are not finite
    |- BadUpdate      a peer's contribution to a round is not what the run agreed on: leave it out
    |- CannotMerge    these contributions and this rule give no update; nothing has changed
    |- BadText        the operator's text cannot be trained on: missing, not UTF-8, too small
    |- BadState       a saved state of training is damaged, or of another model, text or order
    |- Diverged       training made numbers that are not finite, three steps in a row
    |- BudgetSpent    one more private step would promise less than the operator asked for
    |- BudgetUnsaved  what a private step spends could not be written down, so it is not taken
    `- CannotWrite    the disk does not take the model that is to be written

Rules: each message says what came, what was wanted and what to do. FOREIGN names what torch, transformers and the
template engine raise for bad files or bad input, so that their errors are mapped at the door; anything else is a bug.
"""

from __future__ import annotations


class ModelError(Exception):
    """The base of all errors of model/. `param` names the field of a request at fault, if one is; `place` says which
    of several texts is."""

    def __init__(self, message: str, *, param: str | None = None, place: int | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.place = place


class NotFound(ModelError):
    """There is no such model."""


class BadModel(ModelError):
    """The model's files cannot or must not be used."""


class OutOfMemory(ModelError):
    """Not enough memory on the device."""


class BadInput(ModelError):
    """The request cannot be served by this model, now or later."""


class BadSetting(ModelError):
    """A setting names nothing, is badly typed or out of its range. `param` is its name."""


class EmptyInput(BadInput):
    """A text has no characters, or there is no text."""


class NotLoaded(ModelError):
    """There is no model to answer: closed, switched off, or its service has stopped."""


class TooLong(BadInput):
    """Prompt and answer together are longer than the model's context."""


class EngineFull(ModelError):
    """The queue is at its bound."""


class ComputeFailed(ModelError):
    """A forward pass raised or made numbers that are not finite."""


class BadUpdate(ModelError):
    """A peer's update is malformed, or is for another run, round, base or layout."""


class BadText(ModelError):
    """The operator's text cannot be trained on."""


class BadState(ModelError):
    """A saved state cannot be gone on from."""


class Diverged(ModelError):
    """Training cannot go on: its numbers are not finite."""


class BudgetSpent(ModelError):
    """Private training is over: the next step would go past epsilon_max."""


class BudgetUnsaved(ModelError):
    """Private training waits: the ledger of what was spent cannot be saved."""


class CannotMerge(ModelError):
    """A round's contributions do not make an update by this rule: too few, of mixed kinds, or a rule that means nothing
    on them."""


class CannotWrite(ModelError):
    """A folder does not take a model."""


FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def first_line(exc: BaseException, chars_max: int = 300) -> str:
    """The start of a foreign error's text, for use inside one of our sentences."""
    lines = str(exc).strip().splitlines()
    return (lines[0] if lines else type(exc).__name__)[:chars_max]
