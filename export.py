"""Write a run's adapters in a form that other tools load.

    python export.py --run runs/DIR --format hub      a whole checkpoint, adapters folded into its weights
    python export.py --run runs/DIR --format peft     an adapter that peft and vLLM put on the base model

What was written is read back, run beside the live adapters, and only then gets its final name.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from checkpoint import BACKBONES, Checkpoint, hub_names, locate, read_config, read_header, shard_paths
from hellora import LoRAGroupedLinear, LowRank, adapters, attach_run, merge, parse_method, read_adapter
from moe_model import MoEModel, base_parameters, empty_model
from run import Parser, add_compute_flags, command, compute, read_json, read_run, write_json

COPIED = ("*.json", "tokenizer.model", "merges.txt", "LICENSE*")  # of the base model, besides its weights
PREFIX = "base_model.model."  # of every name in a PEFT adapter
PROBE = (4, 64)  # sequences, tokens: what both models are compared on
LOST = {True: 1e-3, False: 0.5}  # in float32 throughout? -> how much of what adapters do may get lost


def updates(model: MoEModel) -> dict[str, tuple[LowRank, int]]:
    """{the checkpoint's tensor: the update of it, and which matrix of that update's stack it is}."""
    found = {}
    for name, m in adapters(model).items():
        tensors = hub_names(f"{name}.weight", model.cfg)
        stacked = isinstance(m, LoRAGroupedLinear)
        members = enumerate(m.experts) if stacked else [(..., 0)]
        found |= {tensors[expert]: (m.lora, at) for at, expert in members}
    return found


def adapters_alone(folder: Path) -> MoEModel:
    """The run's adapters with their values, on a base of shapes that takes no memory."""
    model = empty_model(read_config(locate(read_run(folder)["model"])), torch.float32)
    attach_run(model, folder)
    return model


def trained_in_full(folder: Path) -> dict[str, Tensor]:
    """The checkpoint's tensors as full fine-tuning left them."""
    saved, cfg = read_adapter(folder), read_config(locate(read_run(folder)["model"]))
    tensors = {}
    for name, (_, hub) in base_parameters(cfg).items():
        tensors |= zip(hub, saved[name] if len(hub) > 1 else [saved[name]], strict=True)
    return tensors


@torch.no_grad()
def write_hub(folders: list[Path], out: Path) -> None:
    """The base checkpoint with every run's update added, shard by shard, as the Hub has it.

    A changed tensor is computed in float32 and rounded once, to the dtype it had; all others are copied. One
    shard is in memory at a time.
    """
    source = locate(read_run(folders[0])["model"])
    in_full = parse_method(read_run(folders[0])["method"]).train_base
    replaced = trained_in_full(folders[0]) if in_full else {}
    changes = [] if in_full else [updates(adapters_alone(folder)) for folder in folders]
    base, worst = Checkpoint(source), 0.0
    for path in tqdm(shard_paths(source), "write", unit="shard", leave=False):
        shard = {}
        for name in read_header(path):
            stored = base.read(name)
            exact = replaced.get(name, stored).float()
            for change in changes:
                if name in change:
                    lora, at = change[name]
                    exact = lora.merged(exact, at)
            shard[name] = exact.to(stored.dtype)
            worst = max(worst, (shard[name].float() - exact).abs().max().item())
        save_file(shard, out / path.name, {"format": "pt"})
    for pattern in COPIED:
        for file in source.glob(pattern):
            shutil.copy(file, out)
    print(f"merged; rounding to the checkpoint's dtype moved a weight by at most {worst:.1e}")


def write_peft(folder: Path, out: Path, partial: bool) -> None:
    """adapter_config.json and adapter_model.safetensors, under the names of transformers 4.

    transformers 5 stacks a layer's experts, so peft and vLLM want an adapter for each of them: experts that
    are not adapted get A = B = 0. partial: they are left out, which transformers 4 loads. peft leaves out
    without a word what it cannot place: so the names of all that is adapted stand in the config.
    """
    run, model = read_run(folder), adapters_alone(folder)
    tensors = {}
    for name, m in adapters(model).items():
        a, b = (factor.mT for factor in m.lora.factors(torch.float32))
        members = hub_names(f"{name}.weight", model.cfg)
        if not isinstance(m, LoRAGroupedLinear):
            a, b = a[None], b[None]
        elif partial:
            members = [members[expert] for expert in m.experts]
        else:
            a, b = (spread(factor, m.experts, len(members)) for factor in (a, b))
        for tensor, one_a, one_b in zip(members, a, b, strict=True):
            key = PREFIX + tensor.removesuffix(".weight")
            tensors |= {
                f"{key}.lora_A.weight": one_a.contiguous(),
                f"{key}.lora_B.weight": one_b.contiguous(),
            }
    modules = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name(run["model"]),
        "r": run["rank"], "lora_alpha": run["alpha"], "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(modules if partial else {name.rpartition(".")[2] for name in modules}),
        "inference_mode": True, "use_dora": False, "use_rslora": False, "fan_in_fan_out": False,
        "modules_to_save": None,
    }  # fmt: skip
    write_json(out / "adapter_config.json", config)
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})


def spread(factor: Tensor, experts: list[int], n_experts: int) -> Tensor:
    """Factors of the adapted experts [k, ...] -> of all experts [E, ...], zeros where there are none."""
    return factor.new_zeros(n_experts, *factor.shape[1:]).index_copy_(0, torch.tensor(experts), factor)


def base_name(model: str) -> str:
    """What a PEFT config calls the base model: its Hub id, or its folder."""
    return BACKBONES[model].repo if model in BACKBONES else str(locate(model)) if model == "tiny" else model


@torch.no_grad()
def read_peft(model: MoEModel, folder: Path) -> None:
    """Fold a PEFT adapter into its base model, in place, by the names in its file alone."""
    config = read_json(folder / "adapter_config.json", "what --format peft writes")
    saved, scale = load_file(folder / "adapter_model.safetensors"), config["lora_alpha"] / config["r"]
    for name, param in model.named_parameters():
        tensors = hub_names(name, model.cfg)
        for part, tensor in zip(param if len(tensors) > 1 else [param], tensors, strict=True):
            key = PREFIX + tensor.removesuffix(".weight")
            if f"{key}.lora_A.weight" in saved:
                a, b = saved.pop(f"{key}.lora_A.weight"), saved.pop(f"{key}.lora_B.weight")
                part += (scale * b @ a).to(part)
    if saved:
        raise RuntimeError(f"the adapter names {min(saved)}, which the base model does not have")


@torch.no_grad()
def check(folders: list[Path], written: Path, form: str, dtype: torch.dtype, device: torch.device) -> None:
    """Run what was written beside the live adapters. Raises ValueError unless it does what they do.

    Both are measured against the base model on random tokens: what the export is off by, as a share of what
    the adapters change. A no-op export, the complaint of most users, is off by all of it.
    """
    source = locate(read_run(folders[0])["model"])

    def load(folder: Path) -> MoEModel:
        return MoEModel.from_pretrained(folder, dtype, device)

    model = load(source)
    cfg = model.cfg
    shape = (PROBE[0], min(PROBE[1], cfg.max_len))
    tokens = torch.randint(cfg.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    base = model(tokens)[0].float()
    for i, folder in enumerate(folders):
        attach_run(model, folder)
        if i + 1 < len(folders):
            merge(model)
    live = model(tokens)[0].float()  # the last run's adapters live, those before it merged
    del model
    exported = load(written if form == "hub" else source)
    if form == "peft":
        read_peft(exported, written)
    change, off = live - base, exported(tokens)[0].float() - live
    share = (off.norm() / change.norm()).item() if change.norm() else float(off.norm())
    print(
        f"read back: on {tokens.numel()} random tokens the adapters move logits by up to "
        f"{change.abs().max():.3g}; the export is off by up to {off.abs().max():.1e} ({share:.2%} of it)"
    )
    exact = dtype == torch.float32 and (form == "peft" or stored_in_float32(written))
    if not share <= LOST[exact]:
        raise ValueError(
            f"{written} would lose {share:.0%} of what the adapters do, to rounding or to a fault: "
            "want --format peft, which keeps them apart in float32"
        )


def stored_in_float32(folder: Path) -> bool:
    """Whether the checkpoint has no tensor in fewer bits."""
    return all(stored.dtype == torch.float32 for stored in Checkpoint(folder).tensors.values())


def main() -> None:
    """Check, write, read back; the folder gets its name only then."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--run", type=Path, action="append", required=True, metavar="DIR",
        help="run folder of train.py; several times with --format hub: their updates are added",
    )  # fmt: skip
    p.add_argument("--format", choices=["hub", "peft"], required=True)
    p.add_argument("--partial", action="store_true", help="peft: adapted experts only, for transformers 4")
    p.add_argument("--out", type=Path, metavar="DIR", help="new folder (default: the run's folder + FORMAT)")
    add_compute_flags(p.add_argument)
    args = p.parse_args()
    device, dtype = compute(args.device, args.dtype)
    out = args.out or args.run[0] / args.format
    check_request(args.run, args.format, args.partial, out)

    draft = out.with_name(out.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    if args.format == "hub":
        write_hub(args.run, draft)
    else:
        write_peft(args.run[0], draft, args.partial)
    check(args.run, draft, args.format, dtype, device)
    draft.rename(out)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {size:,} bytes")


def check_request(folders: list[Path], form: str, partial: bool, out: Path) -> None:
    """Raise ValueError for what cannot be written."""
    runs = [read_run(folder) for folder in folders]
    methods = [parse_method(run["method"]) for run in runs]
    if unfinished := [str(f) for f, run in zip(folders, runs, strict=True) if not run["finished"]]:
        raise ValueError(f"{', '.join(unfinished)}: not finished, want runs that are done")
    if out.exists():
        raise ValueError(f"{out} is there already: want another --out, or remove it")
    if partial and form != "peft":
        raise ValueError("--partial is for --format peft: omit it")
    if len(folders) > 1 and (form == "peft" or any(m.dora or m.train_base for m in methods)):
        raise ValueError("several --run want --format hub and low-rank methods: others do not add up")
    if len({run["hashes"]["model"] for run in runs}) > 1:
        raise ValueError("the runs have different base models: want runs on one")
    if form == "peft" and (methods[0].dora or methods[0].train_base):
        why = "peft cannot put DoRA on stacked experts" if methods[0].dora else "there is no adapter"
        raise ValueError(f"{runs[0]['method']} does not fit --format peft ({why}): want --format hub")


if __name__ == "__main__":
    command(main)
