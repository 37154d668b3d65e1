"""A server under load: latency, requests a second, and the CPU time that a request costs, by encoding and clients.

    python -m benchmarks.serving [--model dlrm] [--artifact dlrm.grc] [--server own,fused,stages] [--clients 1,8,64] [--small]

Needs `wrk`. Every server gets the same requests in turns, in one run: `own` is grc serve; `fused` and `stages` are the
tritonserver of this host on the repositories that grc exports, where both are there, or any server that already runs:
`--server fused=127.0.0.1:8000/MODEL@PID`. Rows, one JSON object a line, are kept in benchmarks/results/serving.jsonl;
`--small` keeps nothing. CPU time is that of the server's processes, as the kernel tells it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grc
from benchmarks.rows import RESULTS, replace
from grc.bench.host import machine, versions
from grc.runtime.golden import read_golden
from grc.runtime.server.datatypes import NAMES

ROOT = Path(__file__).resolve().parent.parent
KEY = ("server", "model", "encoding", "clients", "machine")
ROUNDS = 3  # each cell is measured in as many turns, and the median of each figure is kept
# wrk's own summary rounds: this prints every figure in microseconds, and how many answers were no 200.
REPORT = """
local failed = 0
done = function(summary, latency, requests)
  io.write(string.format('{"p50": %d, "p99": %d, "requests": %d, "us": %d, "errors": %d}\\n',
    latency:percentile(50), latency:percentile(99), summary.requests, summary.duration,
    summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout))
end
"""


@dataclass(frozen=True)
class Target:
    """A server that runs: its name in the table, where its model answers, and the process that is its root."""

    name: str
    url: str
    pid: int


def bodies(artifact: Path, folder: Path) -> dict[str, Path]:
    """A wrk script for each encoding of one golden request of the smallest batch."""
    import tritonclient.http as client

    opened = grc.Artifact.open(artifact)
    inputs = read_golden(opened)[0].inputs
    entries, tensors = [], []
    for spec, tensor in zip(opened.manifest["inputs"], inputs, strict=True):
        about = {"name": spec["name"], "datatype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        entries.append({**about, "data": tensor.flatten().tolist()})
        one = client.InferInput(about["name"], about["shape"], about["datatype"])
        one.set_data_from_numpy(tensor.numpy())
        tensors.append(one)
    packed, header = client.InferenceServerClient.generate_request_body(tensors)
    found = {}
    for encoding, body in (("json", json.dumps({"inputs": entries}).encode()), ("binary", bytes(packed))):
        file = folder / f"{encoding}.body"
        file.write_bytes(body)
        script = f'local f = io.open("{file}", "rb"); wrk.body = f:read("*a"); f:close(); wrk.method = "POST"\n'
        if encoding == "binary":
            script += f'wrk.headers["Inference-Header-Content-Length"] = "{header}"\n'
        found[encoding] = folder / f"{encoding}.lua"
        found[encoding].write_text(script + REPORT)
    return found


@contextlib.contextmanager
def own(artifact: Path, folder: Path) -> Iterator[Target]:
    """grc serve, as anybody would start it."""
    said = folder / "own.log"
    words = [sys.executable, "-m", "grc", "serve", f"model={artifact}", "--server", "own", "--port", "0", "--no-grpc"]
    with said.open("w") as log:
        process = subprocess.Popen(words, stderr=log, cwd=ROOT)
    try:
        for _ in range(600):
            found = re.search(r"http://(127\.0\.0\.1:\d+)/v2", said.read_text())
            if found or process.poll() is not None:
                break
            time.sleep(0.1)
        if not found:
            sys.exit(f"error: grc serve did not start\n{said.read_text()}")
        yield Target("own", f"http://{found[1]}/v2/models/model/infer", process.pid)
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def exported(layout: str, artifact: Path, folder: Path) -> Iterator[Target]:
    """The tritonserver of this host on the repository that grc exports in this layout."""
    from grc.runtime.triton_repository.export import export
    from grc.runtime.triton_repository.launcher import serving
    from grc.runtime.triton_repository.settings import Settings

    made = export(artifact, folder / layout, Settings(layout=layout))
    with serving(made.path) as server:
        yield Target(layout, f"http://{server.at('http')}/v2/models/{made.entry}/infer", server.process.pid)


@contextlib.contextmanager
def opened(name: str, artifact: Path, folder: Path) -> Iterator[Target]:
    """`own`, `fused`, `stages`, or NAME=HOST:PORT/MODEL@PID."""
    label, equals, rest = name.partition("=")
    if equals:
        place, _, pid = rest.partition("@")
        address, _, model = place.partition("/")
        yield Target(label, f"http://{address}/v2/models/{model}/infer", int(pid))
    elif name == "own":
        with own(artifact, folder) as target:
            yield target
    else:
        with exported(name, artifact, folder) as target:
            yield target


def processes(pid: int) -> list[int]:
    """A process and all that it started: tritonserver's models have processes of their own."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop()
        found.append(one)
        waiting += parents.get(one, [])
    return found


def cpu_seconds(pid: int) -> float:
    ticks = 0
    for one in processes(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """Bytes that belong to the server's processes alone, or their share of what they have in common."""
    total = 0
    for one in processes(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
    return total


def loaded(target: Target, script: Path, clients: int, seconds: int) -> dict[str, float]:
    """One turn of wrk."""
    before = cpu_seconds(target.pid)
    words = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "10s", "-s", str(script), target.url]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    found = json.loads(next(line for line in text.splitlines() if line.startswith('{"p50"')))
    spent = cpu_seconds(target.pid) - before
    return {
        "p50_us": found["p50"],
        "p99_us": found["p99"],
        "requests_s": found["requests"] / (found["us"] / 1e6),
        "cpu_us": spent * 1e6 / max(found["requests"], 1),
        "errors": found["errors"],
    }


def middle(turns: list[dict[str, float]], name: str) -> float:
    values = sorted(turn[name] for turn in turns)
    return values[len(values) // 2]


def cells(
    targets: list[Target], scripts: dict[str, Path], clients: list[int], seconds: int, rounds: int
) -> list[dict[str, Any]]:
    """All servers in turns at each cell: what disturbs one disturbs the others too."""
    rows = []
    for encoding, script in scripts.items():
        for count in clients:
            turns: dict[str, list[dict[str, float]]] = {target.name: [] for target in targets}
            for target in targets:
                loaded(target, script, count, 1)  # warm
            for _ in range(rounds):
                for target in targets:
                    turns[target.name].append(loaded(target, script, count, seconds))
            for target in targets:
                own = turns[target.name]
                errors = int(sum(turn["errors"] for turn in own))
                row = {"server": target.name, "encoding": encoding, "clients": count, "errors": errors}
                row |= {name: round(middle(own, name), 1) for name in ("p50_us", "p99_us", "requests_s", "cpu_us")}
                row["spread_p99"] = round(max(t["p99_us"] for t in own) / max(min(t["p99_us"] for t in own), 1), 2)
                rows.append(row)
                sys.stderr.write(f"  {json.dumps(row)}\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dlrm")
    parser.add_argument("--artifact", type=Path, help="serve this instead of compiling the model")
    parser.add_argument("--server", default="own")
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a moment of everything, to check that it runs")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("error: this benchmark needs wrk\nhint: sudo apt-get install wrk")
    servers = options.server.split(",")
    rounds = 1 if options.small else ROUNDS
    seconds = 1 if options.small else options.seconds
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        artifact = options.artifact or folder / "model.grc"
        if options.artifact is None:
            model = ROOT / "examples" / "zoo" / f"{options.model}.py"
            grc.compile(str(model), None, grc.Options(artifact, batches=(1, 8, 64), stages="stages" in servers))
        scripts = bodies(artifact, folder)
        targets = [stack.enter_context(opened(server, artifact, folder)) for server in servers]
        rows = cells(targets, scripts, [int(c) for c in options.clients.split(",")], seconds, rounds)
        manifest = grc.Artifact.open(artifact).manifest
        memory = {target.name: resident(target.pid) for target in targets}
    said = f"python -m benchmarks.serving --model {options.model} --server {options.server}"
    said += f" --clients {options.clients} --seconds {options.seconds}"
    said += f" --artifact {options.artifact.name}" if options.artifact else ""
    engines = list(dict.fromkeys(manifest["parts"][choice["part"]]["engine"] for choice in manifest["choice"]))
    about = {
        "engines": engines,
        "machine": machine("cpu"),
        "versions": served_versions(),
        "date": datetime.date.today().isoformat(),
    }
    rows = [
        {**row, "model": options.model, "memory_bytes": memory[row["server"]], **about, "command": said} for row in rows
    ]
    print("\n".join(map(json.dumps, rows)))
    failed = sorted({row["server"] for row in rows if row["errors"]})
    if failed:  # a server that does not answer has no speed
        sys.exit(f"error: {', '.join(failed)} did not answer every request\nhint: nothing was kept")
    if not options.small:
        replace(rows, RESULTS / "serving.jsonl", KEY)


def served_versions() -> dict[str, str]:
    from importlib import metadata

    return {**versions(), "uvloop": metadata.version("uvloop")}


if __name__ == "__main__":
    main()
