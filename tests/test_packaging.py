"""What gets installed, and what setup.py does not do."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = ("setup.py", "pyproject.toml", "LICENSE", "README.md")
FOLDERS = {"fxquant": "fxquant", "passes": "fxquant/passes", "kernels": "fxquant/kernels"}
DATA = {".safetensors", ".json", ".md", ".cpp", ".cu", ".cuh", ".h", ".typed"}

# Runs setup.py with setup() replaced, and tells what it loaded and started on the way.
PROBE = """
import runpy, setuptools, subprocess, sys
def started(*args, **kwargs): raise AssertionError(f"setup.py started {args}")
subprocess.Popen.__init__ = started
setuptools.setup = lambda **kwargs: print(kwargs["name"], kwargs["version"])
runpy.run_path("setup.py")
print(sorted({name.partition(".")[0] for name in sys.modules} & {"fxquant", "torch", "diffusers"}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """File names in a wheel built from a copy of the tree, without any network."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in PROJECT:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(tree)], check=True, cwd=out)
    (file,) = out.glob("fxquant-*.whl")
    return set(zipfile.ZipFile(file).namelist())


def expected() -> set[str]:
    """Where every module and data file of the three folders should be in the wheel."""
    return {
        f"{target}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in {".py", *DATA} and "__pycache__" not in file.parts
    }


def test_the_wheel_holds_every_source_and_data_file_and_nothing_else(wheel: set[str]) -> None:
    installed = {name for name in wheel if ".dist-info/" not in name}
    assert installed == expected()


@pytest.mark.parametrize(
    "name",
    [
        "fxquant/py.typed",
        "fxquant/compiler.py",
        "fxquant/passes/pipelines.py",
        "fxquant/kernels/ops.py",
    ],
)
def test_the_wheel_holds(wheel: set[str], name: str) -> None:
    assert name in wheel


@pytest.mark.parametrize("suffix", [".safetensors", ".cpp"])
def test_the_wheel_holds_data_of_kind(wheel: set[str], suffix: str) -> None:
    assert [name for name in wheel if name.endswith(suffix)]


def test_every_folder_with_modules_is_a_package() -> None:
    modules = (file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
    folders = {file.parent for file in modules if "__pycache__" not in file.parts}
    assert not [
        str(f.relative_to(ROOT)) for f in sorted(folders) if not (f / "__init__.py").exists()
    ]


def test_setup_imports_and_starts_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    name, loaded = done.stdout.splitlines()
    assert name.startswith("fxquant 0.")
    assert loaded == "[]"
