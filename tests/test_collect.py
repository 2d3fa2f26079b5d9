"""Several runs in one file: the score of each kind of task, and runs that do not belong together."""

import pytest

from paper.collect import summary
from run import write_json

SCORED = {  # as the three evaluations write them
    "tiny-math": {"accuracy": 0.5, "accuracy_flexible": 0.7, "base_accuracy": 0.1},
    "humaneval": {"pass@1": 0.2, "pass@5": 0.3, "correct": 9},
    "tiny-safety": {"refusal_rate": 0.9, "harmless_refused": 3},
}


def finished(folder, seed, scores, model="m"):
    folder.mkdir()
    run = {"model": "tiny", "task": "tiny-code", "method": "hellora", "dtype": "fp32", "finished": True}
    hashes = {"model": model, "data": "d", "code": "c"}
    write_json(folder / "run.json", run | {"seed": seed, "hashes": hashes})
    write_json(folder / "results.json", scores)
    return folder


def test_every_task_gives_its_own_score_with_mean_and_spread(tmp_path):
    half = {task: {name: value / 2 for name, value in entry.items()} for task, entry in SCORED.items()}
    tried = {"humaneval-part": {"pass@1": 1.0}}  # a trial of one of the runs is left out
    more = {"pretraining": {"cross_entropy": 1.0}}  # of no task: kept as it is
    folders = [finished(tmp_path / "a", 0, SCORED | tried | more), finished(tmp_path / "b", 1, half | more)]
    value = summary(folders)
    # of x and x / 2: mean 3 x / 4, standard deviation x / sqrt(8)
    for score, task, x in (
        ("accuracy", "tiny-math", 0.5),
        ("pass@1", "humaneval", 0.2),
        ("refusal_rate", "tiny-safety", 0.9),
    ):
        assert value[score] == {task: pytest.approx({"mean": 0.75 * x, "std": x / 8**0.5})}
    assert value["seeds"] == {"0": SCORED | more, "1": half | more}


def test_what_was_not_scored_everywhere_or_is_of_another_model_is_refused(tmp_path):
    first = finished(tmp_path / "a", 0, SCORED)
    less = {task: entry for task, entry in SCORED.items() if task != "humaneval"}
    with pytest.raises(ValueError, match="humaneval"):
        summary([first, finished(tmp_path / "b", 1, less)])
    with pytest.raises(ValueError, match="model"):
        summary([first, finished(tmp_path / "c", 2, SCORED, model="other")])
