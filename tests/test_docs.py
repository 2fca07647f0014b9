"""Every command and every piece of code in docs/ runs, page by page."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fxquant.cli import main

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_four_pages_are_there():
    names = {page.stem for page in PAGES}
    assert {"use", "how_it_works", "models", "write_a_pass", "write_a_kernel"} <= names


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.stem != "models"], ids=lambda page: page.stem
)
def test_everything_on_the_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "docs"}
    blocks = BLOCK.findall(page.read_text())
    assert blocks
    for language, text in blocks:
        if language == "python":
            exec(compile(text, page.name, "exec", dont_inherit=True), names)
            continue
        for command in text.splitlines():
            words = shlex.split(command, comments=True)
            assert words[0] == "fxquant", command
            assert main(words[1:]) == (1 if words[1] == "diff" else 0), command
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page):
    root = DOCS.parent
    folders = "fxquant|passes|kernels|examples|tests|benchmarks"
    named = re.findall(rf"`((?:{folders})/[\w/.]+)`", page.read_text())
    hypothetical = [n for n in named if "double_negation" in n]
    for name in named:
        assert name in hypothetical or (root / name).exists(), name
