"""The tree of errors. Each carries a message that names what was wrong and a hint that says what to do."""

from __future__ import annotations


class GrcError(Exception):
    """Something the user can mend: `error: message`, then `hint: what to do`."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint


class CalibrationWarning(UserWarning):
    """Quality is measured on data that say little about real requests."""


def message_of(error: BaseException) -> str:
    """The first line of what another library raised, or its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def first_line(error: BaseException) -> str:
    """The type and the first line of what another library raised."""
    kind, message = type(error).__name__, message_of(error)
    return kind if message == kind else f"{kind}: {message[:200]}"


class ModelFileError(GrcError):
    """The model file is missing, broken, or lacks what grc needs."""


class CaptureError(GrcError):
    """The model can't be captured as one graph, or the capture does not answer as the model does."""


class SpecError(GrcError):
    """A graph broke the rules of `graph/spec.py`: the fault of a pass, never of the model."""


class PassError(GrcError):
    """A pass changed the model's answers (raised with `--strict`; otherwise the pass is rolled back)."""


class LoweringError(GrcError):
    """No engine could build the graph, or the one that was asked for could not."""


class BudgetError(LoweringError):
    """Every engine of fewer bits answers outside of the budget of quality, though the trial of it was inside."""


class ArtifactError(GrcError):
    """An artifact is damaged, was built for another host, or can't be written."""


class InputError(GrcError, ValueError):
    """A request does not fit the model: name, dtype, rank, batch or ids."""


class EngineError(InputError):
    """An engine failed on a request in which nothing wrong was found: the fault of the engine or the host."""
