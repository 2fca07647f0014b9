"""Compile a bundled diffusers UNet to int8 and draw four digits with it.

python examples/quickstart.py
"""

from __future__ import annotations

import torch

import fxquant
from fxquant import assets
from fxquant.calibration import record
from fxquant.evaluate.digits import sample_digits
from fxquant.evaluate.metrics import mean_psnr


def main() -> float:
    """Returns the PSNR of the int8 images to the float ones, in dB."""
    unet, scheduler = assets.load_digits_unet(), assets.load_digits_scheduler()
    labels = torch.tensor([3, 1, 4, 1])

    calls = record(unet, lambda: sample_digits(unet, scheduler, labels, steps=10, seed=7))
    qunet = fxquant.compile(unet, calls, recipe="w8a8-fast")
    print(qunet.summary)

    images = [sample_digits(model, scheduler, labels, steps=20, seed=0) for model in (unet, qunet)]
    psnr = mean_psnr(*images)
    print(f"PSNR to float: {psnr:.1f} dB")
    return psnr


if __name__ == "__main__":
    main()
