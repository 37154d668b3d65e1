"""The models that are served, each in its newest version that was proven, and how a newer one takes its place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from grc.errors import ArtifactError, GrcError, first_line
from grc.runtime.server.logs import Log
from grc.runtime.server.refusal import Refused
from grc.runtime.server.source import Found, Source, Stamp, numbers
from grc.runtime.server.version import Version

LONGEST_PAUSE = 60.0  # seconds between attempts to load a version that fails: one that is being copied mends itself


@dataclass(eq=False)
class Model:
    """A model and its version. What failed to load is tried again after growing pauses."""

    source: Source
    version: Version
    stamp: Stamp
    failed: Stamp | None = None
    pause: float = 0.0
    again: float = 0.0
    healthy: bool = True
    trouble: str = ""  # why its source can't be looked at, once it was logged

    @property
    def name(self) -> str:
        return self.source.name


class Models:
    """Found by name on the event loop; loaded on a thread of their own."""

    def __init__(self, engine: str | None, log: Log):
        self.engine, self.log = engine, log
        self.all: dict[str, Model] = {}
        self.loader = ThreadPoolExecutor(1, thread_name_prefix="grc-load")
        self.replaced: Callable[[Version], None] = lambda old: None
        self.loaded: Callable[[str, bool], None] = lambda name, ok: None

    def open(self, source: Source) -> Model:
        """Load the first version. Raises ArtifactError."""
        found = source.newest()
        if found is None:
            raise ArtifactError(f"{source.path} holds no artifact", "build one with grc compile MODEL -o PATH")
        version = self.load(source, found, str(found.number or 1))
        model = self.all[source.name] = Model(source, version, found.stamp)
        return model

    def load(self, source: Source, found: Found, number: str) -> Version:
        """Raises ArtifactError, also where the artifact was replaced while it was read."""
        version = Version(source.name, number, found.path, self.engine)
        if source.newest() != found:
            raise ArtifactError(f"{found.path} was replaced while it was read", "it is read again")
        return version

    def find(self, name: str, number: str | None = None) -> Version:
        """The version that answers. Raises Refused, a 404."""
        model = self.all.get(name)
        if model is None:
            raise Refused(404, f"unknown model {name}; this server has {', '.join(self.all)}", "unknown_model")
        if number is not None and number != model.version.number:
            there = model.source.versions and number.isdigit() and int(number) in numbers(model.source.path)
            what = f"does not serve version {number}, though it is there" if there else f"has no version {number}"
            raise Refused(404, f"model {name} {what}; it serves {model.version.number}", "unknown_version")
        return model.version

    def versions(self) -> Iterator[Version]:
        return (model.version for model in self.all.values())

    def close(self) -> None:
        """A version that is being loaded is not waited for."""
        self.loader.shutdown(wait=False, cancel_futures=True)

    async def watch(self, seconds: float) -> None:
        """Look for new versions, for ever."""
        while True:
            await asyncio.sleep(seconds)
            for model in list(self.all.values()):
                try:
                    await self.refresh(model)
                except Exception as error:  # the next look may find what this one could not
                    self.note_trouble(model, error)
                else:
                    model.trouble = ""

    async def refresh(self, model: Model) -> None:
        """Load a newer version if there is one. It takes the place of the old one when it is proven, and not before."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self.loader, model.source.newest)
        if found is None or found.stamp == model.stamp:
            return
        if found.stamp == model.failed and time.monotonic() < model.again:
            return
        old = model.version
        number = str(found.number) if found.number is not None else str(int(old.number) + 1)
        try:
            version = await loop.run_in_executor(self.loader, self.load, model.source, found, number)
        except Exception as error:  # whatever an artifact does when it is loaded, the version before it serves on
            self.note_failure(model, found, number, error)
            return
        model.version, model.stamp = version, found.stamp
        model.failed, model.pause = None, 0.0
        self.loaded(model.name, True)
        self.replaced(old)
        self.log("info", "version", model=model.name, version=number, before=old.number, engines=version.engines())

    def note_failure(self, model: Model, found: Found, number: str, error: Exception) -> None:
        again = found.stamp == model.failed
        model.failed = found.stamp
        model.pause = min(LONGEST_PAUSE, 2 * model.pause) if again else 1.0
        model.again = time.monotonic() + model.pause
        self.loaded(model.name, False)
        self.log(
            "error",
            "version refused",
            model=model.name,
            version=number,
            serving=model.version.number,
            **words_of(error),
        )

    def note_trouble(self, model: Model, error: Exception) -> None:
        """Logged once for each trouble, not at every look."""
        words = words_of(error)
        if words["message"] != model.trouble:
            self.log("error", "watch failed", model=model.name, serving=model.version.number, **words)
        model.trouble = words["message"]


def words_of(error: Exception) -> dict[str, str]:
    """What was wrong, and where grc knows it what to do."""
    if not isinstance(error, GrcError):
        return {"message": first_line(error)}
    return {"message": error.message, **({} if error.hint is None else {"hint": error.hint})}
