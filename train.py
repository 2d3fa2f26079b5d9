"""Fine-tune a Mixture-of-Experts model: LoRA on each layer's hot experts (HELLoRA), or any METHODS row.

    python train.py --k 8 --method hellora                      the embedded tiny model, minutes on a laptop
    python train.py --model olmoe-1b-7b --task gsm8k --k 8      the paper's run, on a GPU

The base model is scored; the catcher counts, in a short LoRA warm-up, which experts the task visits; adapters
are put on the hot ones, on attention and on the router; they are trained; the result is scored.
"""

import math
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import hellora
import ranks
import run
import state
from catcher import Catcher, HotList, count_visits, sample, visited_share
from data import TASKS, Encoded, collate, examples_of_step, micro_batches, steps_per_epoch
from eval_gsm8k import evaluate, write_answers
from job import SCORED_BY, Job, open_record, parse_args, prepare, recipe
from moe_model import MoEModel, load_balancing_loss

CATCHER_SHARE = 0.1  # of the training data; Table 1
MAX_NORM = 1.0  # gradients are clipped to this; LoRI's scripts
MAX_SKIPPED = 10  # steps in a row without a finite loss or gradient, after which a run gives up
EVAL_BATCH = 100  # problems decoded together


def train_step(
    model: MoEModel,
    optimizer: torch.optim.Optimizer,
    examples: list[Encoded],
    micro_batch: int,
    balance: float,
    catcher: Catcher,
) -> tuple[float, float]:
    """One optimizer step over `examples` -> loss per target token before the update, gradient norm.

    The loss is the mean over all target tokens of the step, so it does not depend on how the step is cut into
    micro-batches and ranks (the balancing term does: it is a product of means over a micro-batch). A step
    whose loss or gradient is not finite changes nothing; the caller sees it by that.
    """
    n_targets = sum(len(e.ids) - e.n_prompt for e in examples)
    groups, cut = micro_batches(examples, micro_batch), ranks.is_cut(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = torch.zeros((), device=model.device)
    for group in groups:
        batch = collate(group, model.device)
        summed, routing = model(batch.tokens, targets=batch.targets)
        part = summed / n_targets
        loss += part.detach()
        if balance and group:
            part = part + balance * load_balancing_loss(routing, batch.real) / len(groups) / ranks.world()
        (part * ranks.world() if cut else part).backward()  # FSDP2 takes the mean over ranks
        catcher.add(routing, batch.real)
    if ranks.world() > 1 and not cut:
        ranks.sum_gradients(trained)
    norm = ranks.whole(nn.utils.clip_grad_norm_(trained, MAX_NORM))
    loss, norm = torch.stack([ranks.total(loss), norm]).tolist()
    if math.isfinite(loss + norm):
        optimizer.step()
    optimizer.zero_grad()
    return loss, norm


def make_optimizer(model: MoEModel, lr: float) -> torch.optim.Optimizer:
    """AdamW without weight decay over what is trained; frozen tensors have no optimizer state."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr, weight_decay=0.0, fused=True
    )


def catch(job: Job, folder: Path) -> dict[int, list[int]]:
    """Each layer's experts that the method adapts; counted once a run, and kept in its hot_experts.json."""
    everywhere = {layer: list(range(job.cfg.n_experts)) for layer in job.cfg.moe_layers}
    if job.method.rule in (None, "all"):
        return everywhere if job.method.rule else {}
    path, settings = folder / "hot_experts.json", job.settings
    if not path.exists() and settings["hot_experts"]:
        HotList.read(Path(settings["hot_experts"]), job.cfg).write(path)
    elif not path.exists():
        some = sample(job.data, CATCHER_SHARE, settings["seed"])
        if settings["catcher"] == "warmup":
            model = job.build(hellora.parse_method("lora"), everywhere)
            catcher = warm_up(model, some, settings | {"lr": recipe(settings["task"]).lr}, job.micro_batch)
        else:
            catcher = count_visits(job.build(), some, job.micro_batch, "catcher")
        about = {
            name: settings[name] for name in ("model", "task", "catcher", "score", "k", "coverage", "seed")
        }
        catcher.choose(rule=job.method.rule, **about).write(path)
    ranks.wait()  # until rank 0 has written it
    hot = HotList.read(path, job.cfg)
    print(hot.show())
    return hot.experts


def warm_up(model: MoEModel, data: list[Encoded], settings: dict, micro_batch: int) -> Catcher:
    """The paper's catcher: train LoRA everywhere for one pass over `data`, and count the visits meanwhile.

    Only the counts survive (section 3; section 4.3 counts on the base: --catcher forward). The learning rate
    is the recipe's: --lr must not decide which experts are hot. Raises ValueError if the loss is not finite.
    """
    optimizer, catcher = make_optimizer(model, settings["lr"]), Catcher(model.cfg.n_experts)
    size = settings["batch_size"]
    for step in tqdm(range(steps_per_epoch(len(data), size)), "catcher warm-up", unit="step", leave=False):
        examples = examples_of_step(data, step, size, settings["seed"])
        loss, norm = train_step(model, optimizer, examples, micro_batch, settings["balance"], catcher)
        if not math.isfinite(loss + norm):
            raise ValueError(f"the warm-up's loss became {loss}: want --catcher forward")
    return catcher.gather()


def lr_at(step: int, n_steps: int, settings: dict) -> float:
    """The learning rate of a step, from 0: constant, or falling linearly to 0 at the end."""
    return settings["lr"] * (1 - step / n_steps if settings["decay"] else 1)


def fit(model: MoEModel, job: Job, folder: Path) -> Catcher:
    """The training loop, from the last save in `folder` if there is one.

    Returns the visits of its forward passes, from which one can tell how many the adapters really got. Raises
    KeyboardInterrupt, after a save, when asked to stop; ValueError when the loss stays not finite.
    """
    optimizer, visits = make_optimizer(model, job.settings["lr"]), Catcher(job.cfg.n_experts)
    size, seed = job.settings["batch_size"], job.settings["seed"]
    n_steps, start = job.n_steps, state.resume(folder, model, optimizer)
    metrics, skipped, in_a_row = run.Metrics(folder, start), 0, 0
    with run.deferred_stop() as asked, tqdm(total=n_steps, initial=start, desc="train", unit="step") as bar:
        for step in range(start, n_steps):
            began = time.perf_counter()
            optimizer.param_groups[0]["lr"] = lr = lr_at(step, n_steps, job.settings)
            examples = examples_of_step(job.data, step, size, seed)
            balance, micro_batch = job.settings["balance"], job.micro_batch
            loss, norm = train_step(model, optimizer, examples, micro_batch, balance, visits)
            finite = math.isfinite(loss + norm)
            skipped, in_a_row = skipped + (not finite), 0 if finite else in_a_row + 1
            if in_a_row > MAX_SKIPPED:
                raise ValueError(f"{in_a_row} steps without a finite loss: want a lower --lr")
            spent = time.perf_counter() - began
            n_tokens = sum(len(e.ids) for e in examples)
            rates = {"samples_per_s": len(examples) / spent, "tokens_per_s": n_tokens / spent}
            metrics.add(step=step + 1, loss=loss, grad_norm=norm, lr=lr, **rates)
            note = f", {skipped} skipped" if skipped else ""
            bar.set_postfix_str(f"loss {loss:.3f}, {rates['samples_per_s']:.0f} samples/s{note}")
            bar.update()
            asked_all = ranks.largest(len(asked), model.device)
            if asked_all or (step + 1) % job.save_every == 0 or step + 1 == n_steps:
                state.save(folder, step + 1, model, optimizer)
            if asked_all:
                raise KeyboardInterrupt(f"saved after step {step + 1}; the same command goes on from there")
    if skipped:
        print(f"{skipped} of the steps just trained had no finite loss or gradient, and changed nothing")
    held = [t for values in optimizer.state.values() for t in values.values()]
    print(f"the optimizer's state is {sum(t.numel() * t.element_size() for t in held):,} bytes")
    return visits.gather() if visits.counts else visits


def score(job: Job, model: MoEModel, folder: Path, when: str) -> None:
    """Accuracy on the job's tests, into results.json; three answers to look at."""
    task = job.settings["task"]
    args = (job.settings["template"], TASKS[task].max_new, EVAL_BATCH)
    result, records = evaluate(model, job.tokenizer, job.tests, *args, label=f"score {when}")
    if when == "base":
        run.update_results(folder, task, {"base_accuracy": result["accuracy"], "base_total": result["total"]})
    else:
        write_answers(folder, task, records)
        run.update_results(folder, task, result)
    seconds = f"{result['seconds']:.0f} s"
    print(f"{when}: accuracy {result['accuracy']:.1%} on {result['total']} problems ({seconds})")
    for r in records[:3]:
        print(f"  {r['prompt'].strip()}\n    -> {r['output'].strip()[:160]!r} (right: {r['gold']})")


def report_share(model: MoEModel, shares: dict[int, float]) -> None:
    """Say how much of the traffic the adapters really got, and what that saves of LoRA's work."""
    cost = hellora.adapter_flops(model, shares) / hellora.adapter_flops(model, dict.fromkeys(shares, 1.0))
    mean = sum(shares.values()) / len(shares)
    print(
        f"in the steps just trained, {mean:.1%} of expert visits went to adapted experts; "
        f"the adapters cost {1 - cost:.1%} fewer FLOPs than with all experts adapted"
    )


def main() -> None:
    """Score the base, catch, attach, train, save, merge, score."""
    args = parse_args(__doc__)
    job = prepare(args)
    folder = ranks.once(lambda: run.choose_folder(job.settings, args.out, args.resume, args.override))
    with run.lock(folder):
        record = ranks.once(lambda: open_record(job, folder))
        print("\n".join(f"{name:12s} {value}" for name, value in job.settings.items() if value is not None))
        print(f"run folder   {folder}")
        run.write_json(folder / "run.json", record)
        run.check_shared(folder, record)
        if job.tests and "base_accuracy" not in run.read_results(folder).get(job.settings["task"], {}):
            score(job, job.build(), folder, "base")

        began = time.perf_counter()
        with run.advice(job.micro_batch, job.recompute):
            experts = catch(job, folder)
        caught = time.perf_counter() - began
        adapted = {str(layer): ids for layer, ids in experts.items()}  # as JSON has it
        if record.setdefault("adapted", adapted) != adapted:
            raise ValueError(f"{folder}/hot_experts.json changed since training began: want another --out")
        model = job.build(job.method, experts)
        trained, stored = hellora.count_params(model, job.method)
        name, share = job.settings["method"], trained / stored
        print(f"{name}: {trained:,} of {stored:,} parameters are trained ({share:.3%})")
        if ranks.world() > 1:
            n, cut = ranks.world(), ranks.is_cut(model)
            per = f"{ranks.traffic(model, n, cut):,} bytes a {'micro-batch' if cut else 'step'}"
            print(f"{n} ranks, --shard {job.shard}: each gets {per} from the others")
        record |= {"trained": trained, "stored": stored}
        run.write_json(folder / "run.json", record)
        with run.advice(job.micro_batch, job.recompute):
            visits = fit(model, job, folder)
        hellora.save_adapter(folder, model)
        if job.method.rule not in (None, "all") and visits.counts:
            report_share(model, visited_share(visits.scores("count"), experts))
            spent = time.perf_counter() - began
            print(f"finding the experts took {caught:.0f} of the {spent:.0f} s, {caught / spent:.1%}")
        if not ranks.is_cut(model):  # else it is scored with its adapters apart
            hellora.merge(model)
        if job.tests:
            score(job, model, folder, "after")
        record["hashes"]["adapter"] = ranks.once(lambda: run.sha256(folder / "adapter.safetensors"))
        run.write_json(folder / "run.json", record | {"finished": True})
        ranks.wait()  # no rank ends before the files are there
    scored_by = SCORED_BY[TASKS[job.settings["task"]].kind].format(folder)
    print(f"done. Score it{' again' if job.tests else ''} with: {scored_by}")


if __name__ == "__main__":
    run.command(main)
