"""Sets the cuDNN flag of norms as the user has it: `torch.export` traces with cuDNN off and writes that down."""

from __future__ import annotations

import torch

from ..patterns.language import packet
from ..program import Program
from .base import Pass, Stage

aten = torch.ops.aten
NORMS = {aten.layer_norm, aten.batch_norm, aten.instance_norm, aten.group_norm}


class RestoreCudnn(Pass):
    """The last argument of these operators, `cudnn_enable(d)`, becomes the process's own setting."""

    name = "restore_cudnn"
    stage = Stage.NORMALIZE

    def run(self, program: Program, context) -> int:
        enabled, changed = torch.backends.cudnn.enabled, 0
        for node in program.graph.nodes:
            if packet(node.target) in NORMS:
                flag = len(node.target._schema.arguments) - 1
                if len(node.args) > flag and node.args[flag] is not enabled:
                    node.update_arg(flag, enabled)
                    changed += 1
        return changed
