"""grc doctor: what this host can do, why it can't do the rest, and the command that would make it so."""

from __future__ import annotations

from dataclasses import asdict

from grc.cli import parameters as p
from grc.cli.errors import Traceback
from grc.cli.summary import put, put_json, table

NAME = "doctor"
EXAMPLES = ("grc doctor", "grc doctor --json")


def command(json: p.Json = False, traceback: Traceback = False) -> None:
    """Show which engines, compilers, instructions and devices grc can use here."""
    from grc.cli.host import findings

    found = findings()
    if json:
        put_json({finding.name: asdict(finding) for finding in found})
        return
    rows = [
        (f.kind, f.name, "yes" if f.usable else "no", f.detail + (f"   try: {f.command}" if f.command else ""))
        for f in found
    ]
    for line in table(rows):
        put(line)
