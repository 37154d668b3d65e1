"""The pipeline: which passes run, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grc.errors import GrcError
from grc.options import Options
from grc.passes.absorb_projections import AbsorbProjections
from grc.passes.fuse import Fuse
from grc.passes.guard_ids import GuardIds
from grc.passes.jagged import Jagged
from grc.passes.manager import Pass
from grc.passes.merge_linears import MergeLinears
from grc.passes.merge_tables import MergeTables
from grc.passes.needed_rows import NeededRows
from grc.passes.normalise import Normalise, Simplify
from grc.passes.repeated_rows import RepeatedRows
from grc.passes.split_concat_linear import SplitConcatLinear

NAMES = (
    "jagged",
    "normalise",
    "repeated-rows",
    "merge-tables",
    "simplify",
    "split-concat-linear",
    "fuse",
    "needed-rows",
    "absorb-projections",
    "merge-linears",
    "guard-ids",
)


def pipeline(options: Options, fusions: Sequence[Any]) -> list[Pass]:
    """Plain aten, canonical form, merged tables, canonical form of what that left, fused, only what is read; bad ids last.

    Raises GrcError for a name in `options.disable` that no pass has.
    """
    unknown = [name for name in options.disable if name not in NAMES]
    if unknown:
        raise GrcError(f"there is no pass {unknown[0]}", f"the passes are {', '.join(NAMES)}")
    passes: dict[str, Pass] = {
        "jagged": Jagged(),
        "normalise": Normalise(),
        "repeated-rows": RepeatedRows(),
        "merge-tables": MergeTables(),
        "simplify": Simplify(),
        "split-concat-linear": SplitConcatLinear(),
        "fuse": Fuse(tuple(fusions)),
        "needed-rows": NeededRows(),
    }
    if options.device == "cpu":
        passes["absorb-projections"] = AbsorbProjections()
        # on a GPU narrow layers of one input are a chain, in one kernel already
        passes["merge-linears"] = MergeLinears()
    if options.on_bad_id != "error":
        passes["guard-ids"] = GuardIds(options.on_bad_id)
    return [step for name, step in passes.items() if name not in options.disable]
