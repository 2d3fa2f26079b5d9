"""Saves: what comes back, what is refused, and what is fallen back to."""

import pytest
import torch
from test_hellora import adapted, tokens

from hellora import adapter_state
from plumbing import saves


def stepped(folder, seed, steps=2):
    """A model with adapters after some steps of AdamW, and its optimizer."""
    model = adapted(folder, "hellora", seed=seed)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 0.01, fused=True
    )
    for i in range(steps):
        batch = tokens(2, 9, seed=i)
        model(batch[:, :-1], targets=batch[:, 1:])[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(folder, step, model, optimizer):
    saves.save(folder, step, adapter_state(model), model, optimizer)


def resumed(folder, model, optimizer):
    return saves.resume(folder, adapter_state(model), model, optimizer)


def test_a_save_comes_back_with_weights_and_optimizer(olmoe, tmp_path):
    model, optimizer = stepped(olmoe, 1)
    assert resumed(tmp_path, model, optimizer) == 0
    save(tmp_path, 2, model, optimizer)
    other, its_optimizer = stepped(olmoe, 7, steps=0)
    assert resumed(tmp_path, other, its_optimizer) == 2
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
        save(tmp_path, step, model, optimizer)
    assert sorted(p.name for p in tmp_path.glob("*state*")) == [
        "state-before.safetensors",
        "state.safetensors",
    ]
    assert saves.load(tmp_path).step == 3
    damage(tmp_path / "state.safetensors", how)
    assert saves.load(tmp_path).step == 2
    assert "state.safetensors" in capfd.readouterr().out
    damage(tmp_path / "state-before.safetensors", how)
    with pytest.raises(ValueError, match="state"):
        saves.load(tmp_path)


@pytest.mark.parametrize("kills", [1, 2])
def test_a_kill_between_renames_loses_nothing_even_after_damage(
    olmoe, tmp_path, kills, monkeypatch
):
    """The worst case: the last save is damaged, and the next is stopped between its renames."""
    model, optimizer = stepped(olmoe, 1)
    save(tmp_path, 1, model, optimizer)
    save(tmp_path, 2, model, optimizer)
    damage(tmp_path / "state.safetensors", "flipped")
    rename, done = type(tmp_path).replace, []

    def stopped(self, to):
        if not self.name.startswith("."):
            done.append(to)
            if len(done) == kills:
                raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(type(tmp_path), "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 3, model, optimizer)
    monkeypatch.undo()
    assert saves.load(tmp_path).step == 3
    save(tmp_path, 4, model, optimizer)
    assert saves.load(tmp_path).step == 4


@pytest.mark.parametrize(
    ("old", "new"), [(b'"F32"', b'"I32"'), (b'"shape":[4,32]', b'"shape":[32,4]')]
)
def test_a_changed_type_or_shape_is_damage(olmoe, tmp_path, old, new):
    model, optimizer = stepped(olmoe, 1)
    save(tmp_path, 1, model, optimizer)
    path = tmp_path / "state.safetensors"
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new, 1))
    with pytest.raises(ValueError, match="state"):
        saves.load(tmp_path)
