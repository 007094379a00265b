"""What recipes cost in accuracy: perplexity of Hugging Face models on texts.

    python -m bench.quality models/mini [FOLDER …] [--text FILE …] [--tokens 65536] [--recipes …] [--device cuda]

Without --text, the help texts of this Python. Each model in fp32 and in bf16 as it is, then in bf16 under each recipe;
the last column of each text is the change against bf16. Recipes that need statistics are calibrated on --calibration
tokens of --calibration-text, by default of the help texts behind the tokens that are tested.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tabulate import tabulate

import aograph

from .perplexity import WINDOW, perplexity, python_topics, tokens_of

RECIPES = [f"int8wo(algorithm={a})" for a in ("minmax", "mse")] + [
    f"int4wo(group_size={g}, algorithm={a})" for g in (32, 64, 128) for a in ("minmax", "mse")
]
RECIPES += ["int8dq", "int8dq(mapping=asymmetric)"]
RECIPES += ["float8wo"] + [f"float8dq(granularity={g})" for g in ("row", "tensor", "block")]
RECIPES += [f"{scheme}(method={m})" for scheme in ("sparse24", "int8dq-sparse24") for m in ("magnitude", "wanda")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", nargs="*", type=Path, default=[])
    parser.add_argument("--tokens", type=int, default=65536, help="of each text")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--calibration", type=int, default=16384, help="tokens, in windows of 512")
    parser.add_argument("--calibration-text", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    import transformers

    texts = {path.name: path.read_text() for path in options.text} or {"pydoc_data.topics": python_topics()}
    rows = []
    for folder in options.models:
        ids = {name: tokens_of(folder, text, options.tokens) for name, text in texts.items()}
        behind = options.tokens if options.calibration_text is None else 0
        calibration = options.calibration_text.read_text() if options.calibration_text else python_topics()
        seen = tokens_of(folder, calibration, behind + options.calibration)[behind:]
        seen = seen[: len(seen) // (4 * WINDOW) * 4 * WINDOW].view(-1, 4, WINDOW)
        batches = [{"input_ids": each, "use_cache": False} for each in seen]
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(folder, dtype=torch.bfloat16).eval().to(options.device)
        example = {"input_ids": torch.zeros(4, 512, dtype=torch.int64, device=options.device), "use_cache": False}
        base: dict[str, float] = {}
        for name in ("fp32", "bf16", *options.recipes):
            if name == "fp32":
                contender, size = (
                    load(folder, dtype=torch.float32).eval().to(options.device),
                    4 * model.num_parameters(),
                )
            elif name == "bf16":
                contender, size = model, 2 * model.num_parameters()
            else:
                recipe = aograph.Recipe.of(name)
                if any(rule.scheme.calibrated for rule in recipe.rules):
                    recipe = aograph.calibrate(model, recipe, batches, progress=False)
                contender = aograph.optimize(model, recipe, example, compile=False, progress=False)
                size = contender.report.bytes_after
            row = [folder.name, name, aograph.report.megabytes(size)]
            for text, tokens in ids.items():
                found = perplexity(contender, tokens, options.device, batch=4)
                if name == "bf16":
                    base[text] = found
                row += [f"{found:.4f}", f"{found / base[text] - 1:+.2%}" if text in base else ""]
            rows.append(row)
            print(*row, flush=True)
    print(
        tabulate(rows, ["model", "weights", "size", *(h for t in texts for h in (t, "vs bf16"))], disable_numparse=True)
    )
    print(f"{options.tokens} tokens of each text, windows of 512; torch {torch.__version__}, {options.device}")


if __name__ == "__main__":
    main()
