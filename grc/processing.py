"""Pre- and postprocessing: the functions of a model file that travel with the artifact, as plain Python source."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grc.errors import ModelFileError
from grc.graph.model_file import Model


def bundle(model: Model, folder: Path) -> dict[str, Any] | None:
    """Copy the files that define `preprocess` and `postprocess`, the local files they import, and the assets.

    Returns where to find the functions, or None where the model file has neither. Raises ModelFileError when one is defined
    in the model file itself, which would carry the model's source into the artifact.
    """
    functions = {name: f for name in ("preprocess", "postprocess") if (f := getattr(model, name)) is not None}
    if not functions:
        return None
    assert model.file is not None
    target = folder / "processing"
    target.mkdir()
    entry: dict[str, Any] = {}
    root = model.file.resolve().parent
    for name, function in functions.items():
        file = defining_file(function)
        if file == model.file.resolve():
            raise ModelFileError(
                f"{model.file} defines {name}() beside the model",
                f"move {name}() to a file of its own and import it: the artifact carries that file, and no model source",
            )
        entry[name] = {"module": file.stem, "function": function.__name__}
        for source in local_imports(file, root, set()):
            shutil.copyfile(source, target / source.name)
    for asset in model.assets:
        shutil.copyfile(asset, target / asset.name)
    return entry


def defining_file(function: Callable[..., Any]) -> Path:
    return Path(sys.modules[function.__module__].__file__ or "").resolve()


def local_imports(file: Path, root: Path, seen: set[Path]) -> set[Path]:
    """A file and every file of its own folder that it imports, found by name."""
    import ast

    if file in seen:
        return seen
    seen.add(file)
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            candidate = root / f"{name.split('.')[0]}.py"
            if candidate.exists():
                local_imports(candidate, root, seen)
    return seen
