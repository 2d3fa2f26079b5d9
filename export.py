"""Write a run's adapters in a form that other tools load.

    python export.py --run runs/DIR --format hub    a whole checkpoint, adapters folded in
    python export.py --run runs/DIR --format peft   an adapter that peft and vLLM put on the base
    python export.py --run runs/a --run runs/b --format hub --out both      two runs in one model

The export is read back and run beside the live adapters. It gets its final name only after that.
"""

if __name__ == "__main__":
    import plumbing.quiet  # noqa: F401  a signal ends it in one line, from here on
    from plumbing import cli, flags

    cli.read_early(flags.export, __doc__)  # before torch is imported, which takes seconds

import os
import shlex
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hellora import LoRAGroupedLinear, LowRank, adapters, attach_run, merge, parse_method
from moe_model import MoEConfig, MoEModel
from plumbing import flags
from plumbing.base_model import base_folder, hub_repo, unchanged_base_folder
from plumbing.checkpoint import (
    CHECKPOINT,
    FAMILIES,
    FILES_BESIDE_WEIGHTS,
    INDEX,
    SINGLE,
    Checkpoint,
    base_parameters,
    empty_model,
    full_name,
    hub_names,
    locate,
    read_config,
    shard_paths,
)
from plumbing.cli import command, progress, to_type
from plumbing.data import TASKS, is_file_template
from plumbing.device import compute
from plumbing.files import read_json, write_atomically, write_json
from plumbing.hub import snapshot_commit
from plumbing.run_folder import has_loss_only, read_run
from plumbing.saves import read_adapter

PREFIX = "base_model.model."  # of every name in a PEFT adapter
PROBE = (4, 64)  # sequences, tokens: what both models are compared on
# How much of what the adapters do may be lost: where both compute alike, and by rounding.
EXACT, ROUNDED = 1e-3, 0.5
FLOOR = 1e-5  # of the logits themselves: fp32's noise
OURS = "a fault of ours, or of the disk: please report it"


def updates(model: MoEModel) -> dict[str, LowRank]:
    """{the checkpoint's tensor: the update of it}. They share memory with the model's adapters."""
    found = {}
    for name, m in adapters(model).items():
        tensors = hub_names(f"{name}.weight", model.cfg)
        if isinstance(m, LoRAGroupedLinear):  # one tensor for each expert
            for at, expert in enumerate(m.adapted):
                found[tensors[expert]] = m.lora.one(at)
        else:
            found[tensors[0]] = m.lora
    return found


def adapters_alone(folder: Path) -> MoEModel:
    """The run's adapters with their values, on a base of shapes that takes no memory."""
    model = empty_model(read_config(base_folder(read_run(folder), weights=False)), torch.float32)
    attach_run(model, folder)
    return model


def trained_in_full(folder: Path) -> dict[str, Tensor]:
    """The checkpoint's tensors as full fine-tuning left them."""
    saved, cfg = read_adapter(folder), read_config(base_folder(read_run(folder), weights=False))
    tensors = {}
    for name, (_, hub) in base_parameters(cfg).items():
        tensors |= zip(hub, saved[name] if len(hub) > 1 else [saved[name]], strict=True)
    return tensors


@torch.no_grad()
def write_hub(folders: list[Path], out: Path) -> None:
    """The base checkpoint with every run's update added, shard by shard, as the Hub has it.

    A changed tensor is computed in fp32 and rounded once, to the dtype that it had. All others are
    copied. One shard is in memory at a time. Experts that were stacked get a tensor each, as the
    Hub has them. What is no weight is left out.
    """
    source = base_folder(read_run(folders[0]))
    in_full = parse_method(read_run(folders[0])["method"]).train_base
    replaced = trained_in_full(folders[0]) if in_full else {}
    changes = [] if in_full else [updates(adapters_alone(folder)) for folder in folders]
    base, worst = Checkpoint(source), 0.0
    names = [n for _, tensors in base_parameters(read_config(source)).values() for n in tensors]
    shard_of = {name: base.find(name).path for name in names}
    for path in progress(shard_paths(source), label="write", unit="shard"):
        shard = {}
        for name in (name for name in names if shard_of[name] == path):
            shard[name] = stored = base.read(name)
            of_it = [change[name] for change in changes if name in change]
            if of_it or name in replaced:
                exact = replaced.get(name, stored).float()
                for update in of_it:
                    exact = update.merged(exact)
                shard[name] = exact.to(stored.dtype)
                worst = max(worst, (shard[name].float() - exact).abs().max().item())
        if shard:  # one may hold no weight, or a tied one once more
            write_tensors(shard, out / path.name)
    for file in beside(source):
        shutil.copy(file, out)
    (out / INDEX).unlink(missing_ok=True)  # the copy: it may be left over, or name stacks
    if (source / SINGLE) not in shard_of.values():
        weight_map = {name: path.name for name, path in sorted(shard_of.items())}
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        write_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    write_older_names(out / "config.json", read_config(source))
    print(f"merged. Rounding to the checkpoint's dtype moved a weight by at most {worst:.1e}")


def write_older_names(path: Path, cfg: MoEConfig) -> None:
    """Add to a config.json what transformers 5 keeps in other places than transformers 4 looks.

    Where transformers 4 finds nothing, it takes its own default in silence.
    """
    hub = read_json(path, CHECKPOINT)
    for field in ("rope_theta", "n_experts"):
        key, _ = FAMILIES[cfg.family][field]
        if hub.get(key) is None:
            hub[key] = getattr(cfg, field)
            write_json(path, hub)


def write_peft(folder: Path, out: Path, partial: bool) -> None:
    """adapter_config.json and adapter_model.safetensors, under the names of transformers 4.

    transformers 5 stacks a layer's experts, so peft and vLLM want an adapter for each of them:
    experts that are not adapted get A = B = 0. partial: they are left out, which transformers 4
    loads. peft ignores silently what it cannot place, so the config names all that is adapted.
    """
    run, model = read_run(folder), adapters_alone(folder)
    tensors = {}
    for name, m in adapters(model).items():
        a, b = (factor.mT for factor in m.lora.factors(torch.float32))
        members = hub_names(f"{name}.weight", model.cfg)
        if not isinstance(m, LoRAGroupedLinear):
            a, b = a[None], b[None]
        elif partial:
            members = [members[expert] for expert in m.adapted]
        else:
            a, b = (spread(factor, m.adapted, len(members)) for factor in (a, b))
        for tensor, one_a, one_b in zip(members, a, b, strict=True):
            key = PREFIX + tensor.removesuffix(".weight")
            tensors |= {
                f"{key}.lora_A.weight": one_a.contiguous(),
                f"{key}.lora_B.weight": one_b.contiguous(),
            }
    modules = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors}
    leaves = {module.rpartition(".")[2] for module in modules}
    name, _, revision = base_name(run).partition("@")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name, "revision": revision or None,
        "r": run["rank"], "lora_alpha": run["alpha"], "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(modules if partial else leaves),
        "inference_mode": True, "use_dora": False, "use_rslora": False, "fan_in_fan_out": False,
        "modules_to_save": None,
    }  # fmt: skip
    write_json(out / "adapter_config.json", config)
    write_tensors(tensors, out / "adapter_model.safetensors")


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file, whole and on disk, that others may read."""
    write_atomically(path, lambda draft: save_file(tensors, draft, {"format": "pt"}))


def spread(factor: Tensor, experts: list[int], n_experts: int) -> Tensor:
    """Factors of adapted experts [k, ...] -> of all experts [E, ...], zeros for the others."""
    return factor.new_zeros(n_experts, *factor.shape[1:]).index_copy_(
        0, torch.tensor(experts), factor
    )


def base_name(run: dict) -> str:
    """What a PEFT config calls a run's base model: its Hub id@COMMIT, or its folder."""
    if run.get("commit"):
        return f"{hub_repo(run['model'])}@{run['commit']}"
    return str(locate("tiny")) if run["model"] == "tiny" else full_name(run["model"])


@torch.no_grad()
def read_peft(model: MoEModel, folder: Path) -> None:
    """Put a PEFT adapter's values into the adapters of `model`, by the names in its file."""
    config = read_json(folder / "adapter_config.json", "what --format peft writes")
    saved = load_file(folder / "adapter_model.safetensors")
    for m in adapters(model).values():
        m.lora.scale = config["lora_alpha"] / config["r"]
        if m.lora.mask is not None:
            m.lora.mask.fill_(True)  # what it leaves out is zero in the file
    for tensor, update in updates(model).items():
        key = PREFIX + tensor.removesuffix(".weight")
        update.A.copy_(saved.pop(f"{key}.lora_A.weight"))
        update.B.copy_(saved.pop(f"{key}.lora_B.weight"))
    if left := [name for name, t in saved.items() if t.any()]:
        raise RuntimeError(f"the adapter also changes {min(left)}, which the run does not")


def logits_on_probe(model: MoEModel) -> Tensor:
    """What a model makes of some random tokens, in float32."""
    shape = (PROBE[0], min(PROBE[1], model.cfg.max_len))
    tokens = torch.randint(model.cfg.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens.to(model.device))[0].float()


def check(folders: list[Path], written: Path, form: str, device: torch.device) -> None:
    """Load what was written and run it.

    Raises ValueError unless it does what the runs' adapters do. Both are computed in the
    checkpoint's own dtype, so that what should be equal is: a hub export and the model merged in
    memory, a peft export and the live adapters. What rounding to that dtype costs is only printed.
    """
    source = base_folder(read_run(folders[0]))
    stored = Checkpoint(source).dtypes()
    dtype = torch.bfloat16 if stored == {torch.bfloat16} else torch.float32
    model = MoEModel.from_pretrained(source, dtype, device)
    base = logits_on_probe(model)
    for folder in folders:
        merge(model)  # the run before it
        attach_run(model, folder)
    want = live = logits_on_probe(model)
    if form == "peft":
        read_peft(model, written)
    else:
        # The last merge is on the CPU, as for the file: a GPU adds in another order, and could
        # round otherwise. For several runs the bar allows for that.
        merge(model.to("cpu"))
        want = logits_on_probe(model.to(device))
        del model
        model = MoEModel.from_pretrained(written, dtype, device)
    got = logits_on_probe(model)

    change, off = (live - base).norm(), (got - want).norm()
    # what a file rounds to its dtypes, once, is rounded in memory after each run, to the model's
    alike = stored == {torch.float32} or (stored == {torch.bfloat16} and len(folders) == 1)
    bar = EXACT if form == "peft" or alike else ROUNDED
    if not off <= bar * change + FLOOR * live.norm():
        raise ValueError(f"the export is off by {off / change:.0%} of the adapters' effect: {OURS}")
    lost = (got - live).norm() / change if change > 0 else 1.0
    why = "" if form == "peft" else f", because merged weights are rounded to {stored_in(stored)}"
    print(
        f"read back: on {base[..., 0].numel()} random tokens the adapters change the logits by up "
        f"to {(live - base).abs().max():.3g}. The export loses {lost:.1%} of this change "
        f"(root mean square over all logits){why}"
    )
    if lost > ROUNDED:
        print(f"warning: the change is too small for {dtype}: --format peft keeps it in fp32")


def stored_in(dtypes: set[torch.dtype]) -> str:
    """The names of a checkpoint's dtypes: "bfloat16"."""
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def check_request(folders: list[Path], form: str, partial: bool, out: Path) -> None:
    """Raise ValueError or FileNotFoundError for what cannot be written, before anything is."""
    runs = [read_run(folder, "hashes", "adapted") for folder in folders]
    for folder, run in zip(folders, runs, strict=True):
        if not run["finished"]:
            raise ValueError(f"{folder} is not finished: want finished runs")
        read_adapter(folder)
    methods = [parse_method(run["method"]) for run in runs]
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} already exists: want another --out, or remove it")
    if partial and form != "peft":
        raise ValueError("--partial is for --format peft: omit it")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("--run names a run twice: its update would be added twice")
    if len(folders) > 1 and (form == "peft" or any(m.dora or m.train_base for m in methods)):
        raise ValueError(
            "several runs can only be exported with --format hub, and only low-rank updates add up"
        )
    if len({run["hashes"]["model"] for run in runs}) > 1:
        raise ValueError("the runs have different base models: want runs on one")
    if form == "peft" and (methods[0].dora or methods[0].train_base):
        why = (
            "peft cannot put DoRA on stacked experts" if methods[0].dora else "there is no adapter"
        )
        raise ValueError(
            f"{runs[0]['method']} does not fit --format peft ({why}): want --format hub"
        )
    source = unchanged_base_folder(runs[0], folders[0])
    if form == "hub":
        check_beside(source)


def check_beside(source: Path) -> None:
    """Raise ValueError for a file that would be copied from elsewhere, by a link in the model.

    Whoever made the folder may have put the link there, to a file that is not to be passed on. A
    snapshot of the Hub is made of links to blobs: the repository's, or those of the whole cache.
    """
    home = source.resolve()
    homes = [home.parents[1] / "blobs", home.parents[2] / "blobs"] if snapshot_commit(home) else []
    for file in beside(source):
        if not any(file.resolve().is_relative_to(place) for place in (home, *homes)):
            raise ValueError(f"{file} is a link out of that folder: want the file itself there")


def beside(source: Path) -> list[Path]:
    """The files of a model that a hub export copies as they are."""
    return [file for pattern in FILES_BESIDE_WEIGHTS for file in source.glob(pattern)]


def show_scoring(folders: list[Path], out: Path) -> None:
    """Print the commands that score an export as its runs are scored, for math tasks.

    Own rows that train.py did not score, of any task, have a loss.
    """
    for run in map(read_run, folders):
        own_rows = has_loss_only(run)
        if run["task"] not in TASKS or (not own_rows and TASKS[run["task"]].kind != "math"):
            continue
        task, template = run["task"], run.get("template") or "plain"
        if own_rows:
            own = is_file_template(task, template)
            flags = ["--loss", "--data", "FILE"]
            flags += ["--task", task, "--template", template] if own else []
            what = "the loss of other rows of this form"
        else:
            flags = ["--task", task, "--template", template]
            flags += ["--data", run["eval_data"]] if run.get("eval_data") else []
            what = "score it with"
        words = shlex.join(flags).replace("{", "{{").replace("}", "}}")
        print(f"{what}: {to_type(f'python eval_gsm8k.py --model {{}} {words}', out)}")


def main() -> None:
    """Check, write, read back. Only then the folder gets its name."""
    args = flags.export(__doc__)
    device, _ = compute(args.device, None)
    out = args.out or args.run[0] / args.format
    check_request(args.run, args.format, args.partial, out)

    draft = out.with_name(f".{out.name}.{os.getpid()}.draft")
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise OSError(
            f"{out} cannot be written ({error.strerror}): choose another --out"
        ) from error
    try:
        if args.format == "hub":
            write_hub(args.run, draft)
        else:
            write_peft(args.run[0], draft, args.partial)
        check(args.run, draft, args.format, device)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {size:,} bytes")
    where, family = str(out.absolute()), read_run(args.run[0])["config"]["family"]
    if family != "deepseek":  # whose code is not in transformers
        load = f"AutoModelForCausalLM.from_pretrained({where!r})"
        if args.format == "peft":
            load = f"PeftModel.from_pretrained(base, {where!r})"
        version = " 4" if args.partial else ""
        print(f"load it with transformers{version}: {load}")
    if args.format == "hub":
        show_scoring(args.run, out)


if __name__ == "__main__":
    command(main)
