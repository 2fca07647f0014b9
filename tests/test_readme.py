"""README says what is there: the code runs, every pass and command is listed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fxquant.cli import main, parser
from fxquant.cli.passes import table

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_first_example_runs(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code
    names: dict = {}
    exec(code.group(1), names)
    assert names["images"].shape == (10, 1, 16, 16)
    assert "layers w8a8" in capsys.readouterr().out


def test_the_pass_table_is_the_pipeline():
    rows = re.search(
        r"<!-- passes -->\n\|[^\n]*\n\|[^\n]*\n(.*?)<!-- /passes -->", README, re.DOTALL
    )
    assert rows
    expected = "".join(f"| {r['number']} | `{r['pass']}` | {r['summary']} |\n" for r in table())
    assert rows.group(1) == expected


def commands() -> list[str]:
    """The indented fxquant command lines, without comments."""
    lines = re.findall(r"^    (fxquant .*)$", README, re.MULTILINE)
    return [line.partition("#")[0].strip() for line in lines]


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    assert parser().parse_args(shlex.split(command)[1:]).run


@pytest.mark.slow
def test_commands_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in commands():
        run_command(command)
        assert capsys.readouterr().out, command


def run_command(command: str) -> None:
    if "path/to/diffusers/folder" in command:
        from fxquant import assets

        command = command.replace("path/to/diffusers/folder", str(assets.path("digits") / "unet"))
    assert main(shlex.split(command)[1:]) == (1 if " diff " in command else 0), command


def test_every_command_is_named():
    verbs = next(a for a in parser()._actions if a.metavar == "COMMAND").choices
    assert verbs
    assert all(f"fxquant {verb}" in README for verb in verbs)


def test_links_lead_somewhere():
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (root / target).exists(), target
