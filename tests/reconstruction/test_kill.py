"""A reconstruction killed at a random moment resumes to the bits of an undisturbed one."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
torch.set_num_threads(2)
import fxquant
from fxquant import assets
from fxquant.calibration import record
from fxquant.evaluate.digits import balanced_labels, sample_digits
from fxquant.recipe import Recipe

unet, scheduler = assets.load_digits_unet(), assets.load_digits_scheduler()
calls = record(unet, lambda: sample_digits(unet, scheduler, balanced_labels(2), steps=8))
recipe = Recipe.parse("w4a8").with_(reconstruction={"iters": 12, "samples": 48, "batch": 16})
print("ready", flush=True)
fxquant.compile(unet, calls, recipe, resume=sys.argv[1]).save_pretrained(sys.argv[2])
"""


def start(checkpoints: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(checkpoints), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))


def finished(checkpoints: Path, out: Path) -> tuple[dict[str, str], float]:
    """Run to the end; digests of the artefact's files, and the seconds after it was ready."""
    with start(checkpoints, out) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        started = time.monotonic()
        process.communicate(timeout=300)
    assert process.returncode == 0
    digests = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(out.iterdir())}
    return digests, time.monotonic() - started


def killed(checkpoints: Path, out: Path, seconds: float) -> None:
    """Kill it so long after the model is ready, whatever it is doing."""
    with start(checkpoints, out) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(seconds)
        process.kill()


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_the_same_bits(tmp_path: Path) -> None:
    undisturbed, seconds = finished(tmp_path / "whole", tmp_path / "expected")
    moments = random.Random(0)
    reached = set()
    for k in range(10):
        checkpoints, out = tmp_path / f"kept{k}", tmp_path / f"out{k}"
        killed(checkpoints, out, moments.uniform(0.1, 0.95) * seconds)
        reached.add(len(list(checkpoints.glob("unit_*.safetensors"))))
        assert finished(checkpoints, out)[0] == undisturbed
    assert len(reached) > 3, f"the kills all hit the same moment: {reached} units were finished"
