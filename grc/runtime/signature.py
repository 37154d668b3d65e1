"""The model's signature: positional and keyword arguments, nested as the model takes them, to the graph's flat inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from grc.errors import InputError
from grc.runtime.structure import flatten, leaf_names


class Signature:
    """How one model is called, prepared once from its manifest."""

    def __init__(self, manifest: Mapping[str, Any]):
        self.name = manifest["name"]
        self.inputs = [spec["name"] for spec in manifest["inputs"]]
        self.structure = manifest["structure"]["inputs"]
        args, kwargs = self.structure["tuple"]
        self.keywords = list(kwargs["dict"])
        simple = [*args["tuple"], *kwargs["dict"].values()]
        self.flat_call = all("leaf" in part for part in simple)
        self.positional = len(args["tuple"])
        self.parameters = manifest["structure"]["parameters"]
        self.known = frozenset(self.parameters)

    def leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The request's tensors, in the order of the graph's inputs. Raises InputError where it has another structure."""
        if self.flat_call:
            if not kwargs and len(args) == self.positional and not self.keywords:
                return list(args)
            return self.bind(args, kwargs)
        leaves: list[torch.Tensor] = []
        structure = flatten((args, self.ordered(kwargs)), leaves)
        if not same_structure(structure, self.structure):
            takes, holds = self.names(self.structure), self.names(structure)
            if holds == takes:  # nested in another way
                takes = self.inputs
            raise InputError(
                f"{self.name} takes {', '.join(takes)}; the request holds {', '.join(holds)}",
                "nest it as the model's get_inputs does: see grc inspect",
            )
        return leaves

    def names(self, structure: Any) -> list[str]:
        """The tensors of a request by their places in it, and numbers as `k=3`: an artifact holds for those alone."""
        args, kwargs = structure["tuple"]
        named = [(self.parameters[i] if i < len(self.parameters) else f"input{i}") for i in range(len(args["tuple"]))]
        parts = [*zip(named, args["tuple"], strict=True), *kwargs["dict"].items()]
        found = [
            name
            for prefix, part in parts
            for name in ([f"{prefix}={part['constant']!r}"] if "constant" in part else leaf_names(part, prefix))
        ]
        return found or ["no tensor"]

    def ordered(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {key: kwargs[key] for key in self.keywords if key in kwargs} | kwargs

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        names = self.parameters
        if not args and kwargs.keys() == self.known:
            return [kwargs[name] for name in names]
        given = dict(zip(names, args, strict=False)) | kwargs
        missing = [n for n in names if n not in given]
        extra = [n for n in given if n not in names]
        twice = [n for n in names[: len(args)] if n in kwargs]
        if len(args) > len(names) or missing or extra or twice:
            what = (
                f"has input {twice[0]} twice"
                if twice
                else f"misses input {missing[0]} and has an unknown one, {extra[0]}"
                if missing and extra
                else f"misses input {missing[0]}"
                if missing
                else f"has an unknown input {extra[0]}"
                if extra
                else "has too many inputs"
            )
            raise InputError(f"the request {what}; {self.name} takes {', '.join(names)}", "see grc inspect")
        return [given[n] for n in names]


def same_structure(given: Any, known: Any) -> bool:
    """Equal but for the contexts of registered nodes (a KeyedJaggedTensor's keys are checked by torch). A dict stands for a
    dataclass of the same fields, whose class the host of a request may lack."""
    if isinstance(given, dict) and isinstance(known, dict):
        if "record" in known and ("record" in given or "dict" in given):
            return same_structure(given.get("items", given.get("dict")), known["items"])
        return given.keys() == known.keys() and all(k == "spec" or same_structure(given[k], known[k]) for k in given)
    if isinstance(given, list) and isinstance(known, list):
        return len(given) == len(known) and all(map(same_structure, given, known))
    return bool(given == known)
