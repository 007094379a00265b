"""Models with random weights, made where they stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def random_model(make: Callable[[], Model], device: torch.device) -> Model:
    """What `make` makes, in bf16 on the device, for inference. The same for a seed.

    Weights and biases are normal with deviation 0.02, the weights of norms are 1. It may have no buffers.
    """
    with torch.device("meta"):
        model = make().bfloat16().eval().requires_grad_(False)
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        is_norm = parameter.ndim == 1 and not name.endswith("bias")
        parameter.fill_(1) if is_norm else parameter.normal_(0, 0.02)
    return model
