"""Whole models at toy size, of two layers: (model in eval mode, example inputs as keyword arguments)."""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

MINI = Path(__file__).parents[2] / "models" / "mini"


def ids(batch=2, length=12, vocabulary=128):
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def llama(use_cache, layers=2):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.float32)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    return model, {"input_ids": ids(), "use_cache": use_cache}


def bert(layers):
    import transformers

    config = transformers.BertConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=128
    )
    return transformers.BertForSequenceClassification(config), {"input_ids": ids()}


def gpt2(layers):
    import transformers

    config = transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=layers, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids(), "use_cache": False}


def vit(layers):
    import transformers

    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=128, image_size=32,
        patch_size=8,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def t5_encoder(layers):
    import transformers

    config = transformers.T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=layers, num_heads=4)
    return transformers.T5EncoderModel(config), {"input_ids": ids()}


class Experts(nn.Module):
    """A mixture of experts as in Mixtral: a router, the two best of four gated experts for each token."""

    def __init__(self, width=64, hidden=128, experts=4):
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {
                    "w1": nn.Linear(width, hidden, bias=False),
                    "w2": nn.Linear(hidden, width, bias=False),
                    "w3": nn.Linear(width, hidden, bias=False),
                }
            )
            for _ in range(experts)
        )

    def forward(self, x):
        weight, index = self.router(x).softmax(-1).topk(2, dim=-1)
        share = torch.zeros(*x.shape[:-1], len(self.experts), dtype=x.dtype, device=x.device)
        share = share.scatter(-1, index, weight / weight.sum(-1, keepdim=True))
        y = torch.zeros_like(x)
        for i, e in enumerate(self.experts):
            y = y + share[..., i, None] * e["w2"](F.silu(e["w1"](x)) * e["w3"](x))
        return y


class Mixture(nn.Module):
    def __init__(self, layers, width=64):
        super().__init__()
        self.embedding = nn.Embedding(128, width)
        self.layers = nn.ModuleList(Experts(width) for _ in range(layers))
        self.head = nn.Linear(width, 128, bias=False)

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(F.rms_norm(x, x.shape[-1:]))
        return self.head(x)


def mixture(layers):
    return Mixture(layers), {"input_ids": ids()}


def mixtral(layers):
    """The one of transformers: its experts are banks [E, N, K] from which data picks."""
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    config._experts_implementation = "batched_mm"
    return transformers.MixtralForCausalLM(config), {"input_ids": ids(), "use_cache": False}


def transformer_encoder(layers):
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False), {"src": torch.randn(2, 12, 64)}


class Functional(nn.Module):
    """Linears in their disguises, none of them an nn.Linear."""

    def __init__(self, width=64):
        super().__init__()
        self.first = nn.Parameter(torch.randn(width, 128) / 8)
        self.second = nn.Parameter(torch.randn(width, 128) / 8)
        self.both = nn.Parameter(torch.randn(3 * width, width) / 8)
        self.heads = nn.Parameter(torch.randn(width, 4, 16) / 8)
        self.back = nn.Parameter(torch.randn(width, 4, 16) / 8)
        self.vector = nn.Parameter(torch.randn(width) / 8)
        self.bias = nn.Parameter(torch.randn(128))

    def forward(self, x):
        y = torch.addmm(self.bias, x.flatten(0, 1), self.first).relu()
        y = F.linear(y, self.second).unflatten(0, x.shape[:2])
        q, k = F.linear(y, self.both[:64]), y @ self.both[64:128].T
        v = torch.bmm(y, self.both[128:].t().expand(y.shape[0], -1, -1))
        y = q * k + v
        y = torch.einsum("bsd,dhe->bshe", y, self.heads).flatten(2)
        y = y + torch.einsum("bshe,dhe->bsd", y.unflatten(-1, (4, 16)), self.back)
        return y, y @ self.vector, self.both[:64] @ y.transpose(1, 2)


def functional(_):
    return Functional(), {"x": torch.randn(2, 12, 64)}


def convnet(_):
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 1),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.Conv2d(64, 64, 1, stride=2, bias=False),
        nn.Conv2d(64, 64, 3, groups=64, padding=1),
        nn.Conv2d(64, 32, 1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    return net, {"input": torch.randn(2, 3, 16, 16)}


MODELS = {
    "llama": partial(llama, False), "llama_with_cache": partial(llama, True), "bert": bert, "gpt2": gpt2, "vit": vit,
    "t5_encoder": t5_encoder, "mixture": mixture, "mixtral": mixtral, "transformer_encoder": transformer_encoder,
    "functional": functional, "convnet": convnet,
}  # fmt: skip


def build(name, layers=2):
    """A model of the zoo, the same weights every time."""
    torch.manual_seed(0)
    model, inputs = MODELS[name](layers)
    return model.eval(), inputs


def sliding(name, window):
    """A language model of which some layers, of Mistral all, slide over `window` tokens: Gemma 3; Gemma 2, with a
    softcap; GPT-OSS, with sinks; Mistral; Qwen 2."""
    import transformers

    kinds = {
        "gemma3": (transformers.Gemma3TextConfig, {"layer_types": ["sliding_attention", "full_attention"]}),
        "gemma2": (transformers.Gemma2Config, {"query_pre_attn_scalar": 32, "attn_implementation": "eager"}),
        "gpt_oss": (transformers.GptOssConfig, {
            "num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "batched_mm",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        "mistral": (transformers.MistralConfig, {}),
        "qwen2": (transformers.Qwen2Config, {"use_sliding_window": True, "max_window_layers": 1}),
    }  # fmt: skip
    kind, settings = kinds[name]
    torch.manual_seed(0)
    config = kind(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        intermediate_size=64, sliding_window=window, max_position_embeddings=128, **settings,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers if name == "gpt_oss" else ():
        nn.init.normal_(layer.self_attn.sinks)
    return model
