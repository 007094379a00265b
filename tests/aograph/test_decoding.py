import copy

import pytest
import torch
from torch import nn

from aograph import InputError
from aograph.decoding import (
    CacheShape,
    NoSteps,
    Sampling,
    cache_shapes,
    check_step,
    default_length,
    generate,
    masks,
    prompts_of,
    step_of,
)
from aograph.huggingface import cache_argument
from tests.models.zoo import build, ids, sliding


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_steps_at_their_own_positions_give_what_the_model_does(name):
    model, _ = build(name)
    shapes = cache_shapes(model, 16)
    step = step_of(model, len(shapes), 16)
    cache = [tensor for shape in shapes for tensor in shape.empty(2, 16, torch.device("cpu"))]
    texts = [ids(1, 9), ids(1, 5) + 7]
    with torch.no_grad():
        for row, text in enumerate(texts):
            mine = [tensor[row : row + 1] for tensor in cache]
            length = text.shape[1] - 1
            step.forward(text[:, :length], torch.arange(length)[None], *mine)
        last = torch.cat([text[:, -1:] for text in texts])
        logits = step.forward(last, torch.tensor([[8], [4]]), *cache)
        for row, text in enumerate(texts):
            expected = model(text, use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)


def test_a_step_shares_the_names_and_tensors_of_its_model():
    model, _ = build("llama")
    step = step_of(model, 2, 16)
    assert dict(step.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert all(a is b for a, b in zip(step.parameters(), model.parameters(), strict=True))
    assert "forward" not in vars(model)


def test_shapes_on_meta():
    model, _ = build("llama")
    assert cache_shapes(copy.deepcopy(model).to("meta"), 16) == [CacheShape(2, 64, 64, torch.float32)] * 2


def changed(name, **config):
    model, _ = build(name)
    model.config.update(config)
    return model


class Deaf(nn.Module):
    """A model that looks at no positions."""

    def __init__(self):
        super().__init__()
        self.inner, _ = build("llama")

    def forward(self, position_ids=None, past_key_values=None, **inputs):
        return self.inner(**inputs, **{cache_argument(self.inner.forward): past_key_values})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.Linear(2, 2), "is no language model"),
        (lambda: build("bert")[0], "is no language model"),
        (lambda: changed("llama", layer_types=["full_attention", "linear_attention"]), "type linear_attention"),
    ],
)
def test_models_without_steps_say_why(make, message):
    with pytest.raises(NoSteps, match=message):
        cache_shapes(make(), 16)


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "gpt_oss", "mistral", "qwen2"])
def test_steps_of_layers_that_slide(name):
    """Each over its own tokens, behind the edge of the window; the cache holds all."""
    model, text = sliding(name, 5), ids(1, 12)
    step, positions = step_of(model, 2, 16), torch.arange(12)[None]
    cache = [tensor for shape in cache_shapes(model, 16) for tensor in shape.empty(1, 16, torch.device("cpu"))]
    assert model.config.sliding_window == 5
    with torch.no_grad():
        expected = model(text, use_cache=False).logits[:, -1]
        wide = sliding(name, 16)(text, use_cache=False).logits[:, -1]
        for each in (slice(0, 7), slice(7, 11), slice(11, 12)):
            logits = step.forward(text[:, each], positions[:, each], *cache)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (wide - expected).norm() > 0.01 * expected.norm()


def test_a_wide_window_hides_nothing():
    found = [masks(sliding("gemma3", window), torch.tensor([[4]]), 16) for window in (16, 3)]
    assert isinstance(found[0], torch.Tensor) and torch.equal(found[0], found[1]["full_attention"])
    assert found[1]["sliding_attention"].nonzero()[:, -1].tolist() == [2, 3, 4]


def test_a_model_that_takes_no_mask_by_layer():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.inner = sliding("gemma3", 5).config, sliding("mistral", 5)

        def forward(self, attention_mask=None, **inputs):
            return self.inner(attention_mask=attention_mask, **inputs)

    model = Other()
    with pytest.raises(NoSteps, match="it does not run with a static cache"):
        check_step(model, cache_shapes(model.inner, 16), torch.device("cpu"))
    assert model.config.sliding_window == 5


def test_a_model_that_does_not_follow_positions():
    model = Deaf()
    shapes = cache_shapes(model.inner, 16)
    with pytest.raises(NoSteps, match="computes something else"):
        check_step(model, shapes, torch.device("cpu"))


def test_the_default_length():
    assert default_length(build("gpt2")[0]) == 64 and default_length(nn.Linear(2, 2)) == 2048


# --- sampling ----------------------------------------------------------------------------------------------


def drawn(sampling, logits, count=2000):
    generator = torch.Generator().manual_seed(0)
    return sampling.pick(logits.expand(count, -1), generator).bincount(minlength=logits.shape[-1]) / count


def test_the_likeliest():
    assert Sampling().pick(torch.tensor([[0.1, 3, 2], [5, 3, 2]])).tolist() == [1, 0]


def test_draws_follow_the_temperature():
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits[0] / temperature).softmax(-1)
        found = drawn(Sampling(True, temperature), logits)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


def test_only_the_k_likeliest():
    found = drawn(Sampling(True, top_k=2), torch.tensor([[1.0, 2.0, 0.0, 1.5]]))
    assert (found > 0).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    "top_p, expected", [(0.5, [1]), (0.51, [0, 1]), (0.79, [0, 1]), (0.81, [0, 1, 2]), (1, [0, 1, 2, 3])]
)
def test_only_the_likeliest_with_that_probability(top_p, expected):
    logits = torch.tensor([[0.3, 0.5, 0.15, 0.05]]).log()
    assert drawn(Sampling(True, top_p=top_p), logits).nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize(
    "bad", [{"temperature": 0.0}, {"temperature": 1e-30}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}]
)
def test_settings_that_draw_nothing(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        Sampling(True, **bad)


# --- the loop ----------------------------------------------------------------------------------------------


def successor(rows):
    """A model that answers n + 1 to n, and checks that each token comes at the next position of its row."""
    texts = [[] for _ in range(rows)]

    def logits(token):
        return torch.nn.functional.one_hot(token + 1, 50).float()

    def prefill(row, prompt):
        texts[row] = prompt.tolist()
        return logits(prompt[-1:])

    def decode(tokens, positions):
        for row, text in enumerate(texts):
            if text:
                assert int(positions[row]) == len(text)
                text.append(int(tokens[row]))
        return logits(tokens[:, 0])

    return prefill, decode


def test_rows_of_different_lengths():
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([7])]
    found = generate(*successor(3), prompts, 3, 4, Sampling(), [], 0, None, None)
    assert found.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]


def test_ends_and_padding():
    said = []
    prompts = [torch.tensor([1]), torch.tensor([7])]
    on_token = lambda row, token: said.append((row, token))  # noqa: E731
    found = generate(*successor(2), prompts, 2, 9, Sampling(), [3, 10], 49, None, on_token)
    assert found.tolist() == [[2, 3, 49], [8, 9, 10]]
    assert said == [(0, 2), (1, 8), (0, 3), (1, 9), (1, 10)]


def test_prompts_without_their_padding():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert [p.tolist() for p in prompts_of(torch.tensor([[9, 1, 2], [3, 4, 5]]), mask)] == [[1, 2], [3, 4, 5]]
    with pytest.raises(InputError, match="on the left"):
        prompts_of(torch.ones(1, 3), torch.tensor([[1, 0, 1]]))
