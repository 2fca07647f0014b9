"""Makes the bundled W4A8 digits model: what `w4a8-best` gives after a few minutes.

    python examples/compile_digits.py

Records the samples that TDAC chooses from 1,024 trajectories, reconstructs, saves. Stop it and
start it again: it goes on from the checkpoints in out/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import fxquant
from fxquant import assets
from fxquant.calibration import record_selected
from fxquant.evaluate.digits import balanced_labels, sample_digits

SAMPLES, BATCH, SEED = 1024, 64, 1000


def main() -> None:
    """Record, compile, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", default="w4a8-best")
    parser.add_argument("--out", type=Path, default=assets.path("digits") / "w4a8")
    parser.add_argument("--resume", type=Path, default=Path("out/checkpoints_w4a8"))
    options = parser.parse_args()
    unet, scheduler = assets.load_digits_unet(), assets.load_digits_scheduler()
    labels = balanced_labels(7)[:BATCH]

    def batch(number: int) -> object:
        return sample_digits(unet, scheduler, labels, steps=20, seed=SEED + number)

    runs = [lambda n=n: batch(n) for n in range(SAMPLES // BATCH)]
    calls = record_selected(unet, runs, count=SAMPLES, sampler="tdac")
    qunet = fxquant.compile(unet, calls, options.recipe, resume=options.resume)
    print(qunet.summary)
    qunet.save_pretrained(options.out)
    print(f"{options.out}: saved")


if __name__ == "__main__":
    main()
