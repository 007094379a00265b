"""Token by token with a cache in use: the same losses as all at once, and what rounding the cache changes."""

import pytest
import torch
import torch.nn.functional as F

from bench.cache_quality import PASSAGE, CachedModel, contender, losses, recall, recall_texts

transformers = pytest.importorskip("transformers")


@pytest.fixture
def model():
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 4, 5, 12])
def test_losses_are_those_of_all_tokens_at_once(model, chunk):
    ids = torch.randint(97, (3, 12))
    expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(losses(CachedModel(model, 3, 16), ids, chunk).flatten(), expected, rtol=1e-4, atol=1e-4)


def test_a_recipe_rounds_what_is_in_the_cache(model):
    ids = torch.randint(97, (3, 12))
    exact, whole = contender(model, "bf16", 3, 16, "cpu")
    expected = losses(exact, ids)
    by_token = "kv4(keys=token)"
    for recipe, size, furthest in (("kv8", 2 * 2 * 2 * 36, 0.05), (by_token, 2 * 2 * 2 * 20, 0.5)):
        step, found = contender(model, recipe, 3, 16, "cpu")
        assert found == size < whole
        assert 0 < (losses(step, ids) - expected).abs().max() < furthest


def test_tokens_of_a_chunk_are_not_rounded(model):
    """In the first chunk nothing is, and the first token of the second sees the cache."""
    ids = torch.randint(97, (2, 41))
    expected = losses(CachedModel(model, 2, 64), ids, 20)
    step, _ = contender(model, "kv4(keys=token)", 2, 64, "cpu", 20)
    found = losses(step, ids, 20)
    torch.testing.assert_close(found[:, :20], expected[:, :20], rtol=1e-4, atol=1e-4)
    assert (found[:, 20:] - expected[:, 20:]).abs().max() > 1e-3


def test_a_passage_comes_twice():
    ids = torch.arange(2 * 1024).view(2, 1024)
    texts = recall_texts(ids, 16)
    assert texts.shape == (2, 2 * PASSAGE + 16)
    assert torch.equal(texts[:, :PASSAGE], texts[:, -PASSAGE:]) and torch.equal(
        texts[:, :PASSAGE][0], ids[1, -PASSAGE:]
    )
    assert torch.equal(texts[:, PASSAGE:-PASSAGE], ids[:, :16])


def test_recall_is_of_the_second_occurrence():
    """By a step that counts on from a token there, and is wrong before."""
    ids = torch.arange(2 * 256).view(2, 256) % 97

    def step(token, position):
        ahead = 1 if position[0, 0] >= PASSAGE + 16 + PASSAGE // 4 - 1 else 5
        return F.one_hot((token + ahead) % 97, 97).float() * 50

    assert recall(step, ids, [16])[0] < 1e-3
    assert losses(step, recall_texts(ids, 16))[:, : -PASSAGE * 3 // 4].min() > 1
