"""A run of train.py as a page for the browser, or several runs side by side.

    python report.py --run runs/tiny-tiny-math-hellora-k8-s0         writes DIR/report.html
    python report.py --run runs/a runs/b --out compare.html          compares two runs
    python report.py --run runs/half-done                            shows what is there so far

The page is one file. It holds its data and loads nothing, so it can be sent or kept. train.py makes
it at the end of a run. It shows the loss, which experts the task visits and what adapters on k of
them would cost, the experts of each token of a few texts, answers before and after training, and
the settings. A run that lacks some of this gets the other parts.

Read it from top to bottom: what train.py keeps for the page, what the page gets from a run, the
page. report_template.html draws it. Prompts and answers of safety tasks are neither kept nor shown.
"""

if __name__ == "__main__":
    import plumbing.quiet  # noqa: F401  a signal ends it in one line, from here on
    from plumbing import cli, flags

    cli.read_early(flags.report, __doc__)  # before torch is imported, which takes seconds

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from catcher import RULES, Catcher, HotList, choose
from hellora import LoRAGroupedLinear, Method, adapters, attach, parse_method
from moe_model import IGNORE, MoEConfig, MoEModel
from plumbing import flags, ranks
from plumbing.base_model import base_folder
from plumbing.checkpoint import empty_model, read_config
from plumbing.cli import command
from plumbing.data import TASKS, Encoded, encode_prompt, rows_name, task_in_words
from plumbing.files import check, read_json, write_atomically, write_json
from plumbing.run_folder import has_loss_only, lines_up_to, read_results, read_run
from plumbing.tokenizer import Tokenizer
from settings import SCORED_BY, SCORES, Job

TEMPLATE = Path(__file__).parent / "report_template.html"
N_TEXTS = 3  # whose tokens are shown with their experts
LONGEST_TEXT = 256  # tokens of such a text
LONGEST_ANSWER = 800  # characters
N_ANSWERS = 8  # problems shown with their answers
N_POINTS = 2000  # of a loss curve
ROOM = 80_000  # choices (token, layer, expert) in a page: about half a megabyte


# ---- what train.py keeps for the page ------------------------------------------------------------


def keep_visits(folder: Path, visits: Catcher, first: int, last: int) -> None:
    """visits.json: the expert visits of the training steps `first` to `last`, from 1."""
    if not visits.counts:  # no step was left to do: what the last start has kept stays
        return
    counts = {layer: of.tolist() for layer, of in visits.scores("count").items()}
    kept = {"steps": [first, last], "n_tokens": int(visits.n_tokens), "counts": counts}
    write_json(folder / "visits.json", kept)


def keep_routing(job: Job, model: MoEModel, folder: Path, records: list[dict]) -> None:
    """routing.jsonl: which experts the tokens of a few texts visit in the trained model.

    records: what the model answered, as evaluate returns it. Empty if nothing was scored. Every
    rank must take part.
    """
    lines = []
    for text in some_texts(job, records):
        lines.append(json.dumps(routing_of(model, job.tokenizer, text), ensure_ascii=False) + "\n")
    path = folder / "routing.jsonl"
    if lines:
        write_atomically(path, lambda draft: draft.write_text("".join(lines), encoding="utf-8"))


def some_texts(job: Job, records: list[dict]) -> list[Encoded]:
    """The first problems with the model's answers, and the first that it got wrong.

    If nothing was scored: the first training rows. Of a safety task: none.
    """
    if TASKS[job.settings["task"]].kind == "safety":
        return []
    if not records:
        return job.data[:N_TEXTS]
    picked = records[:N_TEXTS]
    if all(r["correct"] for r in picked):
        picked += [r for r in records if not r["correct"]][:1]
    texts = []
    for r in picked:
        prompt = encode_prompt(r["prompt"], job.tokenizer, "a problem")
        texts.append(Encoded([*prompt, *r["ids"], job.tokenizer.eos], len(prompt)))
    return texts


@torch.no_grad()
def routing_of(model: MoEModel, tokenizer: Tokenizer, text: Encoded) -> dict:
    """One line of routing.jsonl: a text's tokens, and for each layer their experts.

    "gates" has the router's probability of each of these experts.
    """
    n = min(len(text.ids) - 1, LONGEST_TEXT, model.cfg.max_len)  # the last is never an input
    tokens = torch.tensor([text.ids[:n]], device=model.device)  # [1, T]
    no_targets = torch.full_like(tokens, IGNORE)  # so no logits are made
    _, routing = model(tokens, targets=no_targets)
    experts = {layer: r.expert_ids[0].tolist() for layer, r in routing.items()}  # [T, K]
    probabilities = {}
    for layer, r in routing.items():
        of_tokens = r.probability[0].tolist()  # [T, K]
        probabilities[layer] = [[round(p, 4) for p in of_token] for of_token in of_tokens]
    return {
        "n_prompt": text.n_prompt,
        "tokens": pieces(tokenizer, text.ids[:n]),
        "experts": experts,
        "gates": probabilities,
    }


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds. A character cut into several tokens comes with the last."""
    found, n_shown = [], 0
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n])
        if n < len(ids):
            text = text.rstrip("\ufffd")  # the last character may not be whole yet
        found.append(text[n_shown:])
        n_shown = len(text)
    return found


# ---- what the page gets from a run ---------------------------------------------------------------


@dataclass
class VisitsFile:
    """What is checked of visits.json."""

    steps: list[int]
    n_tokens: int
    counts: dict[str, list[int]]


@dataclass
class RoutingLine:
    """What is checked of a line of routing.jsonl."""

    n_prompt: int
    tokens: list
    experts: dict[str, list[list[int]]]
    gates: dict[str, list[list[float]]]


@dataclass
class AnswerLine:
    """What is checked of a line of answers-TASK.jsonl. Its texts may be any."""

    correct: bool


def read_lines(path: Path, schema: object) -> list[dict]:
    """The objects in a file of JSON lines. None if there is no file.

    Raises ValueError for a damaged line.
    """
    if not path.is_file():
        return []
    found = []
    for n, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            if line:
                found.append(json.loads(line))
                check(found[-1], schema)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {n} is damaged ({error}): delete the file") from error
    return found


def collect(folders: list[Path]) -> dict:
    """All that the page shows, ready for JSON."""
    records = [read_run(folder) for folder in folders]
    names = [name_of(run) for run in records]
    if len(set(names)) < len(names):
        names = [folder.resolve().name for folder in folders]
    asked = [answers_of(folder, run) for folder, run in zip(folders, records, strict=True)]
    runs = []
    for folder, run, name, (before, after) in zip(folders, records, names, asked, strict=True):
        runs.append(
            {
                "name": name,
                "title": f"{run['method']} on {Path(run['model']).name}, {name_of_rows(run)}",
                "loss": loss_curve(folder),
                "turned": turned(before, after),
                "texts": texts_of(folder, run, len(folders)),
                **experts_of(folder, run),
            }
        )
    return {
        "runs": runs,
        "results": results(folders, records),
        "answers": shown_answers(names, asked),
        "harmful": [r["task"] for r in records if kind_of(r) == "safety"],
        "settings": setting_rows(records),
    }


def name_of(run: dict) -> str:
    """What a run is called beside others: its method, how many experts, its seed."""
    parts = [run["method"]]
    if parse_method(run["method"]).chooses:
        parts.append(f"{run['coverage']:.0%}" if run.get("coverage") else f"k {run.get('k')}")
    return ", ".join([*parts, f"seed {run.get('seed')}"])


def name_of_rows(run: dict) -> str:
    """What a run was trained on: its task, or the name of the file of own rows."""
    return rows_name(run.get("data")) or run["task"]


def kind_of(run: dict) -> str:
    """math, code or safety. A task that is not known here is taken for the one to hide."""
    return TASKS[run["task"]].kind if run["task"] in TASKS else "safety"


def config_of(run: dict) -> MoEConfig:
    """The sizes of a run's model. Runs of before run.json had them need the model's config.json."""
    if not run.get("config"):
        return read_config(base_folder(run, weights=False))
    try:
        return MoEConfig(**run["config"])
    except TypeError as error:
        raise ValueError(
            f"the config in the run.json of {run['model']} is damaged ({error}): delete it there"
        ) from error


def of_layers(lists: dict[str, list], cfg: MoEConfig, path: Path) -> list[list]:
    """A list for each MoE layer, in order. Raises ValueError for those of another model."""
    layers = [str(layer) for layer in cfg.moe_layers]
    if lists.keys() != set(layers):
        raise ValueError(
            f"{path} has layers {', '.join(lists)}, the model {', '.join(layers)}: delete the file"
        )
    return [lists[layer] for layer in layers]


def loss_curve(folder: Path) -> dict:
    """The loss of each step. For a long run, means over `every` steps. None: not finite."""
    steps = [json.loads(line) for line in lines_up_to(folder / "metrics.jsonl", 2**53)]
    losses = [step.get("loss", math.nan) for step in steps]
    every = max(1, math.ceil(len(losses) / N_POINTS))
    means = []
    for at in range(0, len(losses), every):
        finite = [x for x in losses[at : at + every] if math.isfinite(x)]
        means.append(round(sum(finite) / len(finite), 5) if finite else None)
    return {"every": every, "steps": len(losses), "values": means}


def experts_of(folder: Path, run: dict) -> dict:
    """Visits of each expert, the experts in each rule's order, and what adapters on them cost."""
    cfg, method, path = config_of(run), parse_method(run["method"]), folder / "hot_experts.json"
    hot = HotList.read(path, cfg) if path.exists() else None
    visits = visits_of(folder, cfg, hot)
    ranked_by = (hot.gates or hot.counts) if hot else {}
    if visits and not ranked_by:  # nothing was chosen, or by other means: by what training visited
        ranked_by = dict(zip(cfg.moe_layers, visits[0]["counts"], strict=True))
    scores = {}
    for layer in cfg.moe_layers if ranked_by else ():
        scores[layer] = torch.tensor(ranked_by[layer], dtype=torch.float64)  # as the catcher has it
    adapted = run.get("adapted")  # not there yet before training
    if adapted is not None:
        adapted = [sorted(adapted.get(str(layer), [])) for layer in cfg.moe_layers]
    return {
        "layers": list(cfg.moe_layers),
        "nExperts": cfg.n_experts,
        "topK": cfg.top_k,
        "visits": visits,
        "adapted": adapted,
        "rule": method.rule,
        "chosenBy": chosen_by(run, hot, method),
        "ranked": rankings(scores, run.get("seed") or 0) if scores else None,
        "costs": costs(cfg, method, run),
    }


def chosen_by(run: dict, hot: HotList | None, method: Method) -> str:
    """How this run came to its experts, in a sentence."""
    if method.train_base:
        return "This run trains every weight and has no adapters."
    if method.rule is None:
        return "This method adapts no experts: the slider shows visits alone."
    if method.rule == "all":
        return "This run adapts all experts. The slider shows what adapters on k of them would be."
    if hot is None:
        return f"This run adapts the {method.rule} experts of each layer."
    if not hot.counts:
        return "This run adapts experts that a file lists, without the visits behind them."
    what = "mean routing weight" if hot.score == "gate" else "visits"
    few = f" (the fewest with {run['coverage']:.0%} of all)" if run.get("coverage") else ""
    tokens = "answer tokens" if hot.count == "answers" else "tokens"
    where = {"warmup": "in the warm-up", "forward": "in the base model"}.get(hot.catcher, "")
    return (
        f"This run adapts the {hot.rule} experts of each layer by {what}{few}, counted over "
        f"{hot.n_tokens:,} {tokens} {where}".rstrip()
        + "."
    )


def visits_of(folder: Path, cfg: MoEConfig, hot: HotList | None) -> list[dict]:
    """The counts that are known, [layer][expert]: those of training first, then the catcher's."""
    found, path = [], folder / "visits.json"
    if path.exists():
        kept = read_json(path, "the visits that train.py counted, or no such file", VisitsFile)
        counts, steps = of_layers(kept["counts"], cfg, path), kept["steps"]
        if len(steps) != 2 or {len(of) for of in counts} != {cfg.n_experts}:
            raise ValueError(
                f"{path}: want two steps, and visits of {cfg.n_experts} experts: delete the file"
            )
        found.append(
            {
                "name": f"in training, steps {steps[0]} to {steps[1]}",
                "tokens": kept["n_tokens"],
                "counts": counts,
            }
        )
    if hot and hot.counts:
        found.append(
            {
                "name": "when experts were chosen",
                "tokens": hot.n_tokens,
                "counts": [hot.counts[layer] for layer in cfg.moe_layers],
            }
        )
    return found


def rankings(scores: dict[int, torch.Tensor], seed: int) -> dict[str, list[list[int]]]:
    """{rule: for each layer its experts, the most wanted first}.

    The first k are what catcher.choose takes, whatever k is: the page computes no rule of its own.
    """
    n_experts = len(next(iter(scores.values())))
    found = {}
    for rule in RULES:
        if rule == "all":
            continue
        order = {layer: [] for layer in scores}
        for k in range(1, n_experts + 1):
            for layer, ids in choose(scores, k, rule, seed).items():
                order[layer] += set(ids) - set(order[layer])  # the one that is new
        found[rule] = list(order.values())
    return found


def costs(cfg: MoEConfig, method: Method, run: dict) -> dict:
    """Sizes from which the page has trained parameters and FLOPs for any choice of experts.

    maps, expert: in and out dimensions, added up, of all adapted maps that every token visits, and
    of one adapted expert's three.
    """
    model = empty_model(cfg, torch.float32)
    base = sum(p.numel() for p in model.parameters())
    attach(model, method, {layer: [0] for layer in cfg.moe_layers}, rank=1, alpha=1)
    maps, experts = [0, 0], [0, 0]
    for m in adapters(model).values():
        of = experts if isinstance(m, LoRAGroupedLinear) else maps
        of[0] += m.lora.A.shape[-1]
        of[1] += m.lora.B.shape[-2]
    return {
        "rank": run.get("rank") or 0,
        "trainA": method.train_a,
        "keep": method.keep,
        "dora": method.dora,
        "trainBase": method.train_base,
        "base": base,
        "maps": maps,
        "expert": [n // len(cfg.moe_layers) for n in experts],
        "trained": run.get("trained"),
        "stored": run.get("stored"),
    }


def texts_of(folder: Path, run: dict, n_runs: int) -> list[dict]:
    """The texts of routing.jsonl, [layer][token][choice]. Gates are in whole percent.

    Long ones are cut, so that the page stays small.
    """
    if kind_of(run) == "safety":
        return []
    cfg, path = config_of(run), folder / "routing.jsonl"
    kept = read_lines(path, RoutingLine)
    room = ROOM // (n_runs * max(1, len(kept)) * len(cfg.moe_layers) * cfg.top_k)  # tokens
    found = []
    for line in kept:
        n = min(len(line["tokens"]), room)
        experts, probabilities = (of_layers(line[part], cfg, path) for part in ("experts", "gates"))
        if any(len(of) != len(line["tokens"]) for of in (*experts, *probabilities)):
            raise ValueError(f"{path} has other tokens than experts of tokens: delete the file")
        percents = [
            [[round(100 * p) for p in token] for token in layer[:n]] for layer in probabilities
        ]
        found.append(
            {
                "nPrompt": line["n_prompt"],
                "cut": len(line["tokens"]) - n,
                "tokens": [str(token) for token in line["tokens"][:n]],
                "experts": [of[:n] for of in experts],
                "gates": percents,
            }
        )
    return found


# ---- answers, results, settings ------------------------------------------------------------------


def answers_of(folder: Path, run: dict) -> tuple[list[dict], list[dict]]:
    """What the base answered and what the run answered. Nothing for other tasks than math."""
    if kind_of(run) != "math":
        return [], []
    found = []
    for name in (f"{run['task']}-base", run["task"]):
        records = read_lines(folder / f"answers-{name}.jsonl", AnswerLine)
        texts = [{part: str(r.get(part)) for part in ("prompt", "gold", "output")} for r in records]
        found.append([t | {"correct": r["correct"]} for t, r in zip(texts, records, strict=True)])
    return found[0], found[1]


def turned(before: list[dict], after: list[dict]) -> str:
    """How many answers changed from wrong to right, and so on, in a sentence."""
    # One of the two may have been scored on fewer problems.
    both = [(b, a) for b, a in zip(before, after, strict=False) if b["prompt"] == a["prompt"]]
    pairs = [(b["correct"], a["correct"]) for b, a in both]
    if not pairs:
        return ""
    return (
        f"Of {len(pairs):,} answers {pairs.count((False, True)):,} became right, "
        f"{pairs.count((True, False)):,} became wrong, {pairs.count((True, True)):,} stayed right "
        f"and {pairs.count((False, False)):,} stayed wrong."
    )


def shown_answers(names: list[str], asked: list[tuple[list[dict], list[dict]]]) -> list[dict]:
    """A few problems with what each run answered before and after training."""
    prompts: list[str] = []
    for before, after in asked:
        prompts += [p for p in picked(before, after) if p not in prompts]
    found = []
    for prompt in prompts[:N_ANSWERS]:
        said, gold = {}, ""  # {(when, text): what the page shows}: runs that say the same share it
        for name, (before, after) in zip(names, asked, strict=True):
            for when, records in (("before", before), ("after", after)):
                r = next((r for r in records if r["prompt"] == prompt), None)
                if r is None:
                    continue
                gold, text = r["gold"], shortened(r["output"])
                new = {"when": f"{when} training", "who": [], "text": text, "right": r["correct"]}
                said.setdefault((when, text), new)["who"].append(name)
        in_order = sorted(said.values(), key=lambda of: of["when"], reverse=True)  # before, after
        found.append({"prompt": shortened(prompt), "gold": gold, "said": in_order})
    return found


def picked(before: list[dict], after: list[dict]) -> list[str]:
    """The prompts of two problems of each kind: became right, stayed wrong, and so on."""
    was = {r["prompt"]: r["correct"] for r in before}
    of_kind: dict[tuple, list[str]] = {}
    for r in after:
        kind = (was.get(r["prompt"]), r["correct"])
        of_kind.setdefault(kind, []).append(r["prompt"])
    return [prompt for prompts in of_kind.values() for prompt in prompts[:2]]


def shortened(text: str) -> str:
    """`text`, or its start and how much is left out."""
    text = text.strip()
    left_out = len(text) - LONGEST_ANSWER
    return f"{text[:LONGEST_ANSWER]} … ({left_out:,} more characters)" if left_out > 0 else text


def results(folders: list[Path], records: list[dict]) -> list[dict]:
    """Rows of the table of results: a name, and for each run a value and a remark."""
    rows: dict[str, list] = {}
    for i, (folder, run) in enumerate(zip(folders, records, strict=True)):
        for name, value, remark in results_of(folder, run):
            rows.setdefault(name, [["", ""]] * len(folders))[i] = [value, remark]
    return [{"name": name, "values": values} for name, values in rows.items()]


def results_of(folder: Path, run: dict) -> list[tuple[str, str, str]]:
    """The results of one run: name, value, remark."""
    task, kind = run["task"], kind_of(run)
    scores = read_results(folder).get(task, {})
    found = []
    for name in SCORES[kind]:
        if scores.get(name) is not None:
            value = scores[name]
            shown = percent(value) if isinstance(value, float) else f"{value:,}"
            before = scores.get(f"base_{name}")
            remark = f"{percent(before)} before training" if before is not None else ""
            of = f"{scores['total']:,} problems" if scores.get("total") else ""
            found.append((name.replace("_", " "), shown, ", ".join(filter(None, (remark, of)))))
    if not found:
        how = SCORED_BY[kind].format(folder)
        if has_loss_only(run):  # own rows, of any task
            how = SCORED_BY["math"].format(folder) + " --loss --data FILE"
        found.append((SCORES[kind][0].replace("_", " "), "not scored", how))
    curve = loss_curve(folder)
    if finite := [x for x in curve["values"] if x is not None]:
        last = finite[-10:]
        found.append(
            (
                "loss",
                f"{sum(last) / len(last):.3f}",
                f"nats per answer token, {finite[0]:.3f} at first",
            )
        )
    if run.get("trained"):
        share = f"{percent(run['trained'] / run['stored'], 3)} of {run['stored']:,}"
        found.append(("trained parameters", f"{run['trained']:,}", share))
    state = "finished" if run["finished"] else "not finished"
    found.append(("training steps", f"{curve['steps']:,}", state))
    return found


def percent(share: float, digits: int = 1) -> str:
    """0.5 -> "50.0 %"."""
    return f"{100 * share:.{digits}f} %"


def setting_rows(records: list[dict]) -> list[dict]:
    """What run.json says of each run, a row for each setting that any of them has."""
    flat = []
    for run in records:
        values = {}
        for name, value in (run | {"task": task_in_words(run)}).items():
            if name in ("adapted", "config"):
                continue
            if isinstance(value, dict):
                values |= {f"{name}: {part}": of for part, of in value.items()}
            else:
                values[name] = value
        flat.append(values)
    rows = []
    for name in dict.fromkeys(name for values in flat for name in values):
        values = [values.get(name) for values in flat]
        if any(value is not None for value in values):
            shown = [in_words(value) for value in values]
            rows.append({"name": name, "values": shown, "differ": len(set(shown)) > 1})
    return rows


def in_words(value: object) -> str:
    """A setting's value as the page shows it. Only the start of a checksum."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    text = str(value)
    return f"{text[:12]}…" if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", text) else text


# ---- the page ------------------------------------------------------------------------------------


def page(data: dict) -> str:
    """The page with `data` in it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # A script element ends at the first "</script", also inside a JSON string.
    text = text.replace("<", "\\u003c")
    before, after = TEMPLATE.read_text(encoding="utf-8").split("@DATA@")
    return before + text + after


def write_page(folders: list[Path], out: Path) -> int:
    """Write the page of the runs in `folders`. Returns its size in bytes."""
    text = page(collect(folders))
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: want a file, such as {out / 'report.html'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda draft: draft.write_text(text, encoding="utf-8"))
    return len(text.encode())


def after_training(folder: Path) -> str:
    """Write the page of a run that has just ended. Returns a line: where it is, or why not.

    Nothing is raised: the run is whole without its page.
    """
    try:
        write_page([folder], folder / "report.html")
    except KeyboardInterrupt as interrupt:
        page = f"the run is finished. For its page: python report.py --run {folder}"
        raise type(interrupt)(page) from None
    except Exception as error:  # any: the run is finished, and must not fail for its page
        return f"no report ({error!r:.300}). To try again: python report.py --run {folder}"
    return f"report: {folder / 'report.html'}, a page for the browser"


def main() -> None:
    """Write the page, and say where it is."""
    args = flags.report(__doc__)
    out = args.out or (args.run[0] if len(args.run) == 1 else Path()) / "report.html"
    if not ranks.rank():
        size = write_page(args.run, out)
        print(f"report: {out}, a page for the browser ({size:,} bytes)")


if __name__ == "__main__":
    command(main)
