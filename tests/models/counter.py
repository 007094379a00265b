"""An independent count of matrix products on weights: the eager model, watched at the dispatcher."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
PRODUCTS = {aten.mm: (0, 1), aten.addmm: (1, 2), aten.bmm: (0, 1), aten.baddbmm: (1, 2), aten.mv: (0, 1),
            aten.addmv: (1, 2), aten._grouped_mm: (0, 1), aten.convolution: (0, 1)}  # fmt: skip
PICKS = {aten.index, aten.index_select, aten.gather}


class CountProducts(TorchDispatchMode):
    """Counts products of an activation and a weight. What is computed from weights alone, or picked from one by data,
    is a weight; a product over one element is a scaling; a convolution counts if its kernel is a point."""

    def __init__(self, model):
        super().__init__()
        self.weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()] if t.ndim}
        self.alive = []  # so that no address is used twice
        self.count = 0

    def is_weight(self, value):
        return value.untyped_storage().data_ptr() in self.weights

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if packet in PRODUCTS:
            left, right = (args[i] for i in PRODUCTS[packet])
            point = packet is not aten.convolution or set(right.shape[2:]) == {1}
            inner = right.shape[1] if packet is aten.convolution else left.shape[-1]
            if self.is_weight(left) != self.is_weight(right) and point and inner != 1:
                self.count += 1
        elif tensors and (all(map(self.is_weight, tensors)) or (packet in PICKS and self.is_weight(args[0]))):
            for out in tree_leaves(result):
                if isinstance(out, torch.Tensor) and out.ndim:
                    self.weights.add(out.untyped_storage().data_ptr())
                    self.alive.append(out)
        return result


def count_products(model, inputs):
    """How many products on weights one call of the model does."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), CountProducts(model) as counter:
            model(**inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return counter.count
