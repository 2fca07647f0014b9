"""Benchmarks run; what they measure is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_ablation_runs_resumes_and_reports(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "ablation.py"), "--quick"]
    command += ["--work", str(tmp_path)]
    first = subprocess.run(command, check=True, capture_output=True, text=True)
    assert first.stderr.count("seed 0") == 3
    cells = sorted((tmp_path / "quick").glob("*.json"))
    assert len(cells) == 3
    for file in cells:
        cell = json.loads(file.read_text())
        assert sum(cell["counts"]) == 32
        assert 5 < cell["psnr"] < 60
        assert cell["peak_gib"] > 0.1
    cells[0].unlink()
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert again.stderr.count("seed 0") == 1, "finished cells ran again"
    rows = [line for line in again.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 3
