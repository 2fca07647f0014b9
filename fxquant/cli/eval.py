"""Measure a compiled model's quality against the float model.

Models of digits are sampled: PSNR and SSIM to the float model's images, FD ratio; FD, spatial FD,
KID, precision and recall against the real digits; classifier score, recognition. Any other model
is compared call by call, on equal inputs. Exits with 1 if --min-psnr is given and missed.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from statistics import mean

from torch import nn

from fxquant.cli.inputs import add_call_arguments, calls_for, positive
from fxquant.cli.model import load_scheduler
from fxquant.cli.output import show_json, show_table
from fxquant.cli.pair import Pair, add_pair_arguments, compiled_of, reference_of
from fxquant.errors import ModelError
from fxquant.evaluate.figures import (
    STANDARD_IMAGES,
    CallFigures,
    DigitsFigures,
    call_figures,
    check_digits,
    digits_figures,
    is_digits,
    worst,
)

EXAMPLE = "fxquant eval digits --recipe w4a8-fast --images 200 --steps 10"
_OTHER_SEED = 1000  # calibration and evaluation start from different noise


def configure(parser: argparse.ArgumentParser) -> None:
    add_pair_arguments(parser)
    parser.add_argument(
        "--images", type=positive, metavar="N",
        help=f"images in each of three sets (digits only), default {STANDARD_IMAGES:,}",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=positive, default=20, help="DDIM steps of the images, default %(default)s"
    )
    add_call_arguments(parser)
    parser.add_argument("--min-psnr", type=float, metavar="DB", help="exit with 1 below this")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(options: argparse.Namespace) -> int:
    reference = reference_of(options)
    if reference is None:
        raise ModelError(
            f"{options.model} is an artefact and holds no float model to compare with; name the "
            "one it was made of: --against MODEL"
        )
    if options.images:
        check_digits(reference)
    pair = compiled_of(options, reference)
    sampled = is_digits(reference) and not options.calib
    figure = (_images if sampled else _calls)(options, pair, reference)
    return int(options.min_psnr is not None and figure < options.min_psnr)


def _images(options: argparse.Namespace, pair: Pair, reference: nn.Module) -> float:
    """Show figures over images; returns the PSNR."""
    figures = digits_figures(
        pair.compiled,
        reference,
        load_scheduler(pair.name),
        options.images or STANDARD_IMAGES,
        options.steps,
        options.seed,
        show=True,
    )
    if options.json:
        show_json({"recipe": pair.compiled.recipe.name, **asdict(figures)})
    else:
        title = f"{pair.compiled.recipe.name}, DDIM {figures.steps} steps, N = {figures.images:,}"
        show_table(
            f"{title} images in each of three sets, {figures.real_images:,} real digits\n"
            f"FD, KID, precision, recall: {figures.feature}\n"
            f"spatial FD: {figures.spatial_feature}\n"
            f"classifier score, recognised: {figures.classifier}\n"
            "KID is too low by O(1 / N), as labels are balanced: compare the columns",
            ("", "float", "compiled"),
            _rows(figures),
        )
    return figures.psnr


def _rows(f: DigitsFigures) -> list[tuple[str, str, str]]:
    spread = f"{f.fd_ratio:.3f} ({f.fd_ratio_min:.3f}-{f.fd_ratio_max:.3f})"
    return [
        ("PSNR to the float model", "-", f"{f.psnr:.1f} dB"),
        ("SSIM to the float model", "1", f"{f.ssim:.4f}"),
        ("FD ratio, mean (min-max)", "1", spread),
        ("FD to the real digits", f"{f.fd_real_float:.3f}", f"{f.fd_real:.3f}"),
        ("spatial FD to the real digits", f"{f.spatial_fd_float:.2f}", f"{f.spatial_fd:.2f}"),
        ("KID to the real digits", f"{f.kid_float:.5f}", f"{f.kid:.5f}"),
        ("precision", f"{f.precision_float:.3f}", f"{f.precision:.3f}"),
        ("recall", f"{f.recall_float:.3f}", f"{f.recall:.3f}"),
        ("classifier score", f"{f.classifier_score_float:.3f}", f"{f.classifier_score:.3f}"),
        ("recognised", f"{100 * f.recognition_float:.2f} %", f"{100 * f.recognition:.2f} %"),
    ]


def _calls(options: argparse.Namespace, pair: Pair, reference: nn.Module) -> float:
    """Show figures call by call; returns the mean PSNR."""
    calls = calls_for(reference, pair.name, options, seed=_OTHER_SEED)
    figures = call_figures(pair.compiled, reference, calls, show=True)
    total = mean(f.psnr for f in figures)
    name = pair.compiled.recipe.name
    if options.json:
        rows = [asdict(f) for f in figures]
        show_json({"recipe": name, "calls": rows, "psnr": total, "n": len(rows)})
    else:
        show_table(
            f"{name} against float on equal inputs, N = {len(figures)} calls; PSNR over the range "
            "of the float output",
            ("timestep", "PSNR", "relative L2"),
            [*map(_row, figures), ("mean", f"{total:.1f} dB", f"worst {_worst(figures)}")],
        )
    return total


def _row(f: CallFigures) -> tuple[str, str, str]:
    step = "-" if f.timestep is None else f"{f.timestep:g}"
    return step, f"{f.psnr:.1f} dB", f"{f.relative_l2:.4f}"


def _worst(figures: list[CallFigures]) -> str:
    return f"{worst(figures).relative_l2:.4f}"
