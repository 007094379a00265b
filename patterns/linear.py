"""Linear in all its disguises.

`LINEAR` is the one form that passes see: `aten.linear(x, w, b)` with a constant two-dimensional `w` [N, K].
`TO_LINEAR` brings everything else that is a linear to that form; `MATMULS` lists every operator that
multiplies matrices, so that what no rule could bring there is at least reported.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from .language import Any, Builder, Match, Maybe, P, Rule, Weight, arguments, constant, packet

aten = torch.ops.aten
x, w, b = Any("x"), Weight("w", ndim=2), Any("b")
vector, batch = Weight("w", ndim=1), Weight("w", ndim=3)

LINEAR = P(aten.linear, x, w, Maybe(b))


# --- guards: True, or the reason for the no ----------------------------------------------------------------


def only_w_is_constant(m: Match) -> bool | str:
    return not constant(m.x) or "both operands are constants"


def at_least_2d(m: Match) -> bool | str:
    return val(m.x).ndim >= 2 or "x is a vector"


def same_matrix_for_all(m: Match) -> bool | str:
    """A stack of matrices [B, …] that is one matrix seen B times is still a linear."""
    weight = val(m.w)
    leading = range(weight.ndim - 2)
    one = all(weight.size(i) == 1 or weight.stride(i) == 0 for i in leading)
    return one or f"the weight is a batch of {math.prod(weight.shape[:-2])} matrices {list(weight.shape)}"


def pointwise(m: Match) -> bool | str:
    """A convolution is a linear when its kernel covers one point and nothing is padded or grouped."""
    kernel, groups = list(val(m.w).shape[2:]), m.groups
    if any(k != 1 for k in kernel):
        return f"a {'×'.join(map(str, kernel))} convolution is no matmul"
    padded = m.padding not in ("same", "valid") if isinstance(m.padding, str) else any(m.padding)
    if padded:
        return f"a 1×1 convolution with padding {m.padding}"
    return groups == 1 or f"a 1×1 convolution in {groups} groups"


def is_linear_einsum(m: Match) -> bool | str:
    return True if isinstance(plan := einsum_plan(m), tuple) else plan


# --- replacements ------------------------------------------------------------------------------------------


def val(node: Node) -> torch.Tensor:
    return node.meta["val"]


def transposed(g: Builder, node: Node) -> Node:
    """The last two dimensions swapped; a transpose of a transpose is the original."""
    ndim = val(node).ndim
    if node.op == "call_function" and ndim == 2:
        source, *rest = arguments(node)
        is_swap = packet(node.target) in (aten.t, aten.numpy_T) or (
            packet(node.target) is aten.transpose and {d % 2 for d in rest} == {0, 1}
        )
        if is_swap or (packet(node.target) is aten.permute and [d % 2 for d in rest[0]] == [1, 0]):
            return source
    return g.call(aten.transpose.int, node, ndim - 2, ndim - 1)


def linear(g: Builder, x: Node, w: Node, b: Node | None = None) -> Node:
    return g.call(aten.linear.default, x, w) if b is None else g.call(aten.linear.default, x, w, b)


def biased(g: Builder, x: Node, w: Node, b: Node) -> Node:
    """A bias with one value for each output goes into the linear; any other is added to it."""
    if constant(b) and val(b).shape == (val(w).shape[0],):
        return linear(g, x, w, b)
    return g.call(aten.add.Tensor, linear(g, x, w), b)


def matrix(g: Builder, stack: Node) -> Node:
    """The one matrix of a stack [1 or repeated, …, K, N]."""
    while val(stack).ndim > 2:
        stack = g.call(aten.select.int, stack, 0, 0)
    return stack


def vector_product(m: Match, g: Builder) -> Node:
    return g.call(aten.squeeze.dim, linear(g, m.x, g.call(aten.unsqueeze.default, m.w, 0)), -1)


def convolution(m: Match, g: Builder) -> Node:
    spatial = val(m.w).ndim - 2
    first = val(m.x).ndim - spatial  # the first spatial dimension
    source = m.x
    for i, step in enumerate(m.stride if len(m.stride) == spatial else m.stride * spatial):
        if step != 1:
            source = g.call(aten.slice.Tensor, source, first + i, 0, 2**63 - 1, step)
    channels_last = [*range(first - 1), *range(first, first + spatial), first - 1]
    channels_first = [*range(first - 1), first + spatial - 1, *range(first - 1, first + spatial - 1)]
    weight = g.call(aten.view.default, m.w, list(val(m.w).shape[:2]))
    y = linear(g, g.call(aten.permute.default, source, channels_last), weight, m.b)
    return g.call(aten.permute.default, y, channels_first)


def einsum_plan(m: Match) -> tuple | str:
    """How an einsum of x and a constant is a linear, or why it is none.

    The weight's indices are either contracted (shared with x, absent from the output) or its own (absent from
    x, in the output). Then w is permuted to [own…, contracted…] and x to [others…, contracted…].
    """
    equation = m.equation.replace(" ", "")
    first, second = m.operands
    if constant(first) == constant(second):
        return "both operands are constants" if constant(first) else "no operand is a constant"
    if "->" not in equation or "." in equation:
        return f"the equation {equation!r} is implicit or has an ellipsis"
    inputs, out = equation.split("->")
    subscripts = inputs.split(",")
    if constant(first):
        first, second, subscripts = second, first, subscripts[::-1]
    in_x, in_w = subscripts
    if any(len(set(s)) != len(s) for s in (in_x, in_w, out)):
        return f"an index repeats in {equation!r}"
    contracted = [i for i in in_x if i in in_w and i not in out]
    own = [i for i in in_w if i not in in_x]
    others = [i for i in in_x if i not in contracted]
    if any(i in in_w for i in others):
        return f"the weight of {equation!r} is a batch of matrices"
    if not contracted or sorted(out) != sorted(others + own):
        return f"{equation!r} is no matrix product"
    return first, second, in_x, in_w, out, contracted, own, others


def einsum(m: Match, g: Builder) -> Node:
    source, weight, in_x, in_w, out, contracted, own, others = einsum_plan(m)
    size = dict(zip(in_w, val(weight).shape, strict=True))
    N, K = (math.prod(size[i] for i in group) for group in (own, contracted))
    weight = g.call(aten.permute.default, weight, [in_w.index(i) for i in own + contracted])
    weight = g.call(aten.reshape.default, weight, [N, K])
    source = g.call(aten.permute.default, source, [in_x.index(i) for i in others + contracted])
    if len(contracted) != 1:
        source = g.call(aten.flatten.using_ints, source, len(others), -1)
    y = linear(g, source, weight)
    if len(own) != 1:
        y = g.call(aten.unflatten.int, y, -1, [size[i] for i in own]) if own else g.call(aten.squeeze.dim, y, -1)
    return g.call(aten.permute.default, y, [(others + own).index(i) for i in out])


# --- the table ---------------------------------------------------------------------------------------------

conv = dict(where=(only_w_is_constant, pointwise))
stride, padding, dilation, groups = Any("stride"), Any("padding"), Any(), Any("groups")

# fmt: off
TO_LINEAR = [
    Rule("mm", P(aten.mm, x, w, where=only_w_is_constant), lambda m, g: linear(g, m.x, transposed(g, m.w))),
    Rule("mm, weight on the left", P(aten.mm, w, x, where=only_w_is_constant),
         lambda m, g: transposed(g, linear(g, transposed(g, m.x), m.w))),
    Rule("addmm, as in GPT-2's Conv1D", P(aten.addmm, b, x, w, where=only_w_is_constant),
         lambda m, g: biased(g, m.x, transposed(g, m.w), m.b)),
    Rule("addmm, weight on the left", P(aten.addmm, b, w, x, where=only_w_is_constant),
         lambda m, g: g.call(aten.add.Tensor, transposed(g, linear(g, transposed(g, m.x), m.w)), m.b)),
    Rule("matmul", P(aten.matmul, x, w, where=only_w_is_constant), lambda m, g: linear(g, m.x, transposed(g, m.w))),
    Rule("matmul by a vector", P(aten.matmul, x, vector, where=only_w_is_constant), vector_product),
    Rule("matmul of a vector, weight on the left", P(aten.matmul, w, x, where=(
            only_w_is_constant, lambda m: val(m.x).ndim == 1 or "x is no vector")),
         lambda m, g: linear(g, m.x, m.w)),
    Rule("matmul, weight on the left", P(aten.matmul, w, x, where=(only_w_is_constant, at_least_2d)),
         lambda m, g: transposed(g, linear(g, transposed(g, m.x), m.w))),
    Rule("matmul, one matrix for the whole batch", P(aten.matmul, x, batch, where=(
            only_w_is_constant, same_matrix_for_all, lambda m: val(m.x).ndim >= 3 or "x is no batch")),
         lambda m, g: linear(g, m.x, transposed(g, matrix(g, m.w)))),
    Rule("bmm, one matrix for the whole batch", P(aten.bmm, x, batch, where=(only_w_is_constant, same_matrix_for_all)),
         lambda m, g: linear(g, m.x, transposed(g, matrix(g, m.w)))),
    *(Rule(f"{op}, a matrix expanded over the batch", P(op, x, P(aten.expand, Weight("w"), Any(), Any()), where=(
            only_w_is_constant, same_matrix_for_all, lambda m: val(m.w).ndim >= 2 or "an expanded vector")),
           lambda m, g: linear(g, m.x, transposed(g, matrix(g, m.w))))
      for op in (aten.bmm, aten.matmul)),
    Rule("baddbmm, one matrix for the whole batch", P(aten.baddbmm, b, x, batch, where=(
            only_w_is_constant, same_matrix_for_all)),
         lambda m, g: biased(g, m.x, transposed(g, matrix(g, m.w)), m.b)),
    Rule("mv", P(aten.mv, w, x, where=only_w_is_constant), lambda m, g: linear(g, m.x, m.w)),
    Rule("mv by a constant vector", P(aten.mv, x, vector, where=only_w_is_constant), vector_product),
    Rule("addmv", P(aten.addmv, b, w, x, where=only_w_is_constant), lambda m, g: biased(g, m.x, m.w, m.b)),
    Rule("inner", P(aten.inner, x, w, where=only_w_is_constant), lambda m, g: linear(g, m.x, m.w)),
    Rule("einsum", P(aten.einsum, Any("equation"), Any("operands"), where=(
            lambda m: len(m.operands) == 2 or f"an einsum of {len(m.operands)} operands", is_linear_einsum)),
         einsum),
    *(Rule(f"1×1 {op}", P(op, x, Weight("w", ndim=n + 2), Maybe(b), stride, padding, dilation, groups, **conv),
           convolution)
      for n, op in ((1, aten.conv1d), (2, aten.conv2d), (3, aten.conv3d))),
]
# fmt: on

# Every operator that multiplies matrices, and the positions of its operands among its arguments (a list counts whole).
MATMULS = {
    aten.linear: (0, 1), aten.mm: (0, 1), aten.addmm: (1, 2), aten.matmul: (0, 1), aten.bmm: (0, 1),
    aten.baddbmm: (1, 2), aten.addbmm: (1, 2), aten.mv: (0, 1), aten.addmv: (1, 2), aten.inner: (0, 1),
    aten.einsum: (1,), aten.tensordot: (0, 1), aten.chain_matmul: (0,), aten.linalg_multi_dot: (0,),
    aten.bilinear: (2,), aten._grouped_mm: (0, 1), aten._scaled_mm: (0, 1), aten._int_mm: (0, 1),
    aten.conv1d: (1,), aten.conv2d: (1,), aten.conv3d: (1,), aten.convolution: (1,),
    aten.lstm: (2,), aten.gru: (2,), aten.rnn_tanh: (2,), aten.rnn_relu: (2,),
    aten._native_multi_head_attention: (6, 8), aten._transformer_encoder_layer_fwd: (3, 5, 12, 14),
}  # fmt: skip

# Operators that pick rows of a constant by data: what they return is still a weight (an expert bank).
SELECTORS = {aten.index, aten.index_select, aten.gather, aten.take_along_dim}

VIEWS = {aten.view, aten.reshape, aten.transpose, aten.permute, aten.t, aten.squeeze, aten.unsqueeze, aten.slice,
         aten.select, aten.to, aten.contiguous, aten.clone, aten.expand, aten.repeat}  # fmt: skip


def weight_operands(node: Node) -> list[Node]:
    """The operands of a matrix product that are weights: constants, or else constants seen through data (an expert
    bank) or through dynamic sizes (an expanded matrix).

    Empty if the node multiplies no matrices, if all operands are constants (that is folding, not a linear), if
    the contraction has one element (that is scaling), and for convolutions whose kernel is no point.
    """
    positions = MATMULS.get(packet(node.target)) if node.op == "call_function" else None
    if positions is None:
        return []
    given = arguments(node)
    operands = pytree.tree_leaves([given[p] for p in positions if p < len(given)])
    operands = [v for v in operands if isinstance(v, Node) and isinstance(v.meta.get("val"), torch.Tensor)]
    operands = [v for v in operands if val(v).ndim > 0]
    constants = [v for v in operands if constant(v)]
    if len(positions) > 1 and len(constants) == len(operands):
        return []
    weights = constants or [v for v in operands if underlying(v) is not None]
    if packet(node.target) in (aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution):
        return weights if all(k == 1 for v in weights for k in val(v).shape[2:]) else []
    length = val(operands[0]).shape[-1] if len(positions) == 2 else None
    return [] if isinstance(length, int) and length == 1 else weights


def underlying(node: Node) -> str | None:
    """How an operand that is no constant comes from one nevertheless: "picked by data", "expanded", or not (None)."""
    if node.op != "call_function" or not node.all_input_nodes or not isinstance(arguments(node)[0], Node):
        return None
    source = arguments(node)[0]
    if packet(node.target) in SELECTORS:
        return "picked by data" if constant(source) else None
    if packet(node.target) in VIEWS:
        return "expanded" if constant(source) else underlying(source)
    return None
