"""Verdicts as lines, as a tally, and as the page in docs/."""

from __future__ import annotations

from typing import Any

from tests.zoo.case import FAILS, ONE_SIZE, REFUSED, UNSAVED, WORKS

HEAD = (
    "class",
    "pipeline kind",
    "outcome",
    "rel",
    "other batch",
    "other size",
    "saved and loaded",
    "note",
)
INTRO = """# Which denoisers of diffusers compile

Every UNet, transformer and ControlNet class of the installed diffusers, made small, with random
weights, called as its pipelines call it. `python -m tests.zoo` judges the cases; `--docs` writes
this page from the last verdict on each, of one or of several runs.

"works": compiled to W8A8 and served four times with a relative error of at most 0.1 (rel is the
first one's), at another batch and another size, saved and loaded. "at one size": another batch or
size is refused by name. "not saved": compile() said that it cannot be saved. "refused": by name,
before calibration. "fails": anything else, still to be mended.
"""
KINDS = ("image", "video", "audio", "prior", "control", "other")


def as_line(row: dict[str, Any]) -> str:
    rel = "" if row["rel"] is None else f"rel {row['rel']:.4f} {row['again'] or float('nan'):.4f}"
    why = " ".join(row["why"].split())
    return f"{row['outcome']:15} {row['name']:55} {row['seconds']:5.1f} s  {rel} {why[:400]}"


def tally(rows: list[dict[str, Any]]) -> str:
    lines = []
    for kind in KINDS:
        mine = [row["outcome"] for row in rows if row["kind"] == kind]
        if mine:
            counts = ", ".join(
                f"{mine.count(o)} {o}" for o in (WORKS, ONE_SIZE, UNSAVED, REFUSED, FAILS)
            )
            lines.append(f"{kind}: {len(mine)} ({counts.replace(ONE_SIZE, 'at one size')})")
    return "\n".join(lines)


def as_markdown(rows: list[dict[str, Any]]) -> str:
    lines = [INTRO, *(f"- {line}" for line in tally(rows).splitlines()), ""]
    lines += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for row in sorted(rows, key=lambda row: KINDS.index(row["kind"])):
        rel = "" if row["rel"] is None else f"{row['rel']:.3f}"
        cells = [
            f"`{row['name'].split(':')[0]}`{''.join(':' + v for v in row['name'].split(':')[1:])}",
            row["kind"],
            row["outcome"],
            rel,
            _short(row["batch"]),
            _short(row["size"]),
            _short(row["saved"]),
            row["note"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _short(said: str) -> str:
    return said if said in ("yes", "takes one only") else "-" if said == "not tried" else "refused"
