"""Saves: what comes back, what is refused, and what is fallen back to."""

import pytest
import torch
from test_hellora import adapted, tokens

import state


def stepped(folder, seed, steps=2):
    """A model with adapters after some steps of AdamW, and its optimizer."""
    model = adapted(folder, "hellora", seed=seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01, fused=True)
    for i in range(steps):
        batch = tokens(2, 9, seed=i)
        model(batch[:, :-1], targets=batch[:, 1:])[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_a_save_comes_back_with_weights_and_optimizer(olmoe, tmp_path):
    model, optimizer = stepped(olmoe, 1)
    assert state.resume(tmp_path, model, optimizer) == 0
    state.save(tmp_path, 2, model, optimizer)
    other, its_optimizer = stepped(olmoe, 7, steps=0)
    assert state.resume(tmp_path, other, its_optimizer) == 2
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert optimizer.state[p].keys() == its_optimizer.state[q].keys()
        for key, t in optimizer.state[p].items():
            assert torch.equal(t, its_optimizer.state[q][key]), (name, key)


def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == "cut":
        raw = raw[:-40]
    elif how == "empty":
        raw = b""
    elif how == "flipped":
        raw[-5] ^= 1  # within the last tensor: the file's form stays right
    else:
        raw = b"PK garbage" * 100
    path.write_bytes(raw)


@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "garbage"])
def test_a_damaged_save_is_passed_over_for_the_one_before(olmoe, tmp_path, how, capfd):
    model, optimizer = stepped(olmoe, 1)
    for step in (1, 2, 3):
        state.save(tmp_path, step, model, optimizer)
    assert sorted(p.name for p in tmp_path.glob("*state*")) == [
        "state-before.safetensors",
        "state.safetensors",
    ]
    assert state.load(tmp_path).step == 3
    damage(tmp_path / "state.safetensors", how)
    assert state.load(tmp_path).step == 2
    assert "state.safetensors is damaged" in capfd.readouterr().out
    damage(tmp_path / "state-before.safetensors", how)
    with pytest.raises(ValueError, match="delete what is damaged"):
        state.load(tmp_path)


def test_between_two_renames_the_save_before_is_there(olmoe, tmp_path):
    """save() renames the last save, then gives the new one its name: a kill may fall in between."""
    model, optimizer = stepped(olmoe, 1)
    state.save(tmp_path, 1, model, optimizer)
    (tmp_path / "state.safetensors").rename(tmp_path / "state-before.safetensors")
    assert state.load(tmp_path).step == 1
