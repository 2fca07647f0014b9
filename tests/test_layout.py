"""The rules of the tree: who may import whom, how long a file gets, what each pass comes with."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("fxquant", "passes", "kernels")
LINE_BUDGET = 400
SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h"}
KNOW_PASSES = ("compiler.py", "cli")  # inside fxquant/


def sources(*folders: str, suffixes: frozenset[str] | set[str] = frozenset({".py"})) -> list[Path]:
    """Every source file of the folders."""
    files = (file for folder in folders for file in (ROOT / folder).rglob("*"))
    return sorted(file for file in files if file.suffix in suffixes)


def shown(files: Iterator[Path] | list[Path]) -> list[str]:
    return [str(file.relative_to(ROOT)) for file in files]


def imported(code: str) -> set[str]:
    """Dotted names that the code imports, anywhere in it; `from a import b` counts as a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imports_below(file: Path, *packages: str) -> bool:
    """Whether the file imports one of the packages or anything inside it."""
    names = imported(file.read_text(encoding="utf-8"))
    return any(f"{name}.".startswith(f"{package}.") for name in names for package in packages)


def passes() -> list[Path]:
    """The files that hold one pass each: passes/GROUP/NAME.py."""
    return [file for file in sorted((ROOT / "passes").glob("*/*.py")) if file.stem != "__init__"]


def test_every_pass_has_a_test() -> None:
    tests = {file.name for file in (ROOT / "tests" / "passes").rglob("test_*.py")}
    assert not shown([file for file in passes() if f"test_{file.name}" not in tests])


def test_every_pass_has_a_golden() -> None:
    goldens = {file.stem for file in (ROOT / "tests" / "passes").glob("**/goldens/*.txt")}
    assert not shown([file for file in passes() if file.stem not in goldens])


def test_no_source_file_is_too_long() -> None:
    lengths = {
        file: len(file.read_text(encoding="utf-8").splitlines())
        for file in sources(*SOURCES, suffixes=SUFFIXES)
    }
    assert not shown([file for file, length in lengths.items() if length > LINE_BUDGET])


def test_only_the_compiler_and_the_commands_know_the_passes() -> None:
    others = [
        file
        for file in sources("fxquant")
        if file.relative_to(ROOT / "fxquant").parts[0] not in KNOW_PASSES
    ]
    assert others
    assert not shown([file for file in others if imports_below(file, "fxquant.passes")])


def test_kernels_know_no_graph() -> None:
    files = sources("kernels")
    assert files
    forbidden = [f for f in files if imports_below(f, "fxquant.graph", "fxquant.passes")]
    assert not shown(forbidden)


def test_every_public_module_says_what_it_is() -> None:
    public = [f for f in sources(*SOURCES) if f.stem == "__init__" or not f.stem.startswith("_")]
    assert public
    silent = [f for f in public if not ast.get_docstring(ast.parse(f.read_text(encoding="utf-8")))]
    assert not shown(silent)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import fxquant.passes", True),
        ("import fxquant.passes.lower.x as y", True),
        ("from fxquant import passes", True),
        ("def f():\n    from fxquant.passes.pipelines import LOWER", True),
        ("import fxquant.passes_of_time", False),
        ("from fxquant import graph", False),
        ("x = 'import fxquant.passes'", False),
    ],
)
def test_an_import_is_seen_however_it_is_written(tmp_path: Path, code: str, found: bool) -> None:
    file = tmp_path / "module.py"
    file.write_text(code)
    assert imports_below(file, "fxquant.passes") is found
