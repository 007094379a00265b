import torch

from bench.random_model import random_model
from bench.vit_encoder import Attention, Block, Encoder, together, windows

CPU = torch.device("cpu")


def test_windows_hold_their_part_of_the_grid():
    x = torch.randn(2, 25, 3)
    found = windows(x, side=5, window=2)
    assert found.shape == (2 * 9, 4, 3)
    grid = x.view(2, 5, 5, 3)
    assert torch.equal(found[9 + 4], grid[1, 2:4, 2:4].reshape(4, 3))  # the middle of the second image
    assert torch.equal(found[2], torch.stack([grid[0, 0, 4], torch.zeros(3), grid[0, 1, 4], torch.zeros(3)]))
    assert torch.equal(together(found, 5, 2), x)


@torch.no_grad()
def test_tokens_of_a_window_attend_to_each_other_alone():
    block = Block(16, 2, side=4, window=2)
    x = torch.randn(1, 16, 16)
    y = block.attended(x).view(4, 4, 16)
    part = x.view(4, 4, 16)[2:, :2].reshape(1, 4, 16)
    torch.testing.assert_close(y[2:, :2].reshape(1, 4, 16), block.attn(part))


@torch.no_grad()
def test_attention_is_what_it_says():
    layer, x = Attention(16, 2), torch.randn(3, 5, 16)
    q, k, v = (part.view(3, 5, 2, 8).transpose(1, 2) for part in layer.qkv(x).chunk(3, -1))
    y = torch.softmax(q @ k.mT / 8**0.5, -1) @ v
    torch.testing.assert_close(layer(x), layer.proj(y.transpose(1, 2).reshape(3, 5, 16)))


def test_sizes_are_those_of_the_published_models():
    with torch.device("meta"):
        vit = Encoder(1280, 32, 16, side=16, patch=14, window=None)
        sam = Encoder(1280, 32, 16, side=64, patch=16, window=14)
    assert sum(p.numel() for p in vit.parameters()) == 630_764_800  # ViT-H/14 without its head
    assert [i for i, block in enumerate(sam.blocks) if block.window is None] == [7, 15, 23, 31]


@torch.no_grad()
def test_an_image_becomes_its_tokens():
    images = torch.randn(2, 3, 12, 12, dtype=torch.bfloat16)
    plain = random_model(lambda: Encoder(16, 2, 2, side=3, patch=4, window=None), CPU)
    windowed = random_model(lambda: Encoder(16, 4, 2, side=3, patch=4, window=2), CPU)
    assert plain(images).shape == (2, 10, 16)
    assert windowed(images).shape == (2, 9, 16)
