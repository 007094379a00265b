import torch

from bench.decode_step import HEAD, Attention, rotated


@torch.no_grad()
def test_a_step_attends_to_the_token_that_it_writes():
    """Against attention written out, over a window into which the token went."""
    torch.manual_seed(0)
    layer = Attention(512)
    keys, values = torch.randn(2, 2, layer.kv_heads, 8, HEAD)
    before, x = keys.clone(), torch.randn(2, 1, 512)
    turn = torch.ones(HEAD), torch.zeros(HEAD)  # by no angle
    y = layer(x, turn, torch.tensor([5]), keys, values)
    assert torch.equal(keys[:, 0, 5], layer.k_proj(x)[:, 0])
    rest = [i for i in range(8) if i != 5]
    assert torch.equal(keys[:, :, rest], before[:, :, rest])
    q = layer.q_proj(x).view(2, layer.heads, HEAD)
    weights = torch.softmax(q @ keys[:, 0].mT / HEAD**0.5, -1)
    torch.testing.assert_close(y, layer.o_proj((weights @ values[:, 0]).view(2, 1, -1)))


def test_keys_turn_with_the_position():
    half = HEAD // 2
    x, angles = torch.randn(1, 1, 1, HEAD), torch.rand(half)
    turned = rotated(x, angles.repeat(2).cos(), angles.repeat(2).sin())
    pair = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones(half), angles)
    torch.testing.assert_close(turned, torch.cat([pair.real, pair.imag], -1))
