"""What Hugging Face models need: nothing here imports transformers unless the user already has."""

import sys


def register_pytrees() -> None:
    """Lets cache objects of transformers go in and out of captured graphs."""
    if "transformers" in sys.modules:
        from transformers.integrations.executorch import register_dynamic_cache_export_support

        register_dynamic_cache_export_support()
