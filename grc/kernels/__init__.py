"""Fused operators, one folder each: declaration, pattern, C++ kernel, Triton kernel. FUSIONS lists them all."""

from grc.kernels.activation_unit import ACTIVATION_UNIT
from grc.kernels.attention import ATTENTION
from grc.kernels.bag_dot import BAG_DOT
from grc.kernels.bag_fm import BAG_FM
from grc.kernels.checked_ids import CHECKED_IDS
from grc.kernels.cpp import register
from grc.kernels.cross import CROSS
from grc.kernels.fusion import FusedOp
from grc.kernels.lookup import LOOKUP
from grc.kernels.packed_linear import PACKED_LINEAR
from grc.kernels.quantised_linear import QUANTISED_LINEAR
from grc.kernels.scaled_linear import SCALED_LINEAR
from grc.kernels.score_topk import PACKED_SCORE_TOPK, SCORE_TOPK

OPS: tuple[FusedOp, ...] = (
    LOOKUP, BAG_DOT, BAG_FM, CROSS, PACKED_LINEAR, QUANTISED_LINEAR, SCALED_LINEAR, SCORE_TOPK, PACKED_SCORE_TOPK,
    ATTENTION, ACTIVATION_UNIT, CHECKED_IDS,
)  # fmt: skip

for op in OPS:
    register(op)

from grc.kernels.activation_unit.pattern import ActivationUnit  # noqa: E402
from grc.kernels.attention.pattern import Attention  # noqa: E402
from grc.kernels.bag_dot.pattern import BagDot  # noqa: E402
from grc.kernels.bag_fm.pattern import BagFm  # noqa: E402
from grc.kernels.cross.pattern import Cross  # noqa: E402
from grc.kernels.fusion import Fusion  # noqa: E402
from grc.kernels.score_topk.pattern import ScoreTopk  # noqa: E402

FUSIONS: tuple[Fusion, ...] = (BagDot(), BagFm(), Cross(), ScoreTopk(), Attention(), ActivationUnit())
"""In the order in which they are tried: the largest patterns first."""
