"""Golden files: text beside the tests, compared exactly.

FXQUANT_ACCEPT=1 pytest rewrites them; look at the git diff before committing.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

HEADER = "# Golden. Accept changes with FXQUANT_ACCEPT=1 pytest, then read the diff.\n"


def assert_golden(text: str, path: Path) -> None:
    """Compare `text` with the golden file, or write it when FXQUANT_ACCEPT=1."""
    if os.environ.get("FXQUANT_ACCEPT") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEADER + text)
        return
    assert path.exists(), f"no golden {path.name}; make it with FXQUANT_ACCEPT=1 pytest"
    expected = path.read_text().removeprefix(HEADER)
    difference = "\n".join(
        difflib.unified_diff(expected.splitlines(), text.splitlines(), "golden", "now", lineterm="")
    )
    assert expected == text, f"{path.name} differs (FXQUANT_ACCEPT=1 accepts):\n{difference}"
