"""What Hugging Face models need. Importing this imports no transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import InputError


def register_pytrees() -> None:
    """Lets cache objects of transformers, if that is imported, go in and out of captured graphs."""
    if "transformers" in sys.modules:
        from transformers.integrations.executorch import register_dynamic_cache_export_support

        register_dynamic_cache_export_support()


def load(folder: Path, dtype: torch.dtype | None, tokens: int) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a folder in eval mode, of the class that its config names, and example inputs: `tokens` token ids
    for a batch of two, or a batch of two images.

    Raises `InputError` if transformers is missing, or the folder holds no model that it knows.
    """
    try:
        import transformers
    except ImportError:
        raise InputError("a Hugging Face folder needs transformers: pip install aograph[hf]") from None
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        model = kind.from_pretrained(folder, dtype=dtype or "auto").eval()
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no model that transformers can load: {error}") from error
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return model, {name: torch.zeros(2, getattr(config, "num_channels", 3), size, size, dtype=model.dtype)}
    text = config.get_text_config()
    ids = torch.arange(2 * tokens).view(2, tokens) % text.vocab_size
    inputs: dict[str, Any] = {name: ids}
    return model, inputs | ({"use_cache": False} if hasattr(text, "use_cache") else {})
