"""Fine-tune a Mixture-of-Experts model: LoRA on each layer's hot experts, or another method.

    python train.py --k 8 --method hellora                  the embedded model, minutes on a laptop
    python train.py --model olmoe-1b-7b --task gsm8k --k 8  the paper's run, on a GPU
    python train.py --data own.jsonl --eval-data dev.jsonl  your own questions and answers

1. The base model is scored.
2. A short warm-up with LoRA (on attention, router and all experts) counts which experts of each
   layer the task visits.
3. Adapters are put on the hot ones, on attention and on the router.
4. They are trained.
5. They are merged into the weights, and the result is scored. (A model that is cut up over several
   ranks is scored unmerged, because no rank has a whole weight to merge into.)

`run_job` near the end has these steps. Before it stand, in this order: one optimizer step, the
warm-up, the training loop. plumbing/flags.py has the flags, settings.py what they mean, hellora.py
the adapters, catcher.py the counting.
"""

if __name__ == "__main__":
    import plumbing.quiet  # noqa: F401  a signal ends it in one line, from here on
    from plumbing import cli, flags

    cli.read_early(flags.train, __doc__)  # before torch is imported, which takes seconds

import gc
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import hellora
import report
from catcher import Catcher, HotList, count_visits, hot_list, sample, visited_share
from eval_gsm8k import evaluate
from hellora import LoRAGroupedLinear, Method, adapter_state
from moe_model import GroupedLinear, MoEModel, load_balancing_loss
from plumbing import flags, ranks, run_folder, saves
from plumbing.checkpoint import Checkpoint, empty_model, load_weights
from plumbing.cli import advice, command, deferred_stop, progress, say, to_type
from plumbing.data import (
    TASKS,
    Encoded,
    collate,
    examples_of_step,
    idle_ranks,
    micro_batches,
    rows_name,
    steps_per_epoch,
    task_in_words,
)
from plumbing.device import DTYPES, free_bytes
from plumbing.files import sha256, write_json
from settings import SCORED_BY, Job, open_record, prepare, recipe

CATCHER_SHARE = 0.1  # of the training data (Table 1)
MAX_NORM = 1.0  # gradients are clipped to this norm, as in LoRI's scripts (but see --clip)
MAX_SKIPPED = 10  # steps in a row without a finite loss or gradient, after which a run gives up


def train_step(
    model: MoEModel,
    optimizer: torch.optim.Optimizer,
    examples: list[Encoded],
    micro_batch: int,
    balance: float,
    catcher: Catcher,
    clip: str = "all",
) -> tuple[float, float]:
    """One optimizer step over `examples`.

    balance: the factor of Eq. 1, the balancing loss. clip: "all" gradients together, or "each"
    matrix by itself. Returns the mean cross-entropy per target token before the step, without the
    balancing term, and the norm of the whole gradient before clipping. Without balancing they do
    not depend on the split into micro-batches and over ranks. (The balancing term is a mean over
    micro-batches, so it depends on their size.) A step whose loss or gradient is not finite changes
    no weight (its visits are counted). The caller has to look at the two numbers.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # Every rank gets all examples of the step, so these numbers hold for all ranks together.
    n_targets = sum(len(e.ids) - e.n_prompt for e in examples)
    n_groups = -(-len(examples) // micro_batch)  # groups that are not empty
    groups = micro_batches(examples, micro_batch)
    loss = torch.zeros((), device=model.device)
    for group in groups:
        batch = collate(group, model.device)
        summed, routing = model(batch.tokens, targets=batch.targets)
        # Divide by the targets of the whole step, not of the micro-batch: all tokens count alike.
        part = summed / n_targets
        loss += part.detach()
        if balance and group:  # a rank without work in this micro-batch has an empty group
            part = part + balance / n_groups * load_balancing_loss(routing, batch.real)
        # Gradients of all micro-batches add up. This is part.backward(), with a factor if the model
        # is cut up: FSDP takes the mean over ranks, where a sum is needed.
        ranks.backward(part, model)
        catcher.add(routing, batch.counted(catcher.which_tokens))
    ranks.finish_gradients(trained, model)

    # Clip when all parts are added up, so that the norm is that of the whole step.
    norm = nn.utils.clip_grad_norm_(trained, MAX_NORM if clip == "all" else math.inf)
    if clip == "each":
        clip_each(model)
    # One copy brings both numbers, because the host waits for it: once a step.
    loss, norm = torch.stack([ranks.total(loss), ranks.whole(norm)]).tolist()
    if is_finite(loss, norm):
        optimizer.step()
    optimizer.zero_grad()
    return loss, norm


@torch.no_grad()
def clip_each(model: MoEModel) -> None:
    """--clip each: bound the norm of the gradient of each matrix by itself.

    A stack of experts is one parameter here. LoRI has a parameter for each expert. So the gradient
    of each expert's matrix is bounded by itself. Source: LoRI's grad_norm_strategy "even".
    """
    stacks = [m for m in model.modules() if isinstance(m, GroupedLinear | LoRAGroupedLinear)]
    stacked = {p for stack in stacks for p in stack.parameters()}  # [E or k, ...] each
    for p in model.parameters():
        if p.grad is not None:
            dims = tuple(range(1 if p in stacked else 0, p.ndim))
            norm = torch.linalg.vector_norm(p.grad, dim=dims, keepdim=True)  # [(k,) 1, 1]
            p.grad *= (MAX_NORM / (norm + 1e-6)).clamp(max=1)  # as torch's clip_grad_norm_


def is_finite(loss: float, norm: float) -> bool:
    """Whether a step has a finite loss and gradient, and so was taken."""
    return math.isfinite(loss) and math.isfinite(norm)


def symptoms(model: MoEModel, loss: float, norm: float) -> str:
    """For an error: what is wrong in a step that was not taken, and what to do."""
    bad = [n for n, p in model.named_parameters() if not ranks.mine(p).isfinite().all()]
    # If the model is cut up, each rank has looked at its own rows. All ranks come here together.
    bad = [name for names in ranks.gathered(bad) for name in names]
    if bad:
        weights = f"weights that are not finite, first {bad[0]}: want a --model without them"
    else:
        weights = "finite weights: want another --lr, or other data"
    return f"loss {loss}, gradient norm {norm} and {weights}"


def make_optimizer(model: MoEModel, lr: float) -> torch.optim.Optimizer:
    """AdamW without weight decay, over what is trained. Frozen weights have no optimizer state."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr, weight_decay=0.0, fused=True)


def lr_at(step: int, n_steps: int, settings: dict) -> float:
    """The learning rate of a step, from 0. It is constant, or falls linearly to 0 at the end."""
    if settings["decay"]:
        return settings["lr"] * (1 - step / n_steps)
    return settings["lr"]


def build_model(
    job: Job,
    method: Method | None = None,
    adapted: dict[int, list[int]] | None = None,
    start: dict[str, Tensor] | None = None,
) -> MoEModel:
    """The model with `method`'s adapters on the experts `adapted`. Without a method: the base.

    start: values that an S run takes over from its D run, LoRI's mask among them.
    """
    gc.collect()  # the last model has reference cycles: only this frees it before the new one
    dtype = DTYPES[job.settings["dtype"]]
    in_full = method is not None and method.train_base

    # 1. Shapes without memory, so that nothing is allocated twice. Frozen weights are stored in the
    #    dtype of the computation. Full fine-tuning keeps its weights in fp32.
    model = empty_model(job.cfg, dtype, job.matmul)
    model.to(torch.float32 if in_full else dtype).requires_grad_(False)
    model.recompute = job.recompute

    # 2. Adapters, before the model is cut up, so that they are cut up with it.
    if method:
        hellora.attach(model, method, adapted, job.settings["rank"], job.settings["alpha"])
    if ranks.world() > 1 and job.shard == "full":
        ranks.shard(model, model.layers, dtype if in_full else None, job.device)

    # 3. Values: first the checkpoint's, and then the adapters', because DoRA starts from the
    #    weights' lengths.
    load_weights(model, Checkpoint(job.source), job.device)
    a_seed = f"{job.settings['seed']}{' redrawn' if job.settings['redraw_a'] else ''}"
    hellora.init_adapters(model, a_seed, start)
    return model


# ---- which experts? ------------------------------------------------------------------------------


def find_adapted(job: Job, folder: Path) -> dict[int, list[int]]:
    """{MoE layer: the experts that the method adapts}.

    They are chosen once per run, and kept in its hot_experts.json.
    """
    if not job.method.chooses:
        return job.all_experts if job.method.rule else {}
    path, given = folder / "hot_experts.json", job.settings["hot_experts"]
    if not path.exists():
        hot = HotList.read(Path(given), job.cfg) if given else catch(job)
        hot.write(path)
    ranks.wait()  # until rank 0 has written it
    run_folder.wait_for(path)
    hot = HotList.read(path, job.cfg)
    print(hot.show())
    return hot.experts


def catch(job: Job) -> HotList:
    """Count the experts that a tenth of the task visits, and choose."""
    settings = job.settings
    data = sample(job.data, CATCHER_SHARE, settings["seed"])
    if settings["catcher"] == "warmup":
        visits = warm_up(job, data)
    else:
        model = build_model(job)
        visits = count_visits(model, data, job.micro_batch, "catcher", settings["count"])
    return hot_list(
        visits,
        k=settings["k"],
        rule=job.method.rule,
        score=settings["score"],
        seed=settings["seed"],
        coverage=settings["coverage"],
        model=settings["model"],
        task=settings["task"],
        data=rows_name(settings["data"]),
        catcher=settings["catcher"],
    )


def warm_up(job: Job, data: list[Encoded]) -> Catcher:
    """The paper's catcher: train LoRA for one pass over `data`, and count the visits.

    LoRA is on attention, router and all experts. Only the counts are kept. This is section 3 of the
    paper. Section 4.3 counts on the base model, as --catcher forward does. Raises ValueError if the
    loss is not finite.
    """
    settings = job.settings
    model = build_model(job, hellora.parse_method("lora"), job.all_experts)
    # The recipe's rate, constant, and not --lr: runs at several rates then have the same experts.
    optimizer = make_optimizer(model, recipe(settings["task"]).lr)
    catcher = Catcher(job.cfg.n_experts, settings["count"])
    balance, clip = settings["balance"], settings["clip"]
    n_steps = steps_per_epoch(len(data), settings["batch_size"])
    for step in progress(range(n_steps), label="catcher warm-up", unit="step"):
        examples = examples_of_step(data, step, settings["batch_size"], settings["seed"])
        loss, norm = train_step(model, optimizer, examples, job.micro_batch, balance, catcher, clip)
        if not is_finite(loss, norm):
            raise ValueError(
                f"step {step + 1} of the warm-up has {symptoms(model, loss, norm)}, or --catcher "
                "forward, which counts without training"
            )
    return catcher.gather()


# ---- the training loop ---------------------------------------------------------------------------


def fit(model: MoEModel, job: Job, folder: Path) -> Catcher:
    """Train `model`, from the last save in `folder` if there is one.

    Returns the visits of its forward passes: they show what share the adapters really got. Raises
    KeyboardInterrupt, after a save, when asked to stop. Raises ValueError when too many steps in a
    row have no finite loss or gradient.
    """
    settings, n_steps = job.settings, job.n_steps
    balance, clip = settings["balance"], settings["clip"]
    optimizer, visits = make_optimizer(model, settings["lr"]), Catcher(job.cfg.n_experts)
    start = saves.resume(folder, adapter_state(model), model, optimizer)
    log = run_folder.StepLog(folder, start, n_steps, job.log)
    dev_losses = saves.DevLosses(folder, start, job.log) if job.dev else None
    skipped_in_a_row = 0
    with deferred_stop() as signals, log.bar:
        for step in range(start, n_steps):
            # The batch. It depends on the step's number alone, so a resumed run needs no more.
            began = time.perf_counter()
            examples = examples_of_step(job.data, step, settings["batch_size"], settings["seed"])

            # The step.
            lr = lr_at(step, n_steps, settings)
            optimizer.param_groups[0]["lr"] = lr
            loss, norm = train_step(
                model, optimizer, examples, job.micro_batch, balance, visits, clip
            )
            seconds = time.perf_counter() - began

            # A step without a finite loss and gradient is skipped: it changes nothing. After many
            # in a row the run gives up.
            skipped_in_a_row = 0 if is_finite(loss, norm) else skipped_in_a_row + 1
            if skipped_in_a_row > MAX_SKIPPED:
                raise ValueError(
                    f"{skipped_in_a_row} steps in a row, at --lr {settings['lr']:g}, had no finite "
                    f"loss or gradient: step {step + 1} has {symptoms(model, loss, norm)}"
                )
            log.add(step + 1, loss, norm, lr, examples, seconds, skipped_in_a_row > 0)
            if job.is_dev_step(step + 1):
                dev_loss = mean_loss(model, job.dev, job.micro_batch)
                dev_losses.add(step + 1, dev_loss, adapter_state(model))

            # Save only between steps, so that no save has half a step. If one rank must stop, all
            # stop.
            stop = ranks.largest(len(signals), model.device)
            if stop or (step + 1) % job.save_every == 0 or step + 1 == n_steps:
                saves.save(folder, step + 1, adapter_state(model), model, optimizer)
            if stop:
                raise KeyboardInterrupt(
                    f"saved after step {step + 1}: the same command resumes there"
                )
    log.report_skipped()
    report_optimizer(optimizer)
    report.keep_visits(folder, visits.gather(), start + 1, n_steps)
    return visits


@torch.no_grad()
def mean_loss(model: MoEModel, data: list[Encoded], micro_batch: int) -> float:
    """The mean loss per target token over `data`, as in `train_step`. Each rank takes all of it.

    (A model that is cut up needs all ranks in each forward pass.)
    """
    ordered = sorted(data, key=lambda e: len(e.ids))  # for little padding
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for at in range(0, len(ordered), micro_batch):
        batch = collate(ordered[at : at + micro_batch], model.device)
        summed, _ = model(batch.tokens, targets=batch.targets)
        total += summed
    return (total / sum(len(e.ids) - e.n_prompt for e in data)).item()


# ---- a whole run ---------------------------------------------------------------------------------


def score_model(job: Job, model: MoEModel, folder: Path, when: str) -> list[dict]:
    """Score the job's tests into results.json, and print three answers.

    when: "base", or "after" training. Returns a record of each problem.
    """
    task = job.settings["task"]
    if ranks.is_cut(model):
        whole = ranks.put_together(model, free_bytes(job.device))
        print(f"each rank {'holds the whole model' if whole else 'gets each layer anew'} to score")
    result, records = evaluate(
        model,
        job.tokenizer,
        job.tests,
        job.settings["template"],
        TASKS[task].max_new,
        job.eval_batch,
        label=f"score {when}",
    )
    if when == "base":
        kept = {"base_accuracy": result["accuracy"], "base_total": result["total"]}
    else:
        kept = result
    run_folder.write_answers(folder, f"{task}-base" if when == "base" else task, records)
    run_folder.update_results(folder, task, kept)
    seconds = f"{result['seconds']:.0f} s"
    print(f"{when}: accuracy {result['accuracy']:.1%} on {result['total']} problems ({seconds})")
    for r in records[:3]:
        say(f"  {r['prompt'].strip()}\n    -> {r['output'].strip()[:160]!r} (right: {r['gold']})")
    return records


def report_size(job: Job, model: MoEModel, trained: int, stored: int) -> None:
    """Print how much is trained, and what the ranks send each other."""
    name = job.settings["method"]
    print(f"{name}: {trained:,} of {stored:,} parameters are trained ({trained / stored:.3%})")
    if ranks.world() > 1:
        n, cut = ranks.world(), ranks.is_cut(model)
        sent = f"{ranks.traffic(model, n, cut):,} bytes a {'micro-batch' if cut else 'step'}"
        print(f"{n} ranks, --shard {job.shard}: each gets {sent} from the others")
        full_step = min(job.settings["batch_size"], len(job.data))
        if idle := idle_ranks(full_step, job.micro_batch):
            print(idle)


def report_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Print the size of the optimizer's state."""
    state = [t for values in optimizer.state.values() for t in values.values()]
    print(f"the optimizer's state is {sum(t.numel() * t.element_size() for t in state):,} bytes")


def report_share(model: MoEModel, shares: dict[int, float]) -> None:
    """Print what share of the visits the adapters got, and how much less work that is than LoRA."""
    on_all = hellora.adapter_flops(model, dict.fromkeys(shares, 1.0))
    cost = hellora.adapter_flops(model, shares) / on_all
    mean = sum(shares.values()) / len(shares)
    print(
        f"in the steps just trained, {mean:.1%} of expert visits went to adapted experts, so "
        f"the adapters cost {1 - cost:.1%} fewer FLOPs than with all experts adapted"
    )


def run_job(job: Job, folder: Path) -> None:
    """Score the base, find the experts, attach, train, save, merge, score: all into `folder`."""
    record = ranks.once(lambda: open_record(job, folder))
    shown = {name: value for name, value in job.settings.items() if value is not None}
    shown["device"] = record["versions"]["device"]
    shown["task"] = task_in_words(shown)
    print("\n".join(f"{name:12s} {value}" for name, value in shown.items()))
    print(f"run folder   {folder}")
    write_json(folder / "run.json", record)
    run_folder.check_shared(folder, record)

    # 1. The base model's score.
    scored = run_folder.read_results(folder).get(job.settings["task"], {})
    if job.tests and "base_accuracy" not in scored:  # a resumed run has it
        score_model(job, build_model(job), folder, "base")

    # 2. The experts. They are found once: not if they are given, or were found before a stop.
    known = job.settings["hot_experts"] or (folder / "hot_experts.json").exists()
    began = time.perf_counter()
    with advice(job.micro_batch, job.recompute):
        adapted = find_adapted(job, folder)
    finding = time.perf_counter() - began  # seconds
    as_json = {str(layer): ids for layer, ids in adapted.items()}
    if record.setdefault("adapted", as_json) != as_json:
        raise ValueError(
            f"{folder}/hot_experts.json changed since training began: want another --out"
        )

    # 3. Adapters. The record is written before the first step, because a save needs it.
    model = build_model(job, job.method, adapted, job.start)
    trained, stored = hellora.count_params(model, job.method)
    report_size(job, model, trained, stored)
    record |= {"trained": trained, "stored": stored}
    write_json(folder / "run.json", record)

    # 4. Training.
    with advice(job.micro_batch, job.recompute):
        visits = fit(model, job, folder)
    saves.save_adapter(folder, adapter_state(model))
    if job.method.chooses and visits.counts:
        report_share(model, visited_share(visits.scores("count"), adapted))
        if not known:
            spent = time.perf_counter() - began
            share = f"{finding:.0f} of the {spent:.0f} s, {finding / spent:.1%}"
            print(f"finding the experts took {share}")

    # 5. The merged model's score.
    if not ranks.is_cut(model):
        hellora.merge(model)
    records = score_model(job, model, folder, "after") if job.tests else []
    report.keep_routing(job, model, folder, records)
    record["hashes"]["adapter"] = ranks.once(lambda: sha256(folder / "adapter.safetensors"))
    write_json(folder / "run.json", record | {"finished": True})
    ranks.once(lambda: saves.finish_best(folder, record | {"finished": True}))
    ranks.wait()  # no rank ends before the files are there


def main() -> None:
    """Check the command line, claim the folder, run."""
    args = flags.train(__doc__)
    try:
        job = prepare(args)
        with run_folder.lock(job.folder):
            run_job(job, job.folder)
    except KeyboardInterrupt as interrupt:  # one after a save has a text of its own
        again = "the same command starts, or goes on from what is kept"
        raise type(interrupt)(str(interrupt) or again) from None
    print(ranks.once(lambda: report.after_training(job.folder)))
    best = saves.last_best(job.folder) is not None
    result = job.folder / saves.BEST if best else job.folder
    if job.loss_only:  # own rows, of any task
        measured_by = to_type(f"{SCORED_BY['math']} --loss --data FILE", result)
        print(f"done. The loss of other rows of this form: {measured_by}")
    else:
        scored_by = to_type(SCORED_BY[TASKS[job.settings["task"]].kind], result)
        print(f"done. Score it{' again' if job.tests and not best else ''} with: {scored_by}")
    print(f"ask it with: {to_type('python generate.py --run {}', result)}")


if __name__ == "__main__":
    command(main)
