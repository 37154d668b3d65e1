"""Model files: a Python file (or saved program) that says what to compile and what its inputs look like."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import random
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from grc.errors import ModelFileError, message_of
from grc.graph.flat import quiet_export
from grc.runtime.structure import fresh

MACHINERY = (Path(torch.__file__).parent, Path(__file__).parents[1])  # torch's code, and grc's


@dataclass
class Model:
    """What a model file declares.

    `inputs(batch)` gives positional and keyword arguments at a batch size; the rest is optional.
    """

    name: str
    module: nn.Module
    inputs: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
    file: Path | None = None
    program: torch.export.ExportedProgram | None = None
    calibration: Callable[[], Any] | None = None
    preprocess: Callable[..., Any] | None = None
    postprocess: Callable[..., Any] | None = None
    input_names: list[str] | None = None
    assets: list[Path] = field(default_factory=list)


def load_model(spec: str | Path) -> Model:
    """Read `model.py`, `model.py:name` or `model.pt2`.

    Raises ModelFileError when the file is missing, can't be run, or lacks `get_model` or `get_inputs`.
    """
    path, name = split_spec(str(spec))
    if not path.exists():
        raise ModelFileError(f"no model file at {path}", "give a Python file with get_model() and get_inputs(batch)")
    if path.suffix == ".pt2":
        return load_program(path)
    if path.suffix != ".py" or path.is_dir():
        raise ModelFileError(f"{path} is neither a .py file nor a .pt2 program", "see docs/model-files.md")
    module = run_file(path)
    return declared(module, path, name)


FOLDERS: set[str] = set()  # of model files
RAISED = (Exception, SystemExit)  # a file that ends Python would end the compiler, and look like success


def split_spec(spec: str) -> tuple[Path, str | None]:
    head, colon, name = spec.rpartition(":")
    if colon and head.endswith(".py"):
        return Path(head), name
    return Path(spec), None


def import_first_from(folder: str) -> None:
    """Local modules of a model file are those beside it, not others of the same names beside one that was read before."""
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    names = {entry.stem for entry in Path(folder).iterdir()}
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        places = tuple(f"{other}/{top}{end}" for other in FOLDERS - {folder} for end in (".py", "/"))
        if top in names and (getattr(module, "__file__", None) or "").startswith(places):
            del sys.modules[name]
    FOLDERS.add(folder)


def run_file(path: Path) -> Any:
    """Import a file under a private name, with its own folder importable, as `python model.py` would have it."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    unique = f"grc_model_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(unique, path)
    if spec is None or spec.loader is None:
        raise ModelFileError(f"{path} can't be imported as Python", "check that it is a plain .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    import_first_from(str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        line = f"{path}:{error.lineno}" if error.lineno else str(path)  # none where it is no text at all
        raise ModelFileError(f"{line}: {error.msg}", "mend the syntax error") from error
    except ImportError as error:
        hint = f"pip install {error.name.partition('.')[0]}" if error.name else "check the model file's imports"
        raise ModelFileError(f"{path} can't be imported: {error}", hint) from error
    except RAISED as error:
        line = user_line(error, path) or str(path)
        raise ModelFileError(
            f"{line}: {type(error).__name__}: {error}", f"the file must run by itself: python {path}"
        ) from error
    return module


def declared(module: Any, path: Path, name: str | None) -> Model:
    factory = getattr(module, name or "get_model", None)
    if factory is None:
        offered = sorted(k for k, v in vars(module).items() if k.startswith("get_") and callable(v))
        raise ModelFileError(
            f"{path} has no {name or 'get_model'}()",
            f"define get_model() -> nn.Module{'; the file has ' + ', '.join(offered) if offered else ''}",
        )
    suffix = (name or "get_model").removeprefix("get_model").removeprefix("get")
    get_inputs = getattr(module, f"get_inputs{suffix}", None) or getattr(module, "get_inputs", None)
    if get_inputs is None:
        raise ModelFileError(f"{path} has no get_inputs(batch)", "define get_inputs(batch) -> tuple or dict of tensors")
    for what, found in ((name or "get_model", factory), ("get_inputs", get_inputs)):
        if isinstance(found, nn.Module) or not callable(found):
            raise ModelFileError(
                f"{what} in {path} is a {type(found).__name__}, no function", f"define {what} with def"
            )
    with raised_by(f"{name or 'get_model'}()", path):
        model = factory()
    if not isinstance(model, nn.Module):
        raise ModelFileError(
            f"{name or 'get_model'}() in {path} returned a {type(model).__name__}",
            "return a torch.nn.Module in eval mode",
        )
    named = getattr(module, "assets", [])
    assets = [path.parent / asset for asset in (named() if callable(named) else named)]
    for asset in assets:
        if not asset.exists():
            raise ModelFileError(f"{path} names the asset {asset.name}, which does not exist")
    return Model(
        name=path.stem if not suffix else path.stem + suffix,
        module=require_eval(model, path),
        inputs=calling(model, get_inputs, path),
        file=path,
        calibration=getattr(module, "calibration", None),
        preprocess=getattr(module, "preprocess", None),
        postprocess=getattr(module, "postprocess", None),
        input_names=getattr(module, "input_names", None),
        assets=assets,
    )


def from_module(model: nn.Module, inputs: Any, name: str | None = None) -> Model:
    """A Model from Python: `inputs` is a function of the batch size, or example inputs for a model of fixed sizes."""
    get_inputs = inputs if callable(inputs) else lambda batch: inputs
    return Model(
        name=name or type(model).__name__.lower(),
        module=require_eval(model, None),
        inputs=calling(model, get_inputs, None),
    )


def load_program(path: Path) -> Model:
    """A saved ExportedProgram. Its example inputs are resized along the dynamic dimensions it was exported with."""
    try:
        with quiet_export():
            program = torch.export.load(path)
    except Exception as error:
        reason = f"{path} is not a program saved by torch.export.save: {message_of(error)}"
        raise ModelFileError(reason, "save it again with the torch that is installed here") from error
    if program.example_inputs is None:
        raise ModelFileError(f"{path} holds no example inputs", "save it from torch.export.export(model, inputs)")
    args, kwargs = program.example_inputs
    placeholders = [s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"]
    values = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
    symbols: list[Any] = []
    for name in placeholders:
        for size in getattr(values.get(name), "shape", ()):
            if isinstance(size, torch.SymInt) and size.node.expr.free_symbols:
                symbols += [s for s in sorted(size.node.expr.free_symbols, key=str) if s not in symbols]

    def resized(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        import torch.utils._pytree as pytree

        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        first = dict.fromkeys(symbols, batch)
        out = []
        for name, leaf in zip(placeholders, leaves, strict=True):
            if isinstance(leaf, torch.Tensor):
                sizes = [
                    int(s.node.expr.subs(first)) if isinstance(s, torch.SymInt) else int(s) for s in values[name].shape
                ]
                for dim, size in enumerate(sizes):
                    index = torch.arange(size) % max(leaf.shape[dim], 1)
                    leaf = leaf.index_select(dim, index.to(leaf.device))
            out.append(leaf)
        return pytree.tree_unflatten(out, spec)

    return Model(path.stem, program.module(check_guards=False), resized, file=path, program=program)


QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")


def require_eval(model: nn.Module, path: Path | None) -> nn.Module:
    """The model, if it can be exported at all. Raises ModelFileError for TorchScript, for layers that torch.ao quantised, and
    for one in training mode."""
    scripted = [name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise ModelFileError(
            f"{path or type(model).__name__}: {scripted[0] or 'the model'} is TorchScript, which torch.export does not take",
            "return the nn.Module that it was made from; load_state_dict(scripted.state_dict()) brings the weights over",
        )
    quantised = [name for name, m in model.named_modules() if type(m).__module__.startswith(QUANTISED)]
    if quantised:
        raise ModelFileError(
            f"{path or type(model).__name__}: {quantised[0] or 'the model'} is quantised by torch.ao, whose packed weights "
            "torch.export does not take",
            "return the model as it was before, and give grc compile --precision int8",
        )
    training = [name or type(model).__name__ for name, m in model.named_modules() if m.training]
    if training:
        where = f"{path}: " if path else ""
        raise ModelFileError(
            f"{where}the model is in training mode ({training[0]}{' and others' if len(training) > 1 else ''})",
            "return model.eval() from get_model()",
        )
    return model


@contextmanager
def raised_by(call: str, path: Path | None, hint: str | None = None) -> Iterator[None]:
    """What a model's own function raises becomes a ModelFileError at its line."""
    try:
        yield
    except RAISED as error:
        line = (user_line(error, path) or str(path)) if path else call.partition("(")[0]
        raise ModelFileError(f"{line}: {call} raised {type(error).__name__}: {error}", hint) from error


def calling(
    model: nn.Module, get_inputs: Callable[[int], Any], path: Path | None
) -> Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]:
    """Turn what `get_inputs` returns into a call, with the user's line where it fails."""

    def inputs(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hint = "get_inputs(batch) must work for every batch size from 1 up"
        with raised_by(f"get_inputs({batch})", path, hint), seeded(batch):
            value = get_inputs(batch)
        return as_call(model, fresh(value))

    return inputs


def as_call(model: nn.Module, value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a tuple is positional, a dict of parameter names is keywords."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if isinstance(value, Mapping) and (takes_any or all(key in parameters for key in value)):
        return (), dict(value)
    if type(value) is tuple:
        return value, {}
    return (value,), {}


@contextmanager
def seeded(batch: int) -> Iterator[None]:
    """The same random numbers for the same batch, because get_inputs is called anew for each comparison of answers."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(batch)
        random.seed(batch)
        np.random.seed(batch)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


def user_line(error: BaseException, path: Path | None) -> str | None:
    """`file:line` of the innermost frame that is the user's own code, or else that of the library whose model it is."""
    frames = [f for f in reversed(traceback.extract_tb(error.__traceback__)) if not is_machinery(f.filename)]
    root = path.resolve().parent if path else None
    own = [f for f in frames if "-packages" not in f.filename and (root is None or root in Path(f.filename).parents)]
    return next((f"{frame.filename}:{frame.lineno}" for frame in own or frames), None)


def is_machinery(file: str) -> bool:
    """Whether a file is torch's, grc's, Python's own or none at all."""
    if file.startswith("<") or any(folder in Path(file).parents for folder in MACHINERY):
        return True
    return file.startswith(sysconfig.get_path("stdlib")) and "-packages" not in file
