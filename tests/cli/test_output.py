"""Tables keep their width without a terminal; places that cannot be written are told early."""

from __future__ import annotations

import tempfile

import pytest

from fxquant.cli.output import check_writable, mib, show_table
from fxquant.errors import SettingError


def test_a_table(capsys):
    show_table("title [x]", ("", "b"), [("long " * 14, "1"), ("y", "22")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "title [x]"
    assert max(map(len, lines)) <= 100
    assert "long " * 13 in lines[4]
    assert lines[-2].rstrip("│ ").endswith(" 22")


def test_mib():
    assert mib(3 << 19) == "1.50 MiB"


def test_a_new_or_existing_folder_is_fine_and_not_made(tmp_path):
    assert check_writable(tmp_path) == tmp_path
    assert check_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_file_in_the_way_is_named(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match=r"cannot be written: .*file is a file; name another"):
        check_writable(tmp_path / "file" / below)


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    def refuse(**_options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(SettingError, match=rf"{tmp_path} takes no file \(Permission denied\)"):
        check_writable(tmp_path / "new")
