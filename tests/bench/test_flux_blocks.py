import pytest
import torch
import torch.nn.functional as F

from bench import flux_blocks
from bench.flux_blocks import HEAD, DoubleBlock, FluxBlocks, SingleBlock, attention, rotated, turns

CPU = torch.device("cpu")


def test_the_size_is_that_of_the_published_model():
    with torch.device("meta"):
        found = sum(p.numel() for p in FluxBlocks(3072, 19, 38).parameters())
    # FLUX.1-dev has 11,901,408,320: image, text; time, prompt and guidance, two layers each; the last layer's two
    around = [
        (64, 3072),
        (4096, 3072),
        (256, 3072),
        (768, 3072),
        (256, 3072),
        *[(3072, 3072)] * 3,
        (3072, 6144),
        (3072, 64),
    ]
    assert found + sum(a * b + b for a, b in around) == 11_901_408_320


def test_pairs_turn_with_the_place_of_a_patch():
    cos, sin = turns(text=2, side=3, device=CPU)
    assert cos.shape == sin.shape == (2 + 9, HEAD // 2)
    assert torch.equal(cos[:2], torch.ones(2, HEAD // 2))  # text is not turned
    x = torch.randn(1, 1, 11, HEAD)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    torch.testing.assert_close(rotated(x, (cos, sin)), torch.view_as_real(turned).flatten(-2))
    # the last patch is in row 2 and column 2: the first pair of either part turns by as many radians
    angles = torch.atan2(sin[-1], cos[-1])
    assert angles[[0, 8, 36]].tolist() == pytest.approx([0, 2, 2], abs=1e-6)


def parts(text, image):
    torch.manual_seed(0)
    return torch.randn(1, image, HEAD), torch.randn(1, text, HEAD), torch.randn(1, HEAD)


@torch.no_grad()
def test_streams_of_a_double_block_meet_in_attention_alone(monkeypatch):
    block, (image, text, vector) = DoubleBlock(HEAD), parts(3, 4)
    turn = turns(3, 2, CPU)
    of_both, _ = block(image, text, vector, turn)
    other, _ = block(image, torch.randn_like(text), vector, turn)
    assert not torch.allclose(of_both, other)
    monkeypatch.setattr(flux_blocks, "attention", lambda q, k, v, turn: v.transpose(1, 2).flatten(2))  # to itself
    alone, _ = block(image, text, vector, turn)
    still, _ = block(image, text * 2, vector, turn)
    assert torch.equal(alone, still)
    shift, scale, gate, shift2, scale2, gate2 = block.img.mod.lin(F.silu(vector))[:, None].chunk(6, -1)
    norm = torch.nn.LayerNorm(HEAD, elementwise_affine=False, eps=1e-6)
    value = block.img.attn.qkv(norm(image) * (1 + scale) + shift)[..., -HEAD:]
    x = image + gate * block.img.attn.proj(value)
    torch.testing.assert_close(alone, x + gate2 * block.img.mlp(norm(x) * (1 + scale2) + shift2))


@torch.no_grad()
def test_a_single_block_is_attention_beside_an_mlp():
    block, (x, _, vector) = SingleBlock(HEAD), parts(0, 4)
    turn = turns(0, 2, CPU)
    shift, scale, gate = block.modulation.lin(F.silu(vector))[:, None].chunk(3, -1)
    inner = block.pre_norm(x) * (1 + scale) + shift
    first, second = block.linear1, block.linear2
    q, k, v = (part[:, None] for part in F.linear(inner, first.weight[: 3 * HEAD], first.bias[: 3 * HEAD]).chunk(3, -1))
    y = attention(block.norm.query_norm(q), block.norm.key_norm(k), v, turn)
    mlp = F.gelu(F.linear(inner, first.weight[3 * HEAD :], first.bias[3 * HEAD :]), approximate="tanh")
    both = F.linear(y, second.weight[:, :HEAD]) + F.linear(mlp, second.weight[:, HEAD:], second.bias)
    torch.testing.assert_close(block(x, vector, turn), x + gate * both)


@torch.no_grad()
def test_the_image_comes_out():
    model, (image, text, vector) = FluxBlocks(HEAD, 1, 1), parts(3, 4)
    assert model(image, text, vector, *turns(3, 2, CPU)).shape == image.shape
