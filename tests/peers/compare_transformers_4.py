"""Our exports in transformers 4 and an older peft, which need an environment of their own.

    python3 -m venv /tmp/four
    /tmp/four/bin/pip install torch==2.13.0 transformers==4.57.6 peft==0.18.1
    python -m tests.peers.compare_transformers_4 /tmp/four/bin/python

Small random models of three families are trained for three steps and exported in each form: a whole
checkpoint (its base has config.json as transformers 5 writes it), a PEFT adapter, and one of the
adapted experts alone (--partial). The other Python loads each and computes logits. Prints a line
per case; exits with 1 if one is off by more than BAR, or does nothing.
"""

import contextlib
import io
import json
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
METHODS = ("hellora", "lora", "hellori-d", "hellora_pure")
BAR = 1e-4  # fp32, logits of size 10; another library's order of sums
MODEL = {"vocab_size": 1024, "max_position_embeddings": 512, "eos_token_id": 1023}
# The angles' base, and what it is called. 500 is no default: where it is not found, logits differ.
AS_4 = {"rope_theta": 500.0}
AS_5 = {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}


def tokens() -> torch.Tensor:
    """What all models are run on: [3, 17]."""
    return torch.randint(1024, (3, 17), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def other_python(cases: list[list[str]], out: Path) -> None:
    """In the environment of transformers 4: {case: logits} of each [case, model, adapter or ""]."""
    import peft
    import transformers

    print(f"transformers {transformers.__version__}, peft {peft.__version__}")
    found = {}
    for case, model, adapter in cases:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if adapter:
            loaded = peft.PeftModel.from_pretrained(loaded, adapter)
        found[case] = loaded(input_ids=tokens()).logits
    torch.save(found, out)


def run_ours(script: str, *words: object) -> None:
    """One of our commands, in this process. Its output is shown only if it fails."""
    sys.argv = [script, *map(str, words)]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            import_module(script.removesuffix(".py")).main()
    except Exception:  # any, and raised again: only then is the output of interest
        print(said.getvalue())
        raise


@torch.no_grad()
def ours(folder: Path, of: str) -> torch.Tensor:
    """Logits of a run with live adapters, or of its base."""
    from hellora import load_run
    from moe_model import MoEModel

    model = MoEModel.from_pretrained(folder) if of == "base" else load_run(folder, merged=False)[0]
    return model(tokens())[0]


def prepare(work: Path) -> tuple[list[list[str]], dict[str, tuple[Path, Path]]]:
    """Train and export. What to compute elsewhere, and {case: its run, its base}."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import HUB, write_checkpoint, write_rows

    rows = [{"question": f"{n} and 2?", "answer": f"#### {n + 2}"} for n in range(32)]
    data = write_rows(work / "rows.jsonl", rows)
    tokenizer = (ROOT / "tiny" / "tokenizer.json").read_bytes()
    cases, runs = [], {}
    for family in ("olmoe", "mixtral", "qwen3_moe"):
        for spelling, config in (("4", AS_4), ("5", AS_5)):
            hub = {k: v for k, v in HUB[family].items() if k != "rope_theta"} | MODEL | config
            if spelling == "5" and family == "qwen3_moe":
                hub["num_local_experts"] = hub.pop("num_experts")
            base = write_checkpoint(work / f"{family}-{spelling}", hub)
            (base / "tokenizer.json").write_bytes(tokenizer)
        for method in METHODS:
            for spelling, forms in (("4", ("peft", "partial")), ("5", ("hub",))):
                base = work / f"{family}-{spelling}"
                run = work / f"{family}-{spelling}-{method}"
                size = ("--rank", 8, "--alpha", 16, "--k", 2, "--steps", 3, "--lr", 0.02)
                what = ("--model", base, "--task", "tiny-math", "--data", data, "--method", method)
                run_ours("train.py", *what, *size, "--no-eval", "--out", run)
                for form in forms:
                    out, case = run / form, f"{family} {method} {form}"
                    kind = ["peft", "--partial"] if form == "partial" else [form]
                    run_ours("export.py", "--run", run, "--out", out, "--format", *kind)
                    of = [str(out), ""] if form == "hub" else [str(base), str(out)]
                    cases.append([case, *of])
                    runs[case] = run, base
    return cases, runs


def main() -> None:
    """Make the files, have the other Python read them, compare."""
    if sys.argv[1] == "--logits":
        other_python(json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
        return
    python, worst = sys.argv[1], 0.0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        cases, runs = prepare(work)
        todo, out = work / "todo.json", work / "logits.pt"
        todo.write_text(json.dumps(cases))
        subprocess.run([python, __file__, "--logits", todo, out], check=True)
        theirs = torch.load(out, weights_only=True)
        for case, (run, base) in runs.items():
            live, before = ours(run, "run"), ours(base, "base")
            off, change = ((a - live).abs().max().item() for a in (theirs[case], before))
            print(f"{case:34s} off by {off:.1e}, the adapters change logits by {change:.2f}")
            worst = max(worst, off if change > 0.1 else float("inf"))
    print(f"{len(runs)} cases, off by at most {worst:.1e}")
    sys.exit(worst > BAR)


if __name__ == "__main__":
    main()
