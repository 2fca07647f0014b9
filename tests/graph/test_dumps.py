"""FXQUANT_DUMP: which files, what is in them, what cannot be written."""

from __future__ import annotations

import re

import pytest

from fxquant.errors import SettingError
from fxquant.graph.dump import dump
from fxquant.graph.dumps import VARIABLE, DumpFolder, dumping, header
from fxquant.graph.runner import Record
from fxquant.passes import pipelines
from tests.runtime.compiled import compile_mite
from tests.toy import story


def record(name: str = "annotate") -> Record:
    return Record(name, 0.123, (5, 43), story()[name])


def test_the_header_with_and_without_time():
    assert header(7, record()) == "# 07 annotate  +38 nodes\n"
    assert header(7, record(), seconds=True) == "# 07 annotate  +38 nodes  0.12 s\n"


def test_every_record_becomes_the_next_file(tmp_path):
    write = DumpFolder(tmp_path / "new" / "dumps")
    write(record("annotate"))
    write(record("group_units"))
    files = sorted((tmp_path / "new" / "dumps").iterdir())
    assert [f.name for f in files] == ["00_annotate.txt", "01_group_units.txt"]
    assert files[1].read_text() == header(1, record(), seconds=True).replace(
        "annotate", "group_units"
    ) + dump(story()["group_units"])


def test_without_the_variable_nothing_changes(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    seen: list[Record] = []
    assert dumping(None) is None
    assert dumping(seen.append) == seen.append


def test_compile_dumps_capture_and_every_pass(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    seen: list[Record] = []
    compile_mite(on_pass=seen.append)
    names = ["capture", *(step.name for step in pipelines.ALL)]
    assert [r.name for r in seen] == names
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == [f"{k:02d}_{name}.txt" for k, name in enumerate(names)]
    for k, (file, one) in enumerate(zip(files, seen, strict=True)):
        first, _, rest = file.read_text().partition("\n")
        assert re.fullmatch(rf"# {k:02d} {one.name}  [+-]\d+ nodes  \d+\.\d\d s", first)
        assert rest == dump(one.graph)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match=r"FXQUANT_DUMP=.*file.* or unset the variable"):
        DumpFolder(tmp_path / "file")
