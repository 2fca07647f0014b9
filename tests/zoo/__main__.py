"""python -m tests.zoo: judge the cases, print the table, write it as JSON and as docs/models.md."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from tests.zoo.cases import CASES
from tests.zoo.check import judge, quiet
from tests.zoo.table import as_line, as_markdown, tally

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "out" / "zoo.json"
DOCS = ROOT / "docs" / "models.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("patterns", nargs="*", help="parts of names; all cases without any")
    parser.add_argument("--kind", help="image, video, audio, prior, control or other")
    parser.add_argument("--failed", action="store_true", help="only what failed in RESULTS")
    parser.add_argument("--shard", default="0/1", help="I/N: every Nth case from the Ith on")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", action="store_true", help=f"write {DOCS.relative_to(ROOT)}")
    parser.add_argument("--list", action="store_true", help="only print what is in RESULTS")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    results = _read(options.results)
    index, count = map(int, options.shard.split("/"))
    chosen = [] if options.list or options.docs else list(_chosen(options, results))[index::count]
    for case in chosen:
        verdict = judge(case).as_dict()
        print(as_line(verdict), flush=True)
        results = {**_read(options.results), case.name: verdict}
        options.results.parent.mkdir(parents=True, exist_ok=True)
        _write(options.results, results)
    known = [results[case.name] for case in CASES if case.name in results]
    if options.list:
        print("\n".join(as_line(row) for row in known))
    print(tally(known))
    if options.docs:
        DOCS.write_text(as_markdown(known), encoding="utf-8")


def _read(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(path: Path, results: dict[str, dict]) -> None:
    """In one piece: another shard may be reading."""
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(results, indent=1), encoding="utf-8")
    fresh.replace(path)


def _chosen(options: argparse.Namespace, results: dict[str, dict]):
    for case in CASES:
        if options.patterns and not any(p.lower() in case.name.lower() for p in options.patterns):
            continue
        if options.kind and case.kind != options.kind:
            continue
        if options.failed and results.get(case.name, {}).get("outcome") not in (None, "fails"):
            continue
        yield case


if __name__ == "__main__":
    main()
