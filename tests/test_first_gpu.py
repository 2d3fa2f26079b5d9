"""The parts of paper.first_gpu fail one by one. .ci/run rehearses all of them."""

import json
import os
import signal
import time

import pytest
import torch

from paper import first_gpu


def fine(at):
    return {"verdict": f"on {at.device}"}


def broken(at):
    raise RuntimeError("CUDA error: an illegal memory access\nand more lines")


def hangs(at):
    time.sleep(60)


def dies(at):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_part_that_fails_hangs_or_dies_says_so_and_costs_itself_alone():
    found = {
        part.__name__: first_gpu.attempt(part, 5 if part is hangs else 30, rehearse=True)
        for part in (broken, hangs, dies, fine)
    }
    assert found["broken"]["failed"] == "RuntimeError: CUDA error: an illegal memory access"
    assert "5 s" in found["hangs"]["failed"]
    assert "-9" in found["dies"]["failed"]
    assert found["fine"]["verdict"] == "on cpu"


def too_large(at):
    torch.empty(1 << 60)


def test_a_part_that_is_too_large_for_the_card_has_not_failed():
    found = first_gpu.attempt(too_large, 30, rehearse=True)
    assert "failed" not in found
    assert first_gpu.mark(found) == "look at it"


def test_what_is_known_is_written_whatever_comes_after(tmp_path, monkeypatch):
    def parts():
        return {"card": (first_gpu.card, 30), "broken": (broken, 30), "fine": (fine, 30)}

    monkeypatch.setattr(first_gpu, "parts", parts)
    assert first_gpu.run(tmp_path, rehearse=True) == ["broken"]
    (written,) = tmp_path.glob("first-gpu-*.json")
    record = json.loads(written.read_text())
    assert list(record["parts"]) == ["card", "broken", "fine"]
    page = written.with_suffix(".md").read_text()
    assert "| broken | failed | RuntimeError" in page
    assert "on cpu" in page


def test_without_a_gpu_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match="--rehearse"):
        first_gpu.run(tmp_path, rehearse=False)
    assert not [*tmp_path.iterdir()]
