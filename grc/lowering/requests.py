"""The requests that engines are proven on and timed with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grc.graph.capture import EXPORT_BATCH, Source
from grc.lowering.choose import Requests
from grc.options import Options
from grc.passes.manager import Proof
from grc.runtime.engines import Run

GOLDEN = (1, 2, 5, 16)  # rows of the requests that an artifact carries with the model's answers


def requests_of(source: Source, proof: Proof, options: Options, buckets: Sequence[int] = ()) -> Requests:
    """Proof inputs with the oracle's answers, a single row among them, and inputs to time: of every bucket's size."""
    inputs, truth, baseline = list(proof.inputs), list(proof.truth), list(proof.baseline)
    if source.dynamic and source.min_batch == 1:
        one = Proof([source.inputs(1)]).prepare(source.graph)
        inputs, truth, baseline = inputs + one.inputs, truth + one.truth, baseline + one.baseline
    timed = {b: source.inputs(b if source.dynamic else EXPORT_BATCH) for b in timed_batches(source, options, buckets)}
    return Requests(inputs, truth, baseline, timed)


def timed_batches(source: Source, options: Options, buckets: Sequence[int] = ()) -> list[int]:
    wanted = [b for b in buckets or options.batches if source.min_batch <= b <= options.max_batch]
    sizes = wanted if source.dynamic else [1]
    return sizes or [options.max_batch]


def golden_batches(source: Source, largest: int) -> list[int]:
    """Sizes of golden requests: none is larger than the largest batch."""
    return sorted({min(largest, max(source.min_batch, b)) for b in GOLDEN}) if source.dynamic else [1]


def judged(
    requests: Requests, source: Source, options: Options, judge: Callable[[Run], tuple[dict[str, float], str | None]]
) -> Requests:
    """The same with a budget in the oracle's place. Golden requests are among them: wherever the artifact runs they are asked
    again, and may then be as far from the truth as they are here."""
    golden = Proof([source.inputs(batch) for batch in golden_batches(source, options.max_batch)]).prepare(source.graph)
    return Requests(
        [*requests.proof, *golden.inputs],
        [*requests.truth, *golden.truth],
        [*requests.baseline, *golden.baseline],
        requests.timed,
        judge,
    )
