"""Small modules on which fxquant was wrong or stopped, each with what was wrong.

What random programs find is written down here, cut to a few lines, so that it stays found.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Regression:
    """A module by its lines, and what was wrong with it."""

    wrong: str
    init: str
    forward: str
    call: str = '"sample": torch.randn(B, 4, H, W)'
    arguments: str = "sample"

    @property
    def source(self) -> str:
        """The whole program, as the generator writes it."""
        return _FILE.format(
            arguments=self.arguments,
            init=_indented(self.init),
            forward=_indented(self.forward),
            call=self.call,
        )


_FILE = """\
import math
import torch
import torch.nn.functional as F
from torch import nn

class Fuzzed(nn.Module):
    def __init__(self):
        super().__init__()
{init}

    def forward(self, {arguments}):
{forward}

def call(B, H, W, L):
    return {{{call}}}

SIZES = {{"B": 2, "H": 8, "W": 12, "L": 5}}
OTHER = {{"B": 3, "H": 12, "W": 8, "L": 7}}
DTYPE = torch.float32
"""


def _indented(lines: str) -> str:
    return "\n".join(f"        {line}" for line in lines.strip().split("\n"))


_CONV = "self.conv = nn.Conv2d(4, 16, 3, padding=1)\n"

REGRESSIONS = {
    "write_through_a_diagonal": Regression(
        "written through a view that no list of views knew: lost, rel 0.29",
        _CONV,
        "h = self.conv(sample)\nh.diagonal(dim1=2, dim2=3).add_(1)\nreturn F.silu(h)",
    ),
    "transposed_convolution": Regression(
        "raw RuntimeError at the first call: its input was bfloat16, its weight float32",
        _CONV + "self.up = nn.ConvTranspose2d(16, 16, 4, stride=2, padding=1)",
        "return F.avg_pool2d(self.up(self.conv(sample)), 2)",
    ),
    "layer_called_twice": Regression(
        "refused where it could stay float, and the refusal named no line",
        "self.layer = nn.Linear(16, 16)",
        "return self.layer(sample) + self.layer(sample.mean(1, keepdim=True))",
        call='"sample": torch.randn(B, L, 16)',
    ),
    "gather": Regression(
        "could not be saved, which was found out only after compile",
        _CONV,
        "h = self.conv(sample)\n"
        "return h + torch.gather(h, 1, torch.zeros_like(h, dtype=torch.long))",
    ),
}
