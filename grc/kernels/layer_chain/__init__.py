"""A chain of narrow layers on a GPU: linear layers, norms, activations and sums, each row by itself, as a list of steps.

There a narrow layer costs a launch, and hardly more. On a CPU layers cost what they compute, so it has no kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

# A step is its kind and its numbers. v and w are places of earlier values, i and o of inputs and outputs. n numbers lie in
# `lanes`, a power of two, and the rest of them are zeros. `at` is a place among the weights, and other names of parameters
# are places among the vectors, or -1. All but WIDE and OUTPUT add a value [R, n].
INPUT = 0  # i, n, lanes: an input's rows
LINEAR = 1  # v, at, lanes of v, n, lanes, bias: v @ W + bias, with W [lanes of v, lanes]
WIDE = 2  # v, at, lanes of v, n, lanes, bias, activation, o, float32: the same, activated and written block by block
NORM = 3  # v, n, lanes, eps, scale, shift: layer norm
ACTIVATION = 4  # v, place in packed_linear.ACTIVATIONS
ADD = 5  # v, w
MUL = 6  # v, w
ROW = 7  # v, i: v times a number for each row, input [R]
UNEQUAL = 8  # v, i, number: v where an integer of the row, input [R], is another number, and zeros elsewhere
COLUMN_ADD = 9  # v, addend, lanes: v plus a number for each column
COLUMN_MUL = 10  # v, factor, lanes
PRELU = 11  # v, slope, lanes
SHIFT = 12  # v, number: v plus it
SCALE = 13  # v, number: v times it
OUTPUT = 14  # v, o, n, float32

INPUTS = OUTPUTS = 6  # at most

Step = tuple[float, ...]


def encode(steps: Sequence[Step]) -> str:
    """Steps as an attribute of an operator."""
    return "; ".join(" ".join(map(repr, step)) for step in steps)


def decode(code: str) -> tuple[Step, ...]:
    return tuple(tuple(int(n) if n.lstrip("-").isdigit() else float(n) for n in s.split()) for s in code.split(";"))


def outputs(steps: Sequence[Step]) -> list[tuple[int, bool]]:
    """The columns of each output, and whether it is float32 rather than the weights' dtype."""
    found = {step[8]: (int(step[4]), bool(step[9])) for step in steps if step[0] == WIDE}
    found |= {step[2]: (int(step[3]), bool(step[4])) for step in steps if step[0] == OUTPUT}
    return [found[at] for at in sorted(found)]
