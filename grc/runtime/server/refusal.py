"""Refusals: a request that is not answered, as the protocol's error."""

from __future__ import annotations

import math

from grc.errors import ArtifactError, EngineError, GrcError


class Refused(Exception):
    """The status and message that a client gets; `reason` is the label under which it is counted, `allow` what methods the
    path takes."""

    def __init__(self, status: int, message: str, reason: str, retry_after: float | None = None, allow: str = ""):
        super().__init__(message)
        self.status = status
        self.message = message
        self.reason = reason
        self.allow = allow
        # HTTP knows whole seconds only, and 0 would invite the client back at once.
        self.retry_after = None if retry_after is None else max(1, math.ceil(retry_after))


def invalid(message: str, reason: str = "invalid") -> Refused:
    return Refused(400, message, reason)


def too_large(limit: int) -> Refused:
    return Refused(413, f"the body is larger than {limit} bytes", "too_large")


def gone(before: str) -> Refused:
    return Refused(499, f"the client went away before {before}", "gone")


def ended(before: str) -> Refused:
    return Refused(503, f"the server ended before {before}", "ended", 1.0)


def out_of_time(model: str, retry_after: float) -> Refused:
    return Refused(503, f"model {model} was too busy: the request's time ran out", "deadline", retry_after)


def too_late(model: str, wait: float, left: float) -> Refused:
    told = f"within {left * 1e3:.0f} ms: it would take about {wait * 1e3:.0f} ms"
    return Refused(503, f"model {model} can't answer {told}", "deadline", wait - left)


def refusal(error: Exception) -> Refused:
    """What a client is told of an error: its own fault is a 400, the server's a 500."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, (EngineError, ArtifactError)):
        return Refused(500, error.message, "failed")
    if isinstance(error, GrcError):
        return invalid(error.message)
    return Refused(500, f"the server failed: {type(error).__name__}: {error}", "failed")
