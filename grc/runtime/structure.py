"""Structure: how a model's nested inputs and outputs map to a flat list of tensors, as JSON and without pickle."""

from __future__ import annotations

import dataclasses
import importlib
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from grc.errors import ArtifactError, InputError

Json = Any
SCALARS = (int, float, bool, str, type(None))


def is_namedtuple(value: object) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def is_structseq(value: object) -> bool:
    """True for torch.return_types.*, the named tuples that are written in C."""
    return isinstance(value, tuple) and hasattr(value, "n_sequence_fields")


def is_dataclass(value: object) -> bool:
    """True for an instance of one that is no dict as well, as transformers' ModelOutput is."""
    return dataclasses.is_dataclass(value) and not isinstance(value, (type, dict))


def fields_of(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def type_name(value: object) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"


def find_type(name: str) -> type | None:
    """The class behind `module:QualifiedName`, or None where this host does not have it."""
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found if isinstance(found, type) else None


def flatten(value: Any, leaves: list[torch.Tensor]) -> Json:
    """Append the tensors of `value` to `leaves`, depth first, and return the JSON that puts them back.

    Tuples, lists, dicts, named tuples, dataclasses, torch.return_types and any registered pytree node (TorchRec's
    KeyedJaggedTensor, transformers' ModelOutput) may nest; anything that is no tensor is kept as a constant.
    """
    if isinstance(value, torch.Tensor):
        leaves.append(value)
        return {"leaf": len(leaves) - 1}
    if isinstance(value, SCALARS):
        return {"constant": value}
    if is_structseq(value):
        return {"structseq": type(value).__name__, "items": [flatten(v, leaves) for v in value]}
    if is_namedtuple(value):
        return {
            "namedtuple": type_name(value),
            "fields": list(value._fields),
            "items": [flatten(v, leaves) for v in value],
        }
    if type(value) in (tuple, list):
        return {type(value).__name__: [flatten(v, leaves) for v in value]}
    if type(value) in (dict, OrderedDict):
        return {"dict": {str(k): flatten(v, leaves) for k, v in value.items()}}
    if is_dataclass(value):
        return {"record": type_name(value), "items": {k: flatten(v, leaves) for k, v in fields_of(value).items()}}
    if type(value) in pytree.SUPPORTED_NODES:
        return flatten_registered(value, leaves)
    name, hint = (
        type(value).__name__,
        "use tensors in tuples, lists, dicts, named tuples or dataclasses, or register the class",
    )
    if name.endswith("Cache"):
        hint = "keep no cache of keys and values: model.config.use_cache = False"
    elif type(value).__module__ == "numpy":
        name, hint = f"numpy {name}", "return torch tensors: numpy's can't be followed"
    raise InputError(f"a {name} is neither a tensor nor a known container", hint)


def flatten_registered(value: Any, leaves: list[torch.Tensor]) -> Json:
    if isinstance(value, OrderedDict):  # transformers' ModelOutput: a dict with attributes
        items = {k: flatten(v, leaves) for k, v in value.items()}
        return {"record": type_name(value), "items": items}
    flat, spec = pytree.tree_flatten(value)
    parts = [flatten(v, leaves) for v in (by_lengths(flat) if is_jagged(value) else flat)]
    return {"registered": type_name(value), "spec": pytree.treespec_dumps(spec), "items": parts}


JAGGED = ("KeyedJaggedTensor", "JaggedTensor")
JAGGED_FIELDS = ("values", "weights", "lengths", "offsets")


def is_jagged(value: object) -> bool:
    """True for TorchRec's jagged tensors, which hold the lengths of their bags, or their offsets, or both."""
    return type(value).__name__ in JAGGED and type(value) in pytree.SUPPORTED_NODES


def by_lengths(parts: list[Any]) -> list[Any]:
    """A jagged tensor's parts with lengths alone: they remember offsets once anybody asks for those."""
    values, weights, lengths, offsets, *rest = parts
    if offsets is not None and lengths is None:
        lengths = offsets.diff()
    return [values, weights, lengths, None, *rest]


def fresh(value: Any) -> Any:
    """The same inputs with jagged tensors of their own, which hold lengths alone: a model makes others remember offsets."""
    if not any(map(is_jagged, pytree.tree_leaves(value, is_leaf=is_jagged))):
        return value

    def own(part: Any) -> Any:
        flat, spec = pytree.tree_flatten(part)
        return pytree.tree_unflatten(by_lengths(flat), spec)

    return pytree.tree_map(lambda part: own(part) if is_jagged(part) else part, value, is_leaf=is_jagged)


def unflatten(structure: Json, leaves: Sequence[torch.Tensor]) -> Any:
    """The inverse of `flatten`. A class that this host lacks becomes a plain named tuple or dict of the same fields."""
    return builder(structure)(leaves)


def builder(structure: Json) -> Callable[[Sequence[torch.Tensor]], Any]:
    """Compile a structure into one function from leaves to value, so that no JSON is walked per request."""
    if "leaf" in structure:
        index = structure["leaf"]
        return lambda leaves: leaves[index]
    if "constant" in structure:
        constant = structure["constant"]
        return lambda leaves: constant
    for kind in (tuple, list):
        if kind.__name__ in structure:
            return sequence(kind, structure[kind.__name__])
    if "dict" in structure:
        return mapping(dict, structure["dict"])
    if "record" in structure:
        return mapping(find_type(structure["record"]) or dict, structure["items"])
    items = [builder(item) for item in structure.get("items", ())]
    if "structseq" in structure:
        make = getattr(torch.return_types, structure["structseq"])
        return lambda leaves: make([item(leaves) for item in items])
    if "namedtuple" in structure:
        name = structure["namedtuple"]
        made: Any = find_type(name)
        if made is None or getattr(made, "_fields", None) != tuple(structure["fields"]):
            made = namedtuple(name.rpartition(":")[2].rpartition(".")[2], structure["fields"])  # type: ignore[misc, no-redef]
        return lambda leaves: made(*[item(leaves) for item in items])
    if "registered" in structure:
        if find_type(structure["registered"]) is None:
            package = structure["registered"].partition(":")[0].partition(".")[0]
            raise ArtifactError(
                f"the model's structure uses {structure['registered']}, which is not installed here",
                f"pip install {package}",
            )
        spec = pytree.treespec_loads(structure["spec"])
        return lambda leaves: pytree.tree_unflatten([item(leaves) for item in items], spec)
    raise ArtifactError(f"unknown structure {sorted(structure)}", "rebuild the artifact with this version of grc")


def sequence(kind: type, parts: Sequence[Json]) -> Callable[[Sequence[torch.Tensor]], Any]:
    if [part.get("leaf") for part in parts] == list(range(len(parts))) and parts:
        count = len(parts)
        return lambda leaves: kind(leaves[:count])
    items = [builder(part) for part in parts]
    return lambda leaves: kind([item(leaves) for item in items])


def mapping(kind: type, parts: dict[str, Json]) -> Callable[[Sequence[torch.Tensor]], Any]:
    items = {key: builder(part) for key, part in parts.items()}
    if kind is dict:
        return lambda leaves: {key: item(leaves) for key, item in items.items()}
    return lambda leaves: kind(**{key: item(leaves) for key, item in items.items()})


def leaf_names(structure: Json, prefix: str = "") -> list[str]:
    """A readable name for each leaf, in order: `features.values`, `ids`, `history[2]`."""
    if "leaf" in structure:
        return [prefix or "input"]
    for kind in ("tuple", "list"):
        if kind in structure:
            names = [f"{prefix}[{i}]" if prefix else f"input{i}" for i in range(len(structure[kind]))]
            return [n for name, s in zip(names, structure[kind], strict=True) for n in leaf_names(s, name)]
    if "dict" in structure or "record" in structure:
        parts = structure.get("dict") or structure["items"]
        return [n for key, s in parts.items() for n in leaf_names(s, f"{prefix}.{key}" if prefix else key)]
    items = structure.get("items", ())
    fields = list(structure.get("fields", ()))
    if structure.get("registered", "").endswith(tuple(f":{name}" for name in JAGGED)):
        fields = list(JAGGED_FIELDS)
    fields += [str(i) for i in range(len(fields), len(items))]
    return [
        n for key, s in zip(fields, items, strict=False) for n in leaf_names(s, f"{prefix}.{key}" if prefix else key)
    ]


def output_names(structure: Json) -> list[str]:
    """`output` where there is one, else the keys of the model's own dict, else `output[0]`, `output[1]`, …"""
    return [name.removeprefix("output.") for name in leaf_names(structure, "output")]
