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
    "write_through_a_view_of_an_argument": Regression(
        "the write was lost, rel 0.56",
        _CONV,
        "a, b = sample.view(sample.shape[0], 2, 2, *sample.shape[2:]).unbind(1)\n"
        "a += 1\n"
        "return self.conv(sample)",
    ),
    "filled_then_written_piece_by_piece": Regression(
        "the writes were lost, rel 0.99",
        _CONV,
        "h = self.conv(sample)\n"
        "out = torch.full_like(h, 0.5)\n"
        "out[:, 0::2] = h[:, 0::2] * 2\n"
        "out[:, 1::2].copy_(h[:, 1::2].sigmoid())\n"
        "return out",
    ),
    "cropped_by_padding": Regression(
        "negative padding was folded into the convolution, rel 0.17",
        _CONV + "self.next = nn.Conv2d(16, 16, 3, padding=1)",
        "return self.next(F.pad(self.conv(sample), (-1, 1, 0, 0)))",
    ),
    "padded_to_even": Regression(
        "padding by a symbolic size stopped in 'bug in the pass'",
        _CONV + "self.next = nn.Conv2d(16, 16, 3)",
        "return self.next(F.pad(self.conv(sample), (0, sample.shape[3] % 2, 0, 1)))",
    ),
    "autocast_disabled": Regression(
        "InvariantError: the context manager's own graph was taken for an operator",
        _CONV + "self.next = nn.Conv2d(16, 16, 1)",
        "h = self.conv(sample)\n"
        "with torch.autocast('cpu', enabled=False):\n"
        "    h = self.next(h.float())\n"
        "return h",
    ),
    "written_to_out": Regression(
        "refused without a line of the module",
        _CONV,
        "h = self.conv(sample)\ntorch.add(h, 1, out=h)\nreturn h",
    ),
    "meshgrid": Regression(
        "'bug in the pass': its two inputs were given two dtypes",
        _CONV + "self.next = nn.Conv2d(18, 16, 1)",
        "h = self.conv(sample)\n"
        "y = torch.arange(h.shape[2]).float() / h.shape[2]\n"
        "x = torch.linspace(-1, 1, h.shape[3])\n"
        'grid = torch.stack(torch.meshgrid(y, x, indexing="ij"))\n'
        "return self.next(torch.cat([h, grid.expand(h.shape[0], -1, -1, -1)], dim=1))",
    ),
    "prelu": Regression(
        "'bug in the pass': bfloat16 with a float32 weight",
        _CONV + "self.act = nn.PReLU(16)",
        "return self.act(self.conv(sample))",
    ),
    "recurrent": Regression(
        "'bug in the pass': bfloat16 with float32 weights",
        "self.layer = nn.GRU(16, 16, batch_first=True)",
        "return self.layer(sample)[0]",
        call='"sample": torch.randn(B, L, 16)',
    ),
    "fourier": Regression(
        "'bug in the pass': there is no Fourier transform of bfloat16",
        _CONV,
        "h = self.conv(sample)\nreturn torch.fft.irfft2(torch.fft.rfft2(h), s=h.shape[-2:])",
    ),
    "product_with_a_parameter": Regression(
        "raw RuntimeError at the first call: its input was bfloat16, its weight float32",
        "self.weight = nn.Parameter(torch.randn(16, 16) / 4)",
        "return F.gelu(sample) @ self.weight.T",
        call='"sample": torch.randn(B, L, 16)',
    ),
    "weight_used_transposed_too": Regression(
        "raw RuntimeError: bfloat16 times the integers that took the weight's name",
        "self.layer = nn.Linear(16, 16)",
        "return self.layer(sample) @ self.layer.weight",
        call='"sample": torch.randn(B, L, 16)',
    ),
    "multihead_attention": Regression(
        "InvariantError: a unit was not convex",
        "self.layer = nn.MultiheadAttention(16, 2, batch_first=True)",
        "return sample + self.layer(sample, sample, sample, need_weights=False)[0]",
        call='"sample": torch.randn(B, L, 16)',
    ),
    "timesteps_by_another_name": Regression(
        "rounded to bfloat16: rel 0.29, and 999 was 1000",
        _CONV + "self.layer = nn.Linear(32, 16)",
        "f = 10000 ** (-torch.arange(16) / 16)\n"
        "a = torch.einsum('b,c->bc', steps.float(), f)\n"
        "emb = self.layer(torch.cat([a.cos(), a.sin()], dim=-1))\n"
        "return self.conv(sample) + emb[:, :, None, None]",
        call='"sample": torch.randn(B, 4, H, W), "steps": torch.randint(0, 1000, (B,)).float()',
        arguments="sample, steps",
    ),
    "embedding_of_float_timesteps": Regression(
        "another row of the table, after rounding to bfloat16: rel 0.43",
        _CONV + "self.table = nn.Embedding(1000, 16)",
        "return self.conv(sample) + self.table(steps.long())[:, :, None, None]",
        call='"sample": torch.randn(B, 4, H, W), "steps": torch.randint(0, 1000, (B,)).float()',
        arguments="sample, steps",
    ),
    "tuple_of_one": Regression(
        "came back as a bare tensor, so that model(x)[0] was the first sample",
        _CONV,
        "return (self.conv(sample),)",
    ),
    "up_by_two_at_even_sizes": Regression(
        "could not be saved: that sizes are even was lost",
        _CONV + "self.next = nn.Conv2d(16, 16, 3, stride=2, padding=1)",
        "h = self.conv(sample)\nreturn h + F.interpolate(self.next(h), scale_factor=2)",
    ),
    "random_numbers": Regression(
        "could not be saved, which was found out only after compile",
        _CONV,
        "h = self.conv(sample)\nreturn h * (1 + torch.rand(h.shape[0], 1, 1, 1))",
    ),
    "contexts_in_contexts": Regression(
        "regions of their own were taken for operators",
        _CONV + "self.next = nn.Conv2d(16, 16, 1)",
        "h = self.conv(sample)\n"
        "with torch.autocast('cpu', enabled=False):\n"
        "    h = self.next(h.float())\n"
        "    with torch.enable_grad():\n"
        "        a, b = h.chunk(2, 1)\n"
        "        scale = torch.tensor([1.0, 2.0])\n"
        "        with torch.autocast('cpu', torch.bfloat16, enabled=False):\n"
        "            b = b * scale[1]\n"
        "return torch.cat([a, b], 1)",
    ),
    "autocast": Regression(
        "InvariantError; now refused by name",
        _CONV + "self.next = nn.Conv2d(16, 16, 1)",
        "h = self.conv(sample)\n"
        "with torch.autocast('cpu', dtype=torch.bfloat16):\n"
        "    h = self.next(h)\n"
        "return h.float()",
    ),
    "buffer_set_anew": Regression(
        "refused without a line",
        _CONV + "self.register_buffer('count', torch.ones(1))",
        "self.count = self.count + 1\nreturn self.conv(sample) * self.count",
    ),
    "attribute_that_is_not_kept": Regression(
        "a warning of torch's was an error where warnings are",
        _CONV + "self.last = None",
        "self.last = self.conv(sample)\nreturn F.silu(self.last)",
    ),
    "time_and_sample_that_never_meet": Regression(
        "refused: one time for each sample went with another dimension, that of the times",
        _CONV,
        "a = timestep.float()[:, None] * torch.arange(8) / 8\n"
        "return torch.cat([a.sin(), a.cos()], 1)",
        call='"sample": torch.randn(B, 4, H, W), "timestep": torch.randint(0, 1000, (B,))',
        arguments="sample, timestep",
    ),
    "lstm": Regression(
        "'bug in the pass': bfloat16 with float32 weights; it is served, and not saved, on purpose",
        "self.layer = nn.LSTM(16, 16, batch_first=True)",
        "return self.layer(sample)[0]",
        call='"sample": torch.randn(B, L, 16)',
    ),
    "number_of_a_size": Regression(
        "an internal error: fuse_epilogues, and then fuse_producers, took the number for a tensor",
        _CONV + "self.next = nn.Conv2d(16, 16, 1)",
        "h = self.conv(sample) + 1 / sample.shape[0]\n"
        "h = F.silu(h) * (2 / sample.shape[2])\n"
        "return self.next(2 / sample.shape[2] + h) - sample.shape[3] / 8",
    ),
    "time_by_a_layer": Regression(
        "rounded to eight bits, 999 was 1000: rel 1.02, and the law allowed it",
        _CONV + "self.layer = nn.Linear(1, 16)",
        "return self.conv(sample) + torch.sin(self.layer(time[:, None]))[:, :, None, None]",
        call='"sample": torch.randn(B, 4, H, W), "time": torch.randint(0, 1000, (B,)).float()',
        arguments="sample, time",
    ),
    "layer_of_one_vector": Regression(
        "could not be saved: a linear read of a file had to have two dimensions",
        "self.layer = nn.Linear(16, 16)",
        "return sample + self.layer(sample.mean((0, 1)))",
        call='"sample": torch.randn(B, L, 16)',
    ),
    "list_of_values": Regression(
        "called right, with a warning, since attention counted as random: rel 3; now refused",
        "self.layer = nn.Linear(16, 16)",
        "h = self.layer(sample)\n"
        "h = F.scaled_dot_product_attention(h, h, h)\n"
        "return h + len(h[:, 0, 0].tolist())",
        call='"sample": torch.randn(B, L, 16)',
    ),
}
