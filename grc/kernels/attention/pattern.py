"""Where attention applies: F.scaled_dot_product_attention, or two products with softmax or SiLU between them."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from grc.graph.match import Miss, argument, aten, attribute, is_op, same_size, shape, value
from grc.graph.rewrite import Rewriter
from grc.kernels.attention import ATTENTION, SILU, SOFTMAX, STRICT_SOFTMAX
from grc.kernels.attention.layout import is_view, leads, scaled
from grc.kernels.attention.masks import Masks, Size, bias_of, factor_of
from grc.kernels.attention.operands import Heads, head_count
from grc.kernels.attention.products import Product, scores, weighted_sum
from grc.kernels.attention.result import replacement
from grc.kernels.fusion import Fused, Fusion

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Attention(Fusion):
    """softmax(q k^T * scale + bias) v (Vaswani et al. 2017), and HSTU's silu in softmax's place (Zhai et al. 2024)."""

    name = "attention"
    op = ATTENTION
    anchors = (aten.scaled_dot_product_attention, aten.matmul, aten.bmm, aten.einsum)

    def fuse(self, edit: Rewriter, node: fx.Node) -> Fused | None:
        found = exported(node) if is_op(node, aten.scaled_dot_product_attention) else written_out(edit.module, node)
        if found is None:
            return None
        dtype = value(found.q).dtype
        for operand in (found.q, found.k, found.v):
            if value(operand).dtype not in DTYPES or value(operand).dtype is not dtype:
                raise Miss(f"values are {str(value(operand).dtype).removeprefix('torch.')}")
        heads = Heads(edit, head_count(found.q) if "g" in found.q_layout else None)
        q, scale_q = heads.operand(found.q, found.q_layout)
        k, scale_k = heads.operand(found.k, found.k_layout)
        v, scale_v = heads.operand(found.v, found.v_layout)
        batch, queries, count, _ = shape(q)
        keys = shape(k)[1]
        for other in (k, v):
            if not same_size(shape(other)[0], batch) or not same_size(shape(other)[2], count):
                raise Miss(f"q is {shown(q)}, k {shown(k)}, v {shown(v)}: their batch or heads differ")
        if not isinstance(count, int):
            raise Miss("the number of heads varies")
        size = Size(queries, keys, count, heads.heads is not None)
        bias, causal = bias_of(edit, found.masks, size)
        factor, also_causal = factor_of(edit, found.masks, size)
        bias, factor = (in_dtype(edit, mask, dtype) for mask in (bias, factor))
        new = edit.call(
            ATTENTION.overload, q, k, v, bias, factor, found.scale * scale_q * scale_k, found.gain * scale_v,
            found.kind, found.causal or causal or also_causal,
        )  # fmt: skip
        old, result = replacement(edit, heads.sizes, node, found.out_layout, new, count)
        if not found.launches:
            return Fused(old, result, "q, k and v read in place")
        fixed = isinstance(queries, int) and isinstance(keys, int)
        kilobytes = f", {4 * count * queries * keys / 1024:.1f} KB of scores a row" if fixed else ""
        return Fused(old, result, f"{found.launches} launches{kilobytes}")


def in_dtype(edit: Rewriter, mask: fx.Node | None, dtype: torch.dtype) -> fx.Node | None:
    """A mask that is no wider than the values: constants are put together in float32."""
    if mask is None or value(mask).dtype in (torch.bool, dtype):
        return mask
    tensor = attribute(edit.module, mask)
    if tensor is not None:
        return edit.parameter(str(mask.target), tensor.detach().to(dtype))
    return edit.call(aten.to.dtype, mask, dtype)


@dataclass
class Found:
    """An attention as it was written; a layout names the dimensions of its operand, as in `Heads.operand`."""

    q: fx.Node
    q_layout: str
    k: fx.Node
    k_layout: str
    v: fx.Node
    v_layout: str
    out_layout: str
    kind: int
    scale: float = 1.0
    gain: float = 1.0
    causal: bool = False
    masks: Masks = field(default_factory=Masks)
    launches: int = 0


def exported(node: fx.Node) -> Found:
    """F.scaled_dot_product_attention, which nn.MultiheadAttention and nn.TransformerEncoderLayer call."""
    q, k, v = node.args[:3]
    if argument(node, "dropout_p"):
        raise Miss(f"dropout of {argument(node, 'dropout_p')} is active")
    if argument(node, "enable_gqa") and not same_size(shape(q)[-3], shape(k)[-3]):  # type: ignore[arg-type]
        raise Miss("queries share keys in groups")
    rank = value(node).dim()
    if rank not in (3, 4):
        raise Miss(f"values have {rank} dimensions")
    layout = "bhld" if rank == 4 else "gld"
    scale = argument(node, "scale")
    if scale is None:
        scale = float(shape(q)[-1]) ** -0.5  # type: ignore[arg-type]
    found = Found(q, layout, k, layout, v, layout, layout, SOFTMAX, float(scale))  # type: ignore[arg-type]
    found.causal = bool(argument(node, "is_causal"))
    if argument(node, "attn_mask") is not None:
        found.masks.take(argument(node, "attn_mask"))
    return found


def written_out(module: fx.GraphModule, node: fx.Node) -> Found | None:
    """weights v, where the weights are softmax or SiLU of q k^T."""
    out = weighted_sum(node)
    weights = None if out is None else Weights.read(out.left)
    if out is None or weights is None:
        return None
    read = Scores.read(module, weights.scores, weights.masks)
    if read is None:
        return None
    if weights.shared or len(read.product.node.users) > 1:
        raise Miss("the attention weights are read outside of the attention too")
    if weights.cut:
        raise Miss("the weights of some keys are left out")
    left, right = layout(read.product.left_layout, "n"), layout(read.product.right_layout, "m")
    if weights.kind == STRICT_SOFTMAX and weights.masks.factors:
        raise Miss("what softmax gives is multiplied by a mask")
    found = Found(
        read.product.left, left, read.product.right, right, out.right, layout(out.right_layout, "m"),
        layout(out.out_layout, "n"), weights.kind, read.scale, weights.gain, False, weights.masks,
        weights.launches + read.launches + 1,
    )  # fmt: skip
    return with_heads_first(found) if heads_come_first(found) else found


def heads_come_first(found: Found) -> bool:
    """[H, B, L, D], as AutoInt (Song et al. 2019) stacks its heads: what was taken for the batch is a number, and what was
    taken for the heads is none."""
    sizes = dict(zip(found.q_layout, shape(found.q), strict=True))
    return "g" not in sizes and isinstance(sizes["b"], int) and not isinstance(sizes["h"], int)


def with_heads_first(found: Found) -> Found:
    if found.masks != Masks():
        raise Miss("a mask is added to scores whose first dimension are the heads")
    names = str.maketrans("bh", "hb")
    return replace(
        found,
        q_layout=found.q_layout.translate(names),
        k_layout=found.k_layout.translate(names),
        v_layout=found.v_layout.translate(names),
        out_layout=found.out_layout.translate(names),
    )


def layout(names: str, length: str) -> str:
    return names.replace(length, "l")


@dataclass
class Weights:
    """gain * (softmax or silu)(scores) * factors."""

    kind: int
    scores: fx.Node
    gain: float = 1.0
    masks: Masks = field(default_factory=Masks)
    shared: bool = False
    cut: bool = False  # the weights of some keys are left out
    launches: int = 1

    @staticmethod
    def read(node: Any) -> Weights | None:
        if not isinstance(node, fx.Node):
            return None
        found: Weights | None = None
        if is_op(node, aten.softmax, aten._softmax) and argument(node, "dim") in (-1, value(node).dim() - 1):
            found = Weights(STRICT_SOFTMAX, unshifted(node.args[0]))  # type: ignore[arg-type]
        elif is_op(node, aten.silu):
            found = Weights(SILU, node.args[0])  # type: ignore[arg-type]
        elif is_op(node, aten.slice) and argument(node, "dim") in (-1, value(node).dim() - 1):
            found = Weights.read(node.args[0])
            if found is not None:
                found.cut = True
        elif scaled(node) is not None or leads(node):
            found = Weights.read(node.args[0])
            if found is not None:
                found.gain *= scaled(node) or 1.0
        elif is_op(node, aten.dropout) and Weights.read(node.args[0]) is not None:
            raise Miss(f"dropout of {node.args[1]} is active")
        elif is_op(node, aten.masked_fill) and node.args[2] == 0:
            found = Weights.read(node.args[0])
            if found is not None:
                found.masks.factors.append((node.args[1], True))  # type: ignore[arg-type]
        elif is_op(node, aten.mul, aten.div):
            for side, other in (node.args[:2], node.args[1::-1]):
                found = Weights.read(side) if isinstance(other, fx.Node) else None
                if found is not None and is_op(node, aten.mul) and isinstance(value(other), torch.Tensor):
                    found.masks.factors.append((other, False))  # type: ignore[arg-type]
                    break
                if found is not None:
                    raise Miss("the weights are divided by a length that varies")
        if found is not None:
            found.shared |= len(node.users) > 1
            found.launches += not is_view(node)
        return found


@dataclass
class Scores:
    """product * scale, with masks."""

    product: Product
    scale: float = 1.0
    launches: int = 1

    @staticmethod
    def read(module: fx.GraphModule, node: Any, masks: Masks) -> Scores | None:
        if not isinstance(node, fx.Node):
            return None
        product = scores(node)
        if product is not None:
            found = Scores(product)
            if is_op(node, aten.baddbmm):
                if argument(node, "beta") != 1:
                    raise Miss("the mask is multiplied by a number")
                found.scale = float(argument(node, "alpha"))
                masks.added.append(node.args[0])  # type: ignore[arg-type]
            return found
        factor = scaled(node)
        inner: Scores | None = None
        if factor is not None or leads(node):
            before = len(masks.added)
            inner = Scores.read(module, node.args[0], masks)
            if inner is not None and factor is not None:
                if len(masks.added) > before:
                    raise Miss("the mask is multiplied by a number")
                inner.scale *= factor
        elif is_op(node, aten.add) and argument(node, "alpha") == 1 and len(node.args) == 2:
            for side, other in (node.args, node.args[::-1]):
                inner = Scores.read(module, side, masks) if isinstance(other, fx.Node) else None
                if inner is not None:
                    masks.added.append(other)  # type: ignore[arg-type]
                    break
        elif is_op(node, aten.masked_fill):
            inner = Scores.read(module, node.args[0], masks)
            if inner is not None:
                masks.fill(node.args[1], number(module, node.args[2]))  # type: ignore[arg-type]
        elif is_op(node, aten.where) and len(node.args) == 3:
            inner = Scores.read(module, node.args[1], masks)
            if inner is not None:
                masks.fill(node.args[0], number(module, node.args[2]), hides=False)  # type: ignore[arg-type]
        elif is_op(node, aten.tanh) and Scores.read(module, node.args[0], masks) is not None:
            raise Miss("the scores are capped by tanh")
        elif is_op(node, aten.cat) and any(Scores.read(module, part, masks) is not None for part in node.args[0]):  # type: ignore[union-attr]
            raise Miss("other logits, as a sink's, are joined to the scores")
        if inner is not None:
            inner.launches += not is_view(node)
        return inner


def unshifted(scores: fx.Node) -> fx.Node:
    """x of x - max(x) over the keys, of which softmax is the same."""
    x, largest = scores.args[:2] if is_op(scores, aten.sub) else (scores, None)
    if not isinstance(largest, fx.Node) or not same_size(shape(largest)[-1], 1):
        return scores
    found: Any = largest.args[0] if largest.target is operator.getitem else largest
    return x if is_op(found, aten.amax, aten.max) and found.args[0] is x else scores  # type: ignore[return-value]


def number(module: fx.GraphModule, arg: Any) -> Any:
    tensor = attribute(module, arg)
    return tensor.flatten()[0].item() if tensor is not None and tensor.unique().numel() == 1 else arg


def shown(node: fx.Node) -> str:
    return str([str(s) for s in shape(node)]).replace("'", "")
