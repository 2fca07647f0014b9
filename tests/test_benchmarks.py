"""Benchmarks run; what they measure is not looked at."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def run(script: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / script, *options]
    return subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.mark.slow  # compiles the digits model four times
def test_the_ablation_runs_resumes_and_reports(tmp_path: Path) -> None:
    command = ("ablation.py", "--quick", "--work", tmp_path)
    first = run(*command)
    assert first.stderr.count("seed 0") == 3
    cells = sorted((tmp_path / "quick").glob("*.json"))
    assert len(cells) == 3
    for file in cells:
        cell = json.loads(file.read_text())
        assert sum(cell["counts"]) == 32
        assert 5 < cell["psnr"] < 60
        assert cell["peak_gib"] > 0.1
    cells[0].unlink()
    again = run(*command)
    assert again.stderr.count("seed 0") == 1, "finished cells ran again"
    rows = [line for line in again.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 3


def test_cpu_unet_measures_what_is_installed_and_says_what_is_not(tmp_path: Path) -> None:
    names = ["bf16 eager", "OpenVINO int8", "ONNX Runtime int8", "fxquant W8A8"]
    options = ["--arch", "digits", "--rounds", "2", "--calls", "1", "--results", tmp_path]
    shown = run("cpu_unet.py", *options, "--profile", "--systems", *names).stdout
    report = json.loads((tmp_path / "cpu_unet_digits.json").read_text())
    rows = {row["system"]: row for row in report["systems"]}
    assert list(rows) == ["fp32 eager", *names]
    measured = {name: row for name, row in rows.items() if "not_measured" not in row}
    assert {"fp32 eager", "bf16 eager", "fxquant W8A8"} <= set(measured)
    for name in names:
        assert name in measured or "not installed" in rows[name]["not_measured"], rows[name]
        assert name in shown
    for name, row in measured.items():
        check_row(row)
        assert (row["relative_l2_to_fp32"] == 0) == (name == "fp32 eager")
    assert rows["fxquant W8A8"]["relative_l2_to_fp32"] < 0.1
    assert any(kind.startswith("fxquant.") for kind, *_ in rows["fxquant W8A8"]["profile"])
    assert (tmp_path / "cpu_unet_digits.png").stat().st_size > 1000


def test_commands_are_kept_without_places() -> None:
    code = "import sys, common; sys.argv[1:] = sys.argv[2:]; print(common.command_line())"
    words = [
        "x.py",
        "--folder",
        "/some/where",
        "--results=../other/place",
        "--systems",
        "fp32 eager",
    ]
    shown = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True,
                           text=True, cwd=ROOT / "benchmarks").stdout  # fmt: skip
    assert shown.strip().endswith("--folder where --results=place --systems 'fp32 eager'")


def test_results_say_nothing_of_where_they_were_made() -> None:
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert not re.search(r"[\"' =](/\w|[A-Z]:\\)", file.read_text()), file.name


def check_row(row: dict[str, Any]) -> None:
    seconds = row["seconds"]
    assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
    assert len(row["rounds_seconds"]) == 2
    assert row["first_step_seconds"] > 0
    assert row["relative_l2_to_fp32"] < 0.5
    for key in ("peak_bytes", "steps_peak_bytes"):
        assert 2**24 < row[key] < 2**32
    assert row["resident_bytes"] <= row["steps_peak_bytes"]
    assert sum(t for *_, t in row["profile"]) > 0


@pytest.mark.slow
def test_systems_that_do_not_fit_together_are_measured_in_groups(tmp_path: Path) -> None:
    options = ["--arch", "digits", "--rounds", "1", "--calls", "1", "--results", tmp_path]
    run("cpu_unet.py", *options, "--memory", "1.2", "--systems", "bf16 eager", "fxquant W8A8")
    report = json.loads((tmp_path / "cpu_unet_digits.json").read_text())
    rows = {row["system"]: row for row in report["systems"]}
    assert sorted(row["group"] for row in rows.values()) == [0, 0, 1]
    assert all(row["speedup_over_bf16_eager"] > 0 for row in rows.values())


def test_a_system_that_takes_too_much_memory_says_so(tmp_path: Path) -> None:
    options = ["--arch", "digits", "--rounds", "1", "--calls", "1", "--results", tmp_path]
    run("cpu_unet.py", *options, "--memory", "0.1", "--systems", "fp32 eager")
    report = json.loads((tmp_path / "cpu_unet_digits.json").read_text())
    assert "needs more than" in report["systems"][0]["not_measured"]


@pytest.mark.slow
def test_scaling_runs_and_reports(tmp_path: Path) -> None:
    run("scaling.py", "--quick", "--results", tmp_path)
    report = json.loads((tmp_path / "scaling_digits.json").read_text())
    assert [point["batch"] for point in report["points"]] == [2, 4]
    for point in report["points"]:
        assert [row["system"] for row in point["systems"]] == ["bf16 eager", "fxquant W8A8"]
        assert all(row["seconds"]["median"] > 0 for row in point["systems"])
    assert (tmp_path / "scaling_digits.png").stat().st_size > 1000


def test_attention(tmp_path: Path) -> None:
    run("attention.py", "--quick", "--rounds", "2", "--results", tmp_path)
    (row,) = json.loads((tmp_path / "attention_cpu.json").read_text())["shapes"].values()
    errors = {name: found["error"] for name, found in row["systems"].items()}
    assert errors["fxquant bf16"] < 0.01
    assert errors["fxquant int8"] < 0.05


def test_producers(tmp_path: Path) -> None:
    shown = run("producers.py", "--quick", "--rounds", "2", "--results", tmp_path).stdout
    (row,) = json.loads((tmp_path / "producers_cpu.json").read_text())["shapes"]
    for name, places in row["operators"].items():
        assert name in shown
        assert all(place["bytes_per_s"] > 0 for place in places.values())
