"""What is counted, what is chosen from it, and the list on disk."""

import json

import pytest
import torch

from catcher import FEW, Catcher, HotList, choose, count_visits, overlap, sample, visited_share
from moe_model import MoEModel, Routing
from plumbing.data import Encoded

COUNTS = {0: torch.tensor([5, 0, 9, 9, 1, 2]), 1: torch.tensor([0, 8, 1, 0, 0, 7])}


def routing(ids, gate=None):
    ids = torch.tensor(ids)
    return Routing(
        ids,
        torch.ones(ids.shape) if gate is None else torch.tensor(gate),
        torch.zeros(*ids.shape[:2], 6),
    )


def test_visits_of_real_tokens_are_counted_and_padding_is_not():
    catcher = Catcher(6)
    real = torch.tensor([[True, True], [True, False]])
    for _ in range(2):
        catcher.add({3: routing([[[0, 1], [1, 2]], [[5, 1], [4, 4]]])}, real)
    assert catcher.scores("count")[3].tolist() == [2, 6, 2, 0, 0, 2]
    assert catcher.n_tokens == 6


def test_gate_scores_are_mean_routing_weights_of_a_token():
    catcher = Catcher(6)
    gates = [[[0.5, 0.25], [0.5, 0.125]]]
    catcher.add({0: routing([[[0, 1], [1, 2]]], gates)}, torch.ones(1, 2, dtype=torch.bool))
    assert catcher.scores("gate")[0].tolist() == [0.25, 0.375, 0.0625, 0, 0, 0]


@pytest.mark.parametrize(
    ("rule", "k", "want"),
    [
        ("hot", 2, {0: [2, 3], 1: [1, 5]}),
        ("hot", 1, {0: [2], 1: [1]}),  # experts 2 and 3 tie: the lower id wins
        ("cold", 2, {0: [1, 4], 1: [0, 3]}),  # 0, 3 and 4 tie in layer 1
        ("global-hot", 3, {0: [2, 3, 5], 1: [2, 3, 5]}),  # sums 5 8 10 9 1 9
        ("all", 2, {0: list(range(6)), 1: list(range(6))}),
    ],
)
def test_rules_on_hand_made_counts(rule, k, want):
    assert choose(COUNTS, k, rule) == want


def test_random_experts_depend_on_the_seed_and_differ_by_layer():
    scores = {i: torch.zeros(64) for i in range(4)}
    a, b = choose(scores, 8, "random", 0), choose(scores, 8, "random", 1)
    assert a == choose(scores, 8, "random", 0)
    assert a != b
    assert len({tuple(ids) for ids in a.values()}) == 4


def test_coverage_takes_the_fewest_experts_that_have_the_share():
    """Layer 0 has 9 9 5 2 1 0 of 26 visits, layer 1 has 8 7 1 of 16."""
    assert choose(COUNTS, 2, "hot", coverage=0.3) == {0: [2], 1: [1]}
    assert choose(COUNTS, 2, "hot", coverage=0.5) == {0: [2, 3], 1: [1]}
    assert choose(COUNTS, 2, "hot", coverage=0.9) == {0: [0, 2, 3, 5], 1: [1, 5]}
    assert choose(COUNTS, 2, "hot", coverage=1.0) == {0: [0, 2, 3, 4, 5], 1: [1, 2, 5]}


@pytest.mark.parametrize("k", [0, 7, -1])
def test_a_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k}, but a layer has 6 experts"):
        choose(COUNTS, k, "hot")


def test_overlap_is_jaccard_and_share_is_of_visits():
    assert overlap({0: [1, 2, 3]}, {0: [2, 3, 4]}) == {0: 0.5}
    assert visited_share(COUNTS, {0: [2, 3], 1: [1]}) == {0: pytest.approx(18 / 26), 1: 0.5}


def test_counting_does_not_depend_on_how_examples_are_batched(olmoe):
    model = MoEModel.from_pretrained(olmoe)
    draw = torch.Generator().manual_seed(0)
    data = [
        Encoded(torch.randint(0, 96, (n,), generator=draw).tolist(), 1) for n in (3, 9, 5, 12, 7)
    ]
    one, all_ = (count_visits(model, data, size, "").scores("count") for size in (1, 5))
    assert all(torch.equal(one[i], all_[i]) for i in one)
    n_inputs = sum(len(e.ids) - 1 for e in data)
    assert all(c.sum() == n_inputs * model.cfg.top_k for c in one.values())


def test_the_sample_is_seeded_and_of_the_asked_size():
    data = list(range(1000))
    assert len(sample(data, 0.1, 0)) == 100
    assert sample(data, 0.1, 0) == sample(data, 0.1, 0) != sample(data, 0.1, 1)
    assert sorted(sample(data, 1.0, 3)) == data
    assert len(sample(data[:3], 0.1, 0)) == 1


def test_a_list_survives_the_disk_and_is_refused_by_another_model(olmoe, tmp_path):
    cfg = MoEModel.from_pretrained(olmoe).cfg
    counts = {0: [5, 0, 9, 9, 1, 2, 0, 0], 1: [0, 8, 1, 0, 0, 7, 0, 0]}
    hot = HotList(task="x", k=2, n_tokens=9, experts={0: [2, 3], 1: [1, 5]}, counts=counts)
    hot.write(tmp_path / "hot.json")
    assert HotList.read(tmp_path / "hot.json", cfg) == hot
    assert "69.2%" in hot.show()  # 18 of 26 visits
    # as ESFT writes it
    (tmp_path / "bare.json").write_text(json.dumps({"experts": {"0": [3, 2], "1": [0]}}))
    assert HotList.read(tmp_path / "bare.json", cfg).experts == {0: [2, 3], 1: [0]}
    for bad in (
        {"0": [2]},
        {"0": [2], "1": [8]},
        {"0": [2], "1": [1], "2": [1]},
        {"0": ["x"], "1": []},
        [1],
    ):
        (tmp_path / "bad.json").write_text(json.dumps({"experts": bad}))
        with pytest.raises(ValueError, match=r"bad\.json"):
            HotList.read(tmp_path / "bad.json", cfg)


@pytest.mark.parametrize("rule", ["hot", "cold", "global-hot", "random"])
def test_a_choice_from_few_visits_is_doubted(rule):
    few = HotList(rule=rule, k=1, experts={0: [2]}, counts={0: [1, 0, FEW, 2]})
    enough = HotList(rule=rule, k=1, experts={0: [2]}, counts={0: [0, 0, 4 * FEW, 0]})
    assert bool(few.doubt()) == (rule != "random")  # which rests on no visit
    assert few.show().endswith(few.doubt()) and few.doubt().count("\n") == 0
    assert not enough.doubt()
    assert not HotList(experts={0: [2]}).doubt()  # a given list, without visits
    every = HotList(rule=rule, k=4, experts={0: [0, 1, 2, 3]}, counts=few.counts)
    assert not every.doubt()  # no rows would give other experts


@pytest.mark.parametrize("key", ["x", "00", " 0", "-1", "9" * 5000])
def test_visits_of_no_layer_are_refused_by_the_name_of_the_file(key, olmoe, tmp_path):
    cfg = MoEModel.from_pretrained(olmoe).cfg
    saved = {"experts": {"0": [3], "1": [0]}, "counts": {"0": [1] * 8, "1": [1] * 8, key: [1] * 8}}
    (tmp_path / "hot.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"hot\.json"):
        HotList.read(tmp_path / "hot.json", cfg)


@pytest.mark.parametrize(
    ("flags", "at_fault"),
    [
        (["--k", 3], "--k"),
        (["--model", "olmoe-1b-7b"], "--model"),
        (["--batch-size", 4], "--batch-size"),
    ],
)
def test_a_list_that_is_only_shown_takes_no_flag_of_counting(cli, flags, at_fault):
    code, _, err = cli("catcher.py", "--run", "r", *flags)
    assert code == 2
    assert f"{at_fault} is for counting" in err
