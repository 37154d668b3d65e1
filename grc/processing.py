"""Pre- and postprocessing: the functions of a model file that travel with the artifact, as plain Python source."""

from __future__ import annotations

import ast
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grc.errors import ModelFileError
from grc.graph.model_file import Model


def bundle(model: Model, folder: Path) -> dict[str, Any] | None:
    """Copy the modules that define `preprocess` and `postprocess`, their neighbours that they import, and the assets.

    Returns where to find the functions, or None where the model file has neither. Raises ModelFileError when one is
    defined in the model file itself, which would carry the model's source into the artifact.
    """
    functions = {name: f for name in ("preprocess", "postprocess") if (f := getattr(model, name)) is not None}
    if not functions:
        return None
    assert model.file is not None
    root = model.file.resolve().parent
    entry: dict[str, Any] = {}
    modules: dict[str, Path] = {}
    for name, function in functions.items():
        module = function.__module__
        if module_file(module) == model.file.resolve():
            raise ModelFileError(
                f"{model.file} defines {name}() beside the model",
                f"move {name}() to a file of its own and import it: the artifact carries that file, and no model source",
            )
        entry[name] = {"module": module, "function": function.__name__}
        collect(module, root, modules)
    for module, file in modules.items():
        place = folder / "processing" / Path(*module.split("."))
        target = place / "__init__.py" if file.name == "__init__.py" else place.with_suffix(".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    for asset in model.assets:
        shutil.copyfile(asset, folder / "processing" / asset.name)
    return entry


def module_file(module: str) -> Path:
    return Path(getattr(sys.modules.get(module), "__file__", None) or "").resolve()


def collect(module: str, root: Path, found: dict[str, Path]) -> None:
    """A module, the packages around it, and every module below the model file's folder that it imports."""
    file = module_file(module)
    if module in found or not file.is_file() or root not in file.parents:
        return
    found[module] = file
    parent = module.rpartition(".")[0]
    if parent:
        collect(parent, root, found)
    for name in imported(file, module):
        collect(name, root, found)


def imported(file: Path, module: str) -> Iterator[str]:
    """The absolute names of what a file imports."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).strip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
