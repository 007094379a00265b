"""Perplexity of a causal language model on a text, by windows that do not overlap."""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 512


def python_topics() -> str:
    """A corpus that every Python has: the reference texts of `help()`."""
    return "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def tokens_of(folder: Path, text: str, limit: int | None = None) -> Tensor:
    """The token ids of a text by the tokenizer of a Hugging Face folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0, :limit]


@torch.no_grad()
def perplexity(model: Callable, ids: Tensor, device: torch.device | str = "cpu", batch: int = 1) -> float:
    """exp of the mean negative log-likelihood of each window's tokens but the first; ids that fill no batch of
    windows are left out."""
    ids = ids[: len(ids) // (WINDOW * batch) * WINDOW * batch].view(-1, batch, WINDOW).to(device)
    total = sum(
        F.cross_entropy(
            model(input_ids=each, use_cache=False).logits[:, :-1].flatten(0, 1).float(), each[:, 1:].flatten(),
            reduction="sum",
        ).item()
        for each in ids
    )  # fmt: skip
    return math.exp(total / (ids.shape[0] * batch * (WINDOW - 1)))
