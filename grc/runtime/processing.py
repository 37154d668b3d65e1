"""Pre- and postprocessing of an artifact: plain Python files beside the parts, imported so that artifacts don't mix."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from grc.errors import ArtifactError, GrcError, InputError, first_line
from grc.runtime.artifact import Artifact
from grc.runtime.values import plain


class Processing:
    """`preprocess(request)` gives the program's inputs; `postprocess(outputs, request)` gives what the caller wants.

    `folder` is a copy of the artifact's `processing/` to use instead: a server reads files of a version after another one
    has taken its place on disk.
    """

    def __init__(self, artifact: Artifact, folder: Path | None = None):
        entry = artifact.manifest["processing"]
        if entry is None:
            raise ArtifactError(
                f"{artifact.path.name} has no preprocess and no postprocess",
                "define them in the model file, or send tensors",
            )
        self.folder = folder or artifact.path / "processing"
        self.functions = {name: self.find(**place) for name, place in entry.items()}

    def find(self, module: str, function: str) -> Callable[..., Any]:
        """Import a bundled function; one that takes `assets` gets the folder its files lie in.

        Raises ArtifactError where its module can't be imported here.
        """
        try:
            with imported_from(self.folder):
                found = getattr(importlib.import_module(module), function)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            raise ArtifactError(
                f"{function} of the artifact needs the module {error.name}, which is not installed",
                f"pip install {package}",
            ) from error
        except (Exception, SystemExit) as error:  # a user's own module may do anything when it is imported
            raise ArtifactError(
                f"{function} of the artifact can't be imported from {module}.py: {first_line(error)}",
                "mend the model file, and compile it again",
            ) from error
        return partial(found, assets=self.folder) if "assets" in inspect.signature(found).parameters else found

    def preprocess(self, request: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for the program. Raises InputError with the function's own words."""
        if "preprocess" not in self.functions:
            raise InputError("this artifact has no preprocess", "send tensors")
        with told_as(InputError, "preprocess", "see the model's request schema"):
            value = self.functions["preprocess"](request)
        if isinstance(value, dict):
            return (), value
        return (value if type(value) is tuple else (value,)), {}

    def postprocess(self, outputs: Any, request: dict[str, Any]) -> Any:
        """The answer as JSON-able data; the outputs themselves where the artifact has no postprocess. Raises ArtifactError with
        the function's own words.
        """
        function = self.functions.get("postprocess")
        if function is None:
            return outputs
        takes = [p for p in inspect.signature(function).parameters if p != "assets"]
        with told_as(ArtifactError, "postprocess", "see the model's postprocess()"):
            return function(outputs, request) if len(takes) > 1 else function(outputs)


@contextmanager
def told_as(kind: type[GrcError], name: str, hint: str) -> Iterator[None]:
    """What a user's own function raises, which may be anything, or an exit, becomes an error with its own words."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise  # whoever started this process wants it to end
        raise kind(f"{name}: {words(error)}", hint) from error


def words(error: BaseException) -> str:
    """What the user's own function said, or what it raised where it said nothing."""
    return (str(error) if isinstance(error, Exception) else repr(error)) or type(error).__name__


@contextmanager
def imported_from(folder: Path) -> Any:
    """Import from a folder alone: modules of the same names that are loaded already are set aside meanwhile."""
    names = {p.stem if p.is_file() else p.name for p in folder.iterdir() if p.suffix == ".py" or p.is_dir()}
    aside = {k: sys.modules.pop(k) for k in list(sys.modules) if k.partition(".")[0] in names}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [k for k in sys.modules if k.partition(".")[0] in names]:
            del sys.modules[name]
        sys.modules.update(aside)


def read_request(text: str) -> dict[str, Any]:
    """A request as JSON text. Raises InputError when it is no JSON object."""
    try:
        request = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the request is no JSON: {error}", "send one JSON object") from error
    if not isinstance(request, dict):
        raise InputError(f"the request is a JSON {type(request).__name__}, not an object", "send one JSON object")
    return request


def written(answer: Any) -> str:
    """An answer as JSON. Raises ArtifactError where it is none."""
    try:
        return json.dumps(plain(answer), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(str(error), "let postprocess return numbers, strings, lists and dicts") from error
