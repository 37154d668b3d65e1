"""The project's own promises: README against Makefile, one torch pin, file sizes, package data, dependencies."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import grc

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAX_LINES = 400
SOURCE = {".py", ".cpp", ".h", ".j2"}
SKIPPED = {".git", ".venv", "build", "dist", "__pycache__"}

# A module whose distribution has another name.
DISTRIBUTION = {"google": "protobuf", "grpc": "grpcio", "sklearn": "scikit-learn", "yaml": "pyyaml"}
# What a GPU host brings with its torch and driver, used only where it is found: never installed by grc.
FROM_THE_HOST = {"cuda", "tensorrt", "tensorrt_rtx", "torch_tensorrt", "triton", "triton_python_backend_utils"}


def files(folder: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in SKIPPED and not f.endswith((".grc", "_cache")))
        yield from (Path(here, name) for name in sorted(names))


def make_targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", makefile, re.M))


def commands(markdown: str) -> str:
    """Only what stands in code: `make sure` in prose is no command."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", markdown, re.M | re.S)
    prose = re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S)
    return "\n".join([*fenced, *re.findall(r"`([^`\n]+)`", prose)])


def declared(*extras: str) -> set[str]:
    project = PROJECT["project"]
    requirements = [*project["dependencies"]]
    for extra in extras:
        requirements += project["optional-dependencies"][extra]
    return {re.split(r"[\s<>=!~;\[]", r, maxsplit=1)[0].lower().replace("_", "-") for r in requirements}


def imported(file: Path) -> set[str]:
    """Top-level names of a file's absolute imports, those inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_readme_names_only_make_targets_that_exist():
    targets = make_targets((ROOT / "Makefile").read_text())
    said = set(re.findall(r"\bmake ([a-z][a-z-]*)", commands((ROOT / "README.md").read_text())))
    assert said >= {"demo", "test"}
    assert said <= targets


def test_readme_and_makefile_take_the_pythons_of_the_package():
    first, end = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["project"]["requires-python"]).groups()
    said = f"one Python from 3.{first} to 3.{int(end) - 1}"
    for name in ("README.md", "Makefile"):
        assert said in (ROOT / name).read_text(), name


def test_ci_runs_make_test_and_nothing_else():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "exec make test </dev/null"]


def test_makefile_runs_only_what_exists():
    makefile = (ROOT / "Makefile").read_text()
    modules = set(re.findall(r"-m (benchmarks\.\w+)\b", makefile))
    scripts = set(re.findall(r"\$\(PY\) (\S+\.py)", makefile))
    assert "benchmarks.cpu" in modules and "examples/movielens/demo.py" in scripts
    paths = {module.replace(".", "/") + ".py" for module in modules} | scripts
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_make_without_a_target_prints_help():
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True, env=clean_env()).stdout
    assert "make demo" in shown
    assert "make test" in shown


def clean_env() -> dict[str, str]:
    """Without what `make test` passes to the makes it starts: its flags and the variables of its command line."""
    return {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES"}}


def test_no_source_file_of_grc_is_long():
    lengths = {str(f.relative_to(ROOT)): f.read_text().count("\n") for f in files(ROOT / "grc") if f.suffix in SOURCE}
    assert len(lengths) > 10
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_torch_is_pinned_in_exactly_one_place():
    pin = re.compile(r"(?<![\w-])torch\s*==\s*\d")
    texts = {f: f.read_bytes() for f in files(ROOT) if f.stat().st_size < 1_000_000}
    pinned = [str(f.relative_to(ROOT)) for f, text in texts.items() if pin.search(text.decode(errors="ignore"))]
    assert pinned == ["constraints.txt"]


def test_pinned_torch_lies_in_the_range_of_the_package():
    pinned = re.search(r"^torch==(\d+)\.(\d+)", (ROOT / "constraints.txt").read_text(), re.M)
    bounds = re.search(r"'torch>=2\.(\d+),<2\.(\d+)'", str(PROJECT["project"]["dependencies"]))
    assert pinned is not None
    assert bounds is not None
    assert pinned[1] == "2"
    assert int(bounds[1]) <= int(pinned[2]) < int(bounds[2])


def test_every_data_file_is_declared_as_package_data():
    patterns = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["artifacts"]
    assert {"grc/**/*.cpp", "grc/**/*.h", "grc/**/*.j2"} <= set(patterns)
    data = [f.relative_to(ROOT).as_posix() for f in files(ROOT / "grc") if f.suffix in {".cpp", ".h", ".j2"}]
    assert data
    assert [f for f in data if not any(fnmatch(f, pattern) for pattern in patterns)] == []


def test_every_import_of_grc_is_a_declared_dependency():
    known = declared("onnxruntime", "parquet", "plot", "serve", "thirdparty", "triton") | {"torchrec"} | FROM_THE_HOST
    undeclared = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in files(ROOT / "grc")
        if file.suffix == ".py"
        for name in imported(file) - sys.stdlib_module_names - {"grc"}
        if DISTRIBUTION.get(name, name.replace("_", "-")) not in known and name not in known
    }
    assert undeclared == set()


def test_runtime_dependencies_are_all_used():
    used = {DISTRIBUTION.get(n, n) for f in files(ROOT / "grc") if f.suffix == ".py" for n in imported(f)}
    assert declared() - used == set()


def test_version_is_the_same_for_pip_and_for_import():
    assert grc.__version__ == PROJECT["project"]["version"]
