"""An artifact as a Triton model repository: configurations, models that run our runtime, scripts, a proof on the real server.

`export` writes it, `replay.verify` proves it, `launcher.serving` starts it.
"""

from __future__ import annotations

from grc.runtime.triton_repository.export import export
from grc.runtime.triton_repository.repository import Repository
from grc.runtime.triton_repository.settings import Settings
from grc.runtime.triton_repository.versions import add_version

__all__ = ["Repository", "Settings", "add_version", "export"]
