"""report.py: what train.py keeps for the page, and the data in the page against the project's own
functions. tests/test_report_page.py looks at the page in a browser."""

import json
import math
import re
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO

import pytest
import torch
from conftest import HUB, ROOT, small_run, some_slow, toy_in, write_rows

import report
import train
from catcher import RULES, Catcher, choose, visited_share
from hellora import adapter_flops, attach, count_params, load_run, parse_method
from plumbing.checkpoint import empty_model, parse_config
from plumbing.data import encode_prompt

ROWS = [
    {"question": f"{a}+{b}?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"}
    for a in range(8)
    for b in range(5)
]
EVIL = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> \u2028 &lt;"


@pytest.fixture
def quick(toy, tmp_path, monkeypatch):
    """Flags of a run of a few seconds, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    few = write_rows(tmp_path / "few.jsonl", ROWS[:4])
    return [*small_run(toy, rows, "--eval-data", few), "--steps", "2", "--out", "r"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run "r" of the toy model beside it, and what the run printed."""
    folder = tmp_path_factory.mktemp("finished")
    rows, few = (
        write_rows(folder / f"{name}.jsonl", ROWS[:n]) for name, n in (("rows", 40), ("few", 4))
    )
    words = small_run(toy_in(folder), rows, "--eval-data", few, "--steps", 2, "--out", "r")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *words])
        train.main()
    return folder, out.getvalue()


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of that run, "r" in the working directory. (Its model stays where it is.)"""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(finished[0] / "r", tmp_path / "r")


def done(cli, *words):
    """What a command prints that must succeed."""
    code, out, err = cli(*words)
    assert code == 0, err
    return out


def refused(cli, *words):
    """The one line on stderr of a command that must not."""
    code, _, err = cli(*words)
    assert code == 2
    assert len(err.strip().splitlines()) == 1, err
    return err


def data_in(path):
    """The data of a page, read as a browser does: up to the first end of a script element."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script', text, re.S)[1])


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- the numbers behind the slider ---------------------------------------------------------------


@pytest.mark.parametrize("family", HUB)
@pytest.mark.parametrize(
    "name",
    ["hellora", "hellora_pure", "hellora_gate", "hellora_none", "hellori-d", "hellori-s", "lora",
     "lori-s", "dora"],
)  # fmt: skip
def test_sizes_in_the_page_give_parameters_and_flops_of_any_choice(family, name):
    """By the page's formulas, written again here; the page's own run in test_report_page.py."""
    cfg, method, rank = parse_config(HUB[family]), parse_method(name), 5
    sizes = report.costs(cfg, method, {"rank": rank})
    for k in {1, 2, cfg.n_experts - 1, cfg.n_experts}:
        adapted = {layer: list(range(k)) for layer in cfg.moe_layers}
        adapted[cfg.moe_layers[-1]] = [0]  # as with --coverage, layers differ
        model = empty_model(cfg, torch.float32)
        attach(model, method, adapted, rank, alpha=1)
        n = sum(map(len, adapted.values()))
        a, b = (rank * (sizes["maps"][i] + n * sizes["expert"][i]) for i in (0, 1))
        lengths = (sizes["maps"][1] + n * sizes["expert"][1]) * sizes["dora"]
        trained = sizes["trainA"] * a + round(sizes["keep"] * b) + lengths
        assert (trained, sizes["base"] + a + b + lengths) == count_params(model, method)

        shares = {layer: (layer + 1) / 7 for layer in cfg.moe_layers}
        rows = cfg.top_k * sum(shares.values())
        flops = 2 * rank * (sum(sizes["maps"]) + rows * sum(sizes["expert"]))
        assert flops == pytest.approx(adapter_flops(model, shares))  # other order of sums


def test_full_fine_tuning_has_no_adapters_to_count():
    sizes = report.costs(parse_config(HUB["olmoe"]), parse_method("fft"), {"rank": None})
    assert sizes["trainBase"]
    assert sizes["maps"] == sizes["expert"] == [0, 0]


@pytest.mark.parametrize("kind", ["visits", "ties", "gates"])
def test_the_first_k_of_each_order_are_what_choose_takes(kind):
    draw = torch.Generator().manual_seed(0)
    scores = {
        layer: torch.rand(16, generator=draw, dtype=torch.float64)
        if kind == "gates"
        else torch.randint(0, 3 if kind == "ties" else 1000, (16,), generator=draw)
        for layer in (1, 2, 5)
    }
    ranked = report.rankings(scores, seed=7)
    assert ranked.keys() == set(RULES) - {"all"}
    for rule, order in ranked.items():
        for k in (1, 2, 7, 15, 16):
            taken = [sorted(ids[:k]) for ids in order]
            assert taken == list(choose(scores, k, rule, seed=7).values())


# ---- what a run keeps ----------------------------------------------------------------------------


def test_a_run_leaves_a_page_whose_numbers_are_those_it_printed(finished):
    folder, out = finished[0] / "r", finished[1]
    assert len(re.findall(r"^report: r/report.html\b.*$", out, re.M)) == 1
    (run,) = data_in(folder / "report.html")["runs"]

    record = json.loads((folder / "run.json").read_text())
    adapted = {int(layer): ids for layer, ids in record["adapted"].items()}
    assert run["adapted"] == list(adapted.values())
    in_training, when_chosen = run["visits"]
    counts = {layer: torch.tensor(in_training["counts"][layer]) for layer in adapted}
    shares = visited_share(counts, adapted)
    assert f"{sum(shares.values()) / len(shares):.1%} of expert visits" in out
    cfg = parse_config(HUB["olmoe"] | {"vocab_size": 1024, "max_position_embeddings": 512})
    model = empty_model(cfg, torch.float32)
    attach(model, parse_method("hellora"), adapted, 4, 8)
    fewer = 1 - adapter_flops(model, shares) / adapter_flops(model, dict.fromkeys(shares, 1.0))
    assert f"cost {fewer:.1%} fewer FLOPs" in out
    assert f"{run['costs']['trained']:,} of {run['costs']['stored']:,} parameters" in out

    # What was counted: every input token of the two steps visits two experts in each layer.
    assert all(sum(of) == 2 * in_training["tokens"] for of in in_training["counts"])
    assert in_training["name"] == "in training, steps 1 to 2"
    hot = json.loads((folder / "hot_experts.json").read_text())
    assert when_chosen["counts"] == list(hot["counts"].values())
    losses = [round(line["loss"], 5) for line in lines(folder / "metrics.jsonl")]
    assert run["loss"]["values"] == losses


def test_the_base_s_answers_are_kept_and_paired_with_those_of_the_run(run):
    before, after = (lines(run / f"answers-tiny-math{part}.jsonl") for part in ("-base", ""))
    assert [r["prompt"] for r in before] == [r["prompt"] for r in after]
    scores = json.loads((run / "results.json").read_text())["tiny-math"]
    assert sum(r["correct"] for r in before) == scores["base_accuracy"] * 4
    for shown in data_in(run / "report.html")["answers"]:
        assert [r["when"] for r in shown["said"]] == ["before training", "after training"]
        pair = [r["text"] for r in shown["said"]]
        at = [r["prompt"] for r in before].index(shown["prompt"])
        assert pair == [report.shortened(of[at]["output"]) for of in (before, after)]


def test_kept_routing_is_that_of_the_trained_model(run):
    model, tokenizer, _ = load_run(run)
    first, line = (lines(run / f"{of}.jsonl")[0] for of in ("answers-tiny-math", "routing"))
    prompt = encode_prompt(first["prompt"], tokenizer, "")
    ids = [*prompt, *first["ids"]]
    assert "".join(line["tokens"]) == first["prompt"] + first["output"]
    assert line["n_prompt"] == len(prompt)
    _, routing = model(torch.tensor([ids]))
    for layer, r in routing.items():
        assert line["experts"][str(layer)] == r.expert_ids[0].tolist()
        kept = torch.tensor(line["gates"][str(layer)])
        torch.testing.assert_close(
            kept, r.probability[0], rtol=0, atol=6e-5
        )  # four decimals are kept


def test_a_run_that_is_already_trained_keeps_the_visits_it_had(tmp_path):
    counted = Catcher(4)
    counted.counts = {0: torch.tensor([3, 1, 0, 0])}
    counted.n_tokens = 2
    report.keep_visits(tmp_path, counted, 3, 5)
    report.keep_visits(tmp_path, Catcher(4), 6, 5)  # gone on after the last step
    kept = json.loads((tmp_path / "visits.json").read_text())
    assert kept == {"steps": [3, 5], "n_tokens": 2, "counts": {"0": [3, 1, 0, 0]}}


@pytest.mark.parametrize("failing", ["template", "collect"])
def test_a_page_that_fails_does_not_fail_the_run(cli, quick, tmp_path, monkeypatch, failing):
    def fault(*_):
        raise ZeroDivisionError("a fault\nof ours")

    if failing == "template":
        monkeypatch.setattr(report, "TEMPLATE", tmp_path / "absent.html")
    else:
        monkeypatch.setattr(report, "collect", fault)
    out = done(cli, "train.py", *quick, "--no-eval")
    assert json.loads((tmp_path / "r" / "run.json").read_text())["finished"]
    assert len(re.findall(r"^.*python report.py --run r$", out, re.M)) == 1
    assert not (tmp_path / "r" / "report.html").exists()


# ---- runs that lack a part -----------------------------------------------------------------------


CHOICES = {
    "gate": ["--score", "gate"],
    "cold": ["--method", "hellora_c"],
    "model": ["--method", "hellora_m"],
    "random": ["--method", "hellora_r", "--seed", 3],
    "answers": ["--count", "answers"],
}


@pytest.mark.parametrize("choice", some_slow(CHOICES, ["cold", "model"]))
def test_the_order_of_the_run_s_own_rule_begins_with_its_experts(cli, quick, tmp_path, choice):
    done(cli, "train.py", *quick, "--no-eval", "--catcher", "forward", *CHOICES[choice])
    (run,) = data_in(tmp_path / "r" / "report.html")["runs"]
    assert [sorted(ids[:2]) for ids in run["ranked"][run["rule"]]] == run["adapted"]


def test_methods_without_a_list_and_unscored_runs_get_the_parts_that_apply(cli, quick, tmp_path):
    for method in ("lora", "fft", "hellora_none"):
        done(cli, "train.py", *quick[:-1], method, "--no-eval", "--method", method)
    done(cli, "train.py", *quick[:-1], "p", "--no-eval", "--coverage", 0.6)
    pages = {n: data_in(tmp_path / n / "report.html") for n in ("lora", "fft", "hellora_none", "p")}
    for name, data in pages.items():
        (run,) = data["runs"]
        assert len(run["visits"]) == (2 if name == "p" else 1)
        assert run["ranked"]  # by the visits of training
        assert run["texts"][0]["tokens"]  # of training rows
        assert data["answers"] == []
        assert ["not scored", "python eval_gsm8k.py --run " + name] in [
            row["values"][0] for row in data["results"]
        ]
    runs = {name: data["runs"][0] for name, data in pages.items()}
    assert runs["lora"]["adapted"] == [list(range(8))] * 2
    assert runs["fft"]["adapted"] == runs["hellora_none"]["adapted"] == [[], []]
    assert runs["fft"]["costs"]["trainBase"]
    assert len({len(ids) for ids in runs["p"]["adapted"]}) >= 1
    assert "60%" in runs["p"]["chosenBy"]

    out = done(cli, "report.py", "--run", *pages, "--out", "all/page.html")
    assert "all/page.html" in out
    data = data_in(tmp_path / "all" / "page.html")
    assert len(data["runs"]) == 4
    assert len({run["name"] for run in data["runs"]}) == 4
    differ = {row["name"] for row in data["settings"] if row["differ"]}
    assert {"method", "coverage"} <= differ
    assert "model" not in differ


def test_a_given_list_without_visits_is_ordered_by_those_of_training(cli, quick, tmp_path):
    (tmp_path / "hot.json").write_text(json.dumps({"experts": {"0": [7, 1], "1": [3, 4]}}))
    done(cli, "train.py", *quick, "--no-eval", "--hot-experts", "hot.json")
    (run,) = data_in(tmp_path / "r" / "report.html")["runs"]
    assert run["adapted"] == [[1, 7], [3, 4]]
    counts = {i: torch.tensor(of) for i, of in enumerate(run["visits"][0]["counts"])}
    chosen = choose(counts, 3, "hot")
    assert [sorted(ids[:3]) for ids in run["ranked"]["hot"]] == list(chosen.values())


def test_a_list_by_routing_weight_is_read_in_full_precision_and_in_order_of_layers(cli, run):
    gates = [0.25] * 8
    gates[3] += 1e-12
    visits = {"1": [1] * 8, "0": [2] * 8}
    hot = {"experts": {"1": [3], "0": [3]}, "counts": visits, "gates": dict.fromkeys("10", gates)}
    (run / "hot_experts.json").write_text(json.dumps(hot | {"score": "gate", "k": 1}))
    done(cli, "report.py", "--run", "r")
    (shown,) = data_in(run / "report.html")["runs"]
    assert [ids[0] for ids in shown["ranked"]["hot"]] == [3, 3]
    assert [of[0] for of in shown["visits"][1]["counts"]] == [2, 1]


def test_settings_that_an_old_run_lacks_are_those_that_it_had(cli, run, tmp_path):
    record = json.loads((run / "run.json").read_text())
    younger = ("count", "clip", "bos", "drop_long")
    old = {name: value for name, value in record.items() if name not in younger}
    old["config"]["head_norm"] = old["config"].pop("qk_head_norm")  # its name before
    shutil.copytree(run, tmp_path / "old")
    (tmp_path / "old" / "run.json").write_text(json.dumps(old))
    done(cli, "report.py", "--run", "r", "old", "--out", "both.html")
    rows = data_in(tmp_path / "both.html")["settings"]
    assert {"count", "clip"} <= {row["name"] for row in rows}
    assert not [row for row in rows if row["differ"]]


def test_a_run_that_has_only_begun_and_one_of_before_have_a_page(cli, run):
    for name in ("visits.json", "routing.jsonl", "hot_experts.json", "adapter.safetensors"):
        (run / name).unlink()
    record = json.loads((run / "run.json").read_text())
    before = {name: value for name, value in record.items() if name != "config"}
    (run / "run.json").write_text(json.dumps(before))
    done(cli, "report.py", "--run", "r")
    (shown,) = data_in(run / "report.html")["runs"]
    assert shown["visits"] == shown["texts"] == []
    assert shown["ranked"] is None
    assert shown["adapted"]

    (run / "metrics.jsonl").unlink()
    early = {name: before[name] for name in before if name not in ("adapted", "trained", "stored")}
    (run / "run.json").write_text(json.dumps(early | {"finished": False}))
    done(cli, "report.py", "--run", "r")
    (shown,) = data_in(run / "report.html")["runs"]
    assert shown["loss"]["values"] == []
    assert shown["adapted"] is None


def test_the_folder_of_a_run_is_enough_without_its_model(cli, run):
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"model": "/no/such/model"}))
    (run / "report.html").unlink()
    done(cli, "report.py", "--run", "r")
    assert data_in(run / "report.html")["runs"][0]["ranked"]


def test_what_is_damaged_or_no_run_ends_in_one_line(cli, run, tmp_path):
    assert "absent" in refused(cli, "report.py", "--run", "absent")
    page = (run / "report.html").read_bytes()
    assert "folder" in refused(cli, "report.py", "--run", "r", "--out", tmp_path)
    for name in ("visits.json", "routing.jsonl", "answers-tiny-math-base.jsonl", "results.json"):
        path = run / name
        sound = path.read_bytes()
        for damage in (sound[: len(sound) // 2], b"[]\n", b"{}\n"):
            path.write_bytes(damage)
            if (name, damage) != ("results.json", b"{}\n"):  # which says that nothing was scored
                assert name in refused(cli, "report.py", "--run", "r")
        path.write_bytes(sound)
    for name, part in (
        ("visits.json", '"1"'),
        ("routing.jsonl", '"1"'),
        ("run.json", '"n_experts"'),
    ):
        path = run / name
        sound = path.read_text()
        path.write_text(sound.replace(part, '"7"'))  # of another model
        assert name in refused(cli, "report.py", "--run", "r")
        path.write_text(sound)
    assert (run / "report.html").read_bytes() == page


def test_steps_without_a_finite_loss_are_gaps_and_long_runs_are_means(tmp_path):
    values = [1.0, math.nan, math.inf, 3.0]
    write_rows(
        tmp_path / "metrics.jsonl", [{"step": i + 1, "loss": v} for i, v in enumerate(values)]
    )
    assert report.loss_curve(tmp_path)["values"] == [1.0, None, None, 3.0]
    write_rows(
        tmp_path / "metrics.jsonl", [{"step": i + 1, "loss": float(i % 3)} for i in range(5999)]
    )
    curve = report.loss_curve(tmp_path)
    assert (curve["every"], curve["steps"]) == (3, 5999)
    assert curve["values"] == [1.0] * 1999 + [0.5]
    json.loads(json.dumps(curve, allow_nan=False))


# ---- whose text it is ----------------------------------------------------------------------------


def test_text_of_rows_and_models_cannot_leave_the_data(cli, quick, tmp_path):
    rows = [{**row, "question": f"{EVIL} {row['question']}"} for row in ROWS]
    write_rows(tmp_path / "rows.jsonl", rows)
    write_rows(tmp_path / "few.jsonl", rows[:4])
    done(cli, "train.py", *quick)
    text = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    template = report.TEMPLATE.read_text(encoding="utf-8")
    for mark in ("<script", "</script", "<!--", "<img"):
        assert text.count(mark) == template.count(mark)
    assert EVIL in data_in(tmp_path / "r" / "report.html")["answers"][0]["prompt"]
    assert ".innerHTML" not in template
    assert "insertAdjacentHTML" not in template


@pytest.mark.parametrize("task", ["tiny-safety", "safety"])
def test_no_text_of_a_safety_task_is_kept_or_shown(cli, toy, tmp_path, monkeypatch, task):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"instruction": f"zebra {n}", "input": "walrus", "output": "heron", "harmful": True}
        for n in range(12)
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    words = ["--model", toy, "--task", task, "--data", data, "--rank", 4, "--k", 2, "--steps", 1]
    done(cli, "train.py", *words, "--out", "r")
    # Even what another command has kept, when it was told to.
    write_rows(tmp_path / "r" / f"answers-{task}.jsonl", [{"prompt": "zebra", "correct": True}])
    write_rows(tmp_path / "r" / "routing.jsonl", [{"tokens": ["zebra"]}])
    done(cli, "report.py", "--run", "r")
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert not re.search("zebra|walrus|heron", page)
    shown = data_in(tmp_path / "r" / "report.html")
    assert shown["harmful"] == [task]
    assert shown["runs"][0]["visits"]


class Bytes:
    """A tokenizer of single bytes. Like Mixtral's it drops a space at the start of a text."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace").removeprefix(" ")


@pytest.mark.parametrize("text", [" a b", "a字b", "字", "a\ufffd", "\ufffdb", ""])
def test_the_texts_of_tokens_add_up_to_the_text(text):
    ids = list(text.encode())
    parts = report.pieces(Bytes(), ids)
    assert len(parts) == len(ids)
    assert "".join(parts) == text.removeprefix(" ")


@pytest.mark.parametrize("cut", [b"a\xe5\xad", b"\xe5a", b"\xff\xff"])
def test_broken_characters_stay_in_place(cut):
    assert "".join(report.pieces(Bytes(), list(cut))) == cut.decode("utf-8", "replace")


def test_a_page_of_a_large_model_stays_below_a_megabyte(tmp_path):
    draw = torch.Generator().manual_seed(0)
    hub = HUB["olmoe"] | {
        "num_hidden_layers": 16, "num_experts": 64, "num_experts_per_tok": 8,
    }  # fmt: skip
    cfg = parse_config(hub)
    layers = [str(layer) for layer in cfg.moe_layers]
    counts = {i: torch.randint(0, 10**6, (64,), generator=draw).tolist() for i in layers}
    routing = {
        "n_prompt": 99,
        "tokens": ["\u4e00" * 3] * 256,
        "experts": {i: torch.randint(0, 64, (256, 8), generator=draw).tolist() for i in layers},
        "gates": {i: torch.rand(256, 8, generator=draw).tolist() for i in layers},
    }
    record = {
        "model": "m", "task": "gsm8k", "method": "hellora", "dtype": "bf16", "finished": True,
        "k": 8, "rank": 32, "seed": 0, "trained": 1, "stored": 2, "config": asdict(cfg),
        "adapted": {i: list(range(8)) for i in layers},
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(record))
    visits = {"steps": [1, 9999], "n_tokens": 10**8, "counts": counts}
    (tmp_path / "visits.json").write_text(json.dumps(visits))
    write_rows(tmp_path / "routing.jsonl", [routing] * 4)
    write_rows(
        tmp_path / "metrics.jsonl", [{"step": i + 1, "loss": 1 / (i + 3)} for i in range(9999)]
    )
    answer = {"prompt": "p" * 5000, "gold": "1", "output": "o" * 5000, "correct": True}
    write_rows(
        tmp_path / "answers-gsm8k.jsonl", [answer | {"prompt": f"{i}" * 5000} for i in range(99)]
    )
    assert report.write_page([tmp_path], tmp_path / "report.html") < 1_000_000
    texts = data_in(tmp_path / "report.html")["runs"][0]["texts"]
    assert all(len(t["tokens"]) + t["cut"] == 256 and t["tokens"] for t in texts)


# ---- the committed page --------------------------------------------------------------------------


def test_the_committed_page_is_of_the_readme_s_run_and_of_the_present_template():
    path = ROOT / "docs" / "report.html"
    data = data_in(path)
    assert path.read_text(encoding="utf-8") == report.page(data)
    (run,) = data["runs"]
    settings = {row["name"]: row["values"][0] for row in data["settings"]}
    wanted = {"model": "tiny", "task": "tiny-math", "method": "hellora", "k": "8", "seed": "0"}
    assert wanted.items() <= settings.items()
    kept = json.loads((ROOT / "docs/results/tiny-math-hellora.json").read_text())
    assert run["adapted"] == list(kept["hot_experts"]["0"].values())
    accuracy = {row["name"]: row["values"][0][0] for row in data["results"]}["accuracy"]
    assert accuracy == f"{100 * kept['seeds']['0']['tiny-math']['accuracy']:.1f} %"
    assert path.stat().st_size < 1_000_000
    assert not re.search(r"(?<![\w.])/(work|root|home|tmp)/", path.read_text(encoding="utf-8"))
