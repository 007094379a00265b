"""The main job on the bundled model: optimize it, look at the report, and measure what changed.

`make demo` sets up and runs this; it uses a GPU if there is one.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tabulate import tabulate

import aograph
from aograph.report import megabytes
from bench.perplexity import perplexity, python_topics, tokens_of

FOLDER = Path(__file__).parent / "models" / "mini"
PROMPT = "The for statement is used to"
NEW_TOKENS = 48


@torch.no_grad()
def generate(model, prompt: torch.Tensor) -> torch.Tensor:
    """Greedy decoding without a cache: for each token all of a window, in which what is not written yet is 0."""
    start = prompt.shape[1]
    ids = F.pad(prompt, (0, NEW_TOKENS))
    for end in range(start, start + NEW_TOKENS):
        ids[:, end] = model(input_ids=ids, use_cache=False).logits[:, end - 1].argmax(-1)
    return ids


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16).eval().to(device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    ids = tokens_of(FOLDER, python_topics(), limit=20 * 512)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids.to(device)
    example = {"input_ids": ids[None, :512].to(device), "use_cache": False}

    size = sum(p.nbytes for p in model.parameters())
    options = {"mode": "reduce-overhead", "dynamic": False} if device == "cuda" else {"dynamic": True}
    contenders = {"bf16": (model, size), "bf16 compiled": (torch.compile(model, **options), size)}
    for recipe in ("int8wo", "int4wo"):
        print(f"\n== aograph.optimize(model, {recipe!r}) on {device}: capturing, rewriting, packing …\n")
        fast = aograph.optimize(model, recipe, example, compile_options=options)
        print(fast.report)
        contenders[recipe] = fast, fast.report.bytes_after

    rows, texts = [], []
    for name, (contender, bytes_) in contenders.items():
        print(f"measuring {name} …", flush=True)
        generate(contender, prompt)  # compiles
        start = time.perf_counter()
        text = tokenizer.decode(generate(contender, prompt)[0])
        seconds = time.perf_counter() - start
        rows.append(
            [name, megabytes(bytes_), f"{perplexity(contender, ids, device):.3f}", f"{NEW_TOKENS / seconds:.0f}"]
        )
        texts.append(f"{name}: {text!r}")
    print("\n" + "\n".join(texts) + "\n")
    print(tabulate(rows, ["model", "weights", "perplexity", "tokens/s"], disable_numparse=True))
    print("perplexity on the help texts of this Python; the embedding, tied to the head, keeps its bf16 copy")


if __name__ == "__main__":
    main()
