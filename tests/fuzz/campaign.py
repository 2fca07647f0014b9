"""`make fuzz`: random programs for SECONDS, from a seed that is printed.

    python -m tests.fuzz.campaign --seconds 600 [--seed N] [--keep-going]

Stops at the first finding and prints it made smaller; with --keep-going it counts causes, one
example each. Exit status 1 if there was a finding.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.fuzz.generator import generate
from tests.fuzz.law import Finding, Invalid, check
from tests.fuzz.minimise import minimise
from tests.fuzz.writer import Program


@dataclass
class Tally:
    """What became of all programs."""

    programs: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)


def one(seed: int, tally: Tally, minimising: float) -> Finding | None:
    """Check the program of a seed."""
    program = generate(random.Random(seed))
    try:
        outcome = check(program.source)
    except Invalid as invalid:
        tally.programs["invalid"] += 1
        print(f"[{seed}] invalid: {str(invalid)[:200]}", flush=True)
        return None
    except Finding as finding:
        tally.programs["finding"] += 1
        tally.causes[finding.cause] += 1
        if finding.cause not in tally.examples:
            small = minimise(program, finding.cause, minimising)
            tally.examples[finding.cause] = f"{small.source}\n# seed {seed}: {finding}"
            print(f"\n[{seed}] {finding}\n{body(small)}", flush=True)
        return finding
    tally.programs["refused" if outcome.refused else "held"] += 1
    if outcome.refused:
        tally.refusals[outcome.refused[:100]] += 1
        print(f"[{seed}] refused: {outcome.refused[:150]!r}", flush=True)
    if outcome.other_refused:
        tally.programs["other size refused"] += 1
        print(f"[{seed}] other size refused: {outcome.other_refused[:150]!r}", flush=True)
    for note in outcome.notes:
        print(f"[{seed}] note: {note[:200]!r}", flush=True)
    return None


def body(program: Program) -> str:
    """The class and sizes without the imports."""
    return program.source.partition("from torch import nn\n")[2].strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Try programs until time or their number is up, or one breaks the law."""
    parser = argparse.ArgumentParser(prog="fuzz")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--programs", type=int, default=None, help="instead of seconds")
    parser.add_argument(
        "--seed", type=int, default=None, help="of the first; the next has seed + 1"
    )
    parser.add_argument("--keep-going", action="store_true", help="count causes, do not stop")
    parser.add_argument("--minimise", type=float, default=60, help="seconds for every cause")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    tally = Tally()
    until = time.monotonic() + options.seconds
    for number in itertools.count():
        done = number == options.programs if options.programs else time.monotonic() > until
        if done or (one(seed + number, tally, options.minimise) and not options.keep_going):
            break
    print(f"\n{dict(tally.programs)}")
    for cause, count in tally.causes.most_common():
        print(f"{count:4} {cause}")
    return int(bool(tally.causes))


if __name__ == "__main__":
    sys.exit(main())
