import pytest
import torch
from aograph.patterns.language import arguments
from torch import nn

from tests.programs import apply, find, outputs, program_of

NORMS = {
    "aten.layer_norm": (nn.LayerNorm(8), torch.randn(2, 3, 8)),
    "aten.group_norm": (nn.GroupNorm(2, 8), torch.randn(2, 8, 3)),
    "aten.batch_norm": (nn.BatchNorm2d(8), torch.randn(2, 8, 3, 3)),
    "aten.instance_norm": (nn.InstanceNorm2d(8), torch.randn(2, 8, 3, 3)),
}


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("operator, model, x", [(name, *made) for name, made in NORMS.items()], ids=NORMS.keys())
def test_the_flag_is_the_users_own(operator, model, x, enabled, monkeypatch):
    program = program_of(model, x)
    expected = outputs(program, x)
    before = arguments(find(program, operator))[-1]
    monkeypatch.setattr(torch.backends.cudnn, "enabled", enabled)
    assert apply(program, "restore_cudnn") == [int(before is not enabled)]
    assert arguments(find(program, operator))[-1] is enabled
    assert apply(program, "restore_cudnn") == [0]
    torch.testing.assert_close(outputs(program, x), expected)
