"""python -m grc.runtime.triton_repository REPOSITORY [option …]: run the tritonserver that is found, until told to stop."""

from __future__ import annotations

import signal
import sys

from grc.errors import GrcError
from grc.runtime.triton_repository.launcher import serving
from grc.runtime.triton_repository.repository import Repository


def main(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        repository = Repository.open(words[0])
        with serving(repository.path, *repository.options, *words[1:]) as server:
            print(
                f"{repository.entry}   http {server.http}   grpc {server.grpc}   metrics {server.metrics}", flush=True
            )
            server.process.wait()
    except KeyboardInterrupt:
        return 0
    except GrcError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return 1
    return server.process.returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
