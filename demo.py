"""The main job on the bundled model: optimize it, look at the report, measure, save an artifact and serve from it.

`make demo` sets up and runs this; it uses a GPU if there is one.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from tabulate import tabulate

import aograph
from aograph.report import megabytes
from bench.perplexity import perplexity, python_topics, tokens_of

FOLDER = Path(__file__).parent / "models" / "mini"
PROMPT = "The for statement is used to"
NEW_TOKENS = 48
MAX_LENGTH = 64  # of the cache
# A process of its own, which imports neither the model's source nor this file.
SERVE = """
import sys, aograph, transformers
path, folder, prompt, new_tokens = sys.argv[1:]
artifact = aograph.load(path)
artifact.extract_tokenizer(folder)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
ids = tokenizer(prompt, return_tensors="pt").input_ids.to(artifact.device)
print(tokenizer.decode(artifact.generate(ids, int(new_tokens))[0]))
"""


def generate(model, prompt: torch.Tensor, **options) -> torch.Tensor:
    """Greedy decoding with a static cache."""
    config = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "cache_implementation": "static", **options}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **config)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16).eval().to(device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    ids = tokens_of(FOLDER, python_topics(), limit=20 * 512)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids.to(device)
    example = {"input_ids": ids[None, :512].to(device), "use_cache": False}

    compiled = transformers.CompileConfig(mode="reduce-overhead" if device == "cuda" else "default", dynamic=False)
    compiled._compile_all_devices = True
    size = sum(p.nbytes for p in model.parameters())
    contenders = {
        "bf16": (model, size, {"disable_compile": True}),
        "bf16, compiled": (model, size, {"compile_config": compiled}),
    }
    mode = {"mode": "reduce-overhead"} if device == "cuda" else {}
    for recipe in ("int8wo", "int4wo"):
        print(f"\n== aograph.optimize(model, {recipe!r}) on {device}: capturing, rewriting, packing …\n", flush=True)
        fast = aograph.optimize(model, recipe, example, compile_options=mode)
        print(fast.report)
        contenders[recipe] = fast, fast.report.bytes_after, {}

    rows, texts = [], {}
    for name, (contender, bytes_, options) in contenders.items():
        print(f"measuring {name} …", flush=True)
        generate(contender, prompt, **options)  # compiles
        start = time.perf_counter()
        texts[name] = tokenizer.decode(generate(contender, prompt, **options)[0])
        seconds = time.perf_counter() - start
        steps_only = "compile_config" in options  # a whole window would run eagerly
        quality = "" if steps_only else f"{perplexity(contender, ids, device):.3f}"
        rows.append([name, megabytes(bytes_), quality, f"{NEW_TOKENS / seconds:.0f}"])
    print("\n" + "\n".join(f"{name}: {text!r}" for name, text in texts.items()) + "\n")
    print(tabulate(rows, ["model", "weights", "perplexity", "tokens/s"], disable_numparse=True))
    print("perplexity on the help texts of this Python; the embedding, tied to the head, keeps its bf16 copy")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mini.pt2")
        print(f"\n== fast.save({path.name!r}): compiling the graphs ahead of time …\n", flush=True)
        fast.save(path, max_length=MAX_LENGTH, tokenizer=FOLDER)
        subprocess.run([sys.executable, "-m", "aograph", "inspect", path], check=True)
        print(f"\n== aograph.load({path.name!r}) in a new process …\n", flush=True)
        command = [sys.executable, "-c", SERVE, path, Path(folder, "tokenizer"), PROMPT, str(NEW_TOKENS)]
        text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.rstrip("\n")
        print(f"the artifact: {text!r}")
        if text != texts["int4wo"].rstrip("\n"):
            raise SystemExit("the artifact generates another text than the model that it was saved from")
        print("the same text as int4wo above")


if __name__ == "__main__":
    main()
