"""A Llama of the shape of Llama-3-8B with random weights, on any device, meta included."""

from __future__ import annotations

import torch
from torch import nn


def llama_8b(device: str, layers: int = 32, width: int = 4096) -> nn.Module:
    """bf16, eval mode. Linear weights are normal with deviation 0.02, norms are 1.

    width: the hidden size, a multiple of 512; all sizes but that of a head, 128, go with it.
    """
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128256 * width // 4096, hidden_size=width, intermediate_size=14336 * width // 4096,
        num_hidden_layers=layers, num_attention_heads=width // 128, num_key_value_heads=width // 512,
        max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    if device == "meta":
        return model
    rope = type(model.model.rotary_emb)(config)
    model.to_empty(device=device)
    model.model.rotary_emb = rope.to(device)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02) if parameter.ndim > 1 else parameter.data.fill_(1)
    return model
