import argparse

import torch

from bench.vit import VitWorker

OPTIONS = argparse.Namespace(device="cpu", autotune=[], width=80, layers=2)


def test_large_images_are_encoded_in_windows():
    found = VitWorker("bf16", OPTIONS)
    model, (images,) = found.made("28x3")
    assert images.shape == (3, 3, 28, 28) and images.dtype is torch.bfloat16
    assert model.pos_embed.shape == (1, 2 * 2 + 1, 80) and {block.window for block in model.blocks} == {None}
    model, (images,) = found.made("512X1")
    assert model.pos_embed.shape == (1, 32 * 32, 80)
    assert images.shape == (1, 3, 512, 512)


def test_images_are_counted():
    assert VitWorker("bf16", OPTIONS).rates("224x64", 0.5) == {"images/s": 128.0}
