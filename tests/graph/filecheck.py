"""A small FileCheck: lines of CHECK directives held against the text of a graph, in order."""

from __future__ import annotations

import re

from torch import fx

from grc.graph.show import show

DIRECTIVE = re.compile(r"^\s*CHECK(?P<kind>-NEXT|-NOT|-COUNT-(?P<count>\d+))?:\s*(?P<text>.*\S)\s*$")


def check(graph: fx.GraphModule, text: str) -> None:
    """Hold a graph against its CHECK lines; raise AssertionError with the graph where one does not stand.

    `CHECK: a` finds `a` in a line after the last match, `CHECK-NEXT: a` in the very next line, `CHECK-COUNT-3: a` in
    exactly three lines of the whole graph, and `CHECK-NOT: a` in no line up to the next match. `{{...}}` is a regular
    expression, and runs of spaces are equal.
    """
    shown = show(graph)
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    at = 0
    forbidden: list[re.Pattern[str]] = []
    for kind, count, wanted in directives(text):
        found = pattern(wanted)
        if kind == "-NOT":
            forbidden.append(found)
            continue
        if count is not None:
            seen = sum(bool(found.search(line)) for line in lines)
            assert seen == int(count), f"{wanted!r} stands {seen} times, not {count}, in\n{shown}"
            continue
        last = at + 1 if kind == "-NEXT" else len(lines)
        match = next((i for i in range(at, min(last, len(lines))) if found.search(lines[i])), None)
        where = "in the next line" if kind == "-NEXT" else f"after line {at}"
        assert match is not None, f"{wanted!r} does not stand {where} of\n{shown}"
        absent(forbidden, lines[at:match], shown)
        forbidden, at = [], match + 1
    absent(forbidden, lines[at:], shown)


def directives(text: str) -> list[tuple[str, str | None, str]]:
    found = []
    for line in text.strip().splitlines():
        match = DIRECTIVE.match(line)
        assert match is not None, f"{line.strip()!r} is no CHECK line"
        found.append((match["kind"] or "", match["count"], match["text"]))
    return found


def pattern(wanted: str) -> re.Pattern[str]:
    parts = re.split(r"\{\{(.*?)\}\}", " ".join(wanted.split()))
    return re.compile("".join(part if i % 2 else re.escape(part) for i, part in enumerate(parts)))


def absent(forbidden: list[re.Pattern[str]], lines: list[str], shown: str) -> None:
    for found in forbidden:
        for line in lines:
            assert not found.search(line), f"{found.pattern!r} should not stand in {line!r} of\n{shown}"
