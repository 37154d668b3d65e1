"""Looking for new versions: whatever one of them does when it is loaded, the server goes on with the one before it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="needs grc-compiler[serve]")

from grc.errors import ArtifactError
from grc.runtime.artifact import Artifact
from grc.runtime.processing import Processing
from grc.runtime.server.models import Model, Models
from grc.runtime.server.source import Found


class Scripted(Models):
    """A source on which something newer is found at each look, or trouble; loading it gives what was scripted."""

    def __init__(self, *script: Any):
        self.said: list[tuple[str, str | None]] = []
        self.counted: list[bool] = []
        super().__init__(None, lambda level, event, **more: self.said.append((event, more.get("message"))))  # type: ignore[arg-type]
        self.script, self.looks = list(script), 0
        self.loaded = lambda name, ok: self.counted.append(ok)
        source: Any = SimpleNamespace(name="m", newest=self.newest)
        old: Any = SimpleNamespace(number="1", engines=str)
        self.model = self.all["m"] = Model(source, old, (0, 0, 0))

    def newest(self) -> Found:
        self.looks += 1
        found = self.script[min(self.looks, len(self.script)) - 1]
        if isinstance(found, PermissionError):
            raise found
        return Found(Path("m"), (self.looks, 0, 0), None)

    def load(self, source: Any, found: Found, number: str) -> Any:
        made = self.script[min(self.looks, len(self.script)) - 1]
        if isinstance(made, Exception):
            raise made
        return SimpleNamespace(number=number, engines=str)

    async def until_served(self, number: str) -> None:
        watching = asyncio.create_task(self.watch(0.001))
        async with asyncio.timeout(10):
            while self.model.version.number != number:
                assert not watching.done(), "it looks no more"
                await asyncio.sleep(0.001)
        watching.cancel()


def test_a_version_that_fails_in_whatever_way_does_not_end_the_watch() -> None:
    models = Scripted(
        ModuleNotFoundError("No module named 'wurst'"), KeyError("weights"), ArtifactError("spoilt"), "good"
    )
    asyncio.run(models.until_served("2"))
    assert models.said[:3] == [
        ("version refused", "ModuleNotFoundError: No module named 'wurst'"),
        ("version refused", "KeyError: 'weights'"),
        ("version refused", "spoilt"),
    ]
    assert models.counted[:4] == [False, False, False, True]


def test_a_source_that_can_not_be_looked_at_is_told_once_and_looked_at_again() -> None:
    denied = PermissionError(13, "Permission denied")
    models = Scripted(denied, denied, denied, "good")
    asyncio.run(models.until_served("2"))
    assert [event for event, _ in models.said[:2]] == ["watch failed", "version"]
    assert models.said[0][1] == "PermissionError: [Errno 13] Permission denied"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            "import wurst.salat",
            "preprocess of the artifact needs the module wurst, which is not installed",
            "pip install wurst",
        ),
        (
            "raise SystemExit('not here')",
            "preprocess of the artifact can't be imported from words.py: SystemExit: not here",
            "mend the model file, and compile it again",
        ),
    ],
)
def test_processing_that_can_not_be_imported_is_named(
    tmp_path: Path, tiny: Path, text: str, message: str, hint: str
) -> None:
    folder = Path(shutil.copytree(tiny / "processing", tmp_path / "processing"))
    (folder / "words.py").write_text(text)
    with pytest.raises(ArtifactError) as caught:
        Processing(Artifact.open(tiny), folder)
    assert (caught.value.message, caught.value.hint) == (message, hint)
