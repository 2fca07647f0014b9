"""Statements that write: into values, through views of them, into new tensors, into arguments."""

from __future__ import annotations

from tests.fuzz.grammar.registry import template
from tests.fuzz.writer import Writer


@template(5)
def write(w: Writer) -> None:
    x = w.pick("image")
    w.line(
        w.choose(
            f"{x}[:, 0] = 0",
            f"{x}[:, :2] = 1.5",
            f"{x}[:, :2].mul_(3)",
            f"{x}[:, ::2] *= 0.5",
            f"{x}[:, 1:3] += 1",
            f"{x}[..., 0] = {x}[..., 1]",
            f"{x}[:, 1, 1:, ::2] = 0.5",
            f"{x}[0] = {x}[0] * 2",
            f"{x}.add_(1)",
            f"{x}.mul_({x}.sigmoid())",
            f"{x}.clamp_(-1, 1)",
            f"{x}.detach().add_(1)",
            f"{x}.transpose(2, 3).add_(0.5)",
            f"{x}.view({x}.shape[0], -1).mul_(0.5)",
            f"{x}.permute(0, 2, 3, 1)[..., :2].fill_(0.5)",
            f"{x}.narrow(1, 0, 2).zero_()",
            f"{x}.select(1, 1).copy_({x}[:, 0])",
            f"{x}[:, :2].copy_({x}[:, 2:4] * 2)",
            f"{x}.unbind(1)[1].neg_()",
            f"{x}.flatten(2)[:, :, 0] = 2",
            f"{x}.masked_fill_({x} > 1, 1)",
            f"{x}.index_fill_(1, torch.tensor([0, 2]), 0.5)",
            f"{x}[:, [0, 2]] = 0.5",
            f"{x}.diagonal(dim1=2, dim2=3).add_(1)",
            f"{x}.squeeze(0).add_(0.5)",
            f"{x}[:, :, 1:-1].sub_({x}.mean())",
            f"{x} += {x}.mean((2, 3), keepdim=True)",
            f"{x}.swapaxes(1, 2)[:, 0] += 1",
            f"{x}.index_copy_(1, torch.tensor([1]), {x}[:, :1])",
            f"{x}.expand_as({x}).mul_(2)",
            f"F.relu({x}, inplace=True)",
            f"nn.functional.silu({x}[:, :3], inplace=True)",
            f"torch.add({x}, 1, out={x})",
            f"{x}.data.mul_(0.5)",
            f"{x}.data[:, 0] = 1",
            f"{x}.chunk(2, 1)[0].mul_(2)",
            f"{x}.unfold(2, 2, 2)[..., 0].mul_(2)",
        )
    )


@template(3)
def write_parts(w: Writer) -> None:
    """Both halves, one of them written, then the whole is read again."""
    x = w.pick("image", channels={4, 16, 32})
    c = x.channels
    w.line(
        w.choose(
            f"a, b = {x}.chunk(2, 1)",
            f"a, b = {x}.split({c // 2}, dim=1)",
            f"a, b = {x}[:, :{c // 2}], {x}[:, {c // 2}:]",
            f"a, b = {x}.unflatten(1, (2, {c // 2})).unbind(1)",
            f"a, b = {x}.view({x}.shape[0], 2, {c // 2}, *{x}.shape[2:]).unbind(1)",
        )
    )
    w.line(w.choose("a += 1", "a.mul_(0.5)", "b[:, 0] = 1", "a += b", "b.copy_(a)", "a[:] = b * 2"))
    w.like(x, w.choose(f"{x} * 1.0", f"torch.cat([b, a], 1) + {x}", f"{x} + 1"))


@template(3)
def write_alias(w: Writer) -> None:
    """Written under another name, or after something has read it."""
    x = w.pick("image")
    y = w.like(
        x,
        w.choose(
            f"{x}",
            f"{x}.view_as({x})",
            f"{x}.clone()",
            f"{x}.contiguous()",
            f"F.dropout({x}, 0.1, training=self.training)",
            f"nn.functional.dropout2d({x}, 0.1, False)",
            f"{x}.to({x}.dtype)",
            f"{x}.float()",
            f"{x}.reshape({x}.shape)",
            f"{x}[:]",
            f"{x} * 1",
            f"{x}.expand({x}.shape)",
            f"{x}.permute(0, 1, 3, 2).permute(0, 1, 3, 2)",
            f"{x}.type_as({x})",
            f"nn.Identity()({x})",
            f"torch.squeeze({x}[None], 0)",
            f"F.pad({x}, (0, 0, 0, 0))",
        ),
    )
    z = w.temporary(w.choose(f"{x} + 1", f"{x}.sigmoid()", f"{x}[:, :1]", f"{x}.mean()"))
    changes = (f"{y}.add_(1)", f"{y}[:, 0] = 0.5", f"{y} *= 0.5", f"{y}.zero_()", f"{x}.mul_(2)")
    w.line(w.choose(*changes))
    w.like(x, f"{x} + {y}{w.maybe(f' + {z}')}")


@template(3)
def assembled(w: Writer) -> None:
    """A tensor made empty, and written piece by piece."""
    x = w.pick("image", channels={4, 16, 32})
    c = x.channels
    out = w.like(
        x,
        w.choose(
            f"torch.empty_like({x})",
            f"torch.zeros_like({x})",
            f"{x}.new_empty({x}.shape)",
            f"torch.zeros({x}.shape, dtype={x}.dtype)",
            f"{x}.new_zeros({x}.shape[0], {c}, *{x}.shape[2:])",
            f"torch.full_like({x}, 0.5)",
        ),
    )
    first, second = w.choose(
        (f"{out}[:, 0::2]", f"{out}[:, 1::2]"),
        (f"{out}[:, :2]", f"{out}[:, 2:]"),
        (f"{out}[..., :3, :]", f"{out}[..., 3:, :]"),
        (f"{out}[:1]", f"{out}[1:]"),
    )
    inside = first.removeprefix(str(out))
    rest = second.removeprefix(str(out))
    w.line(f"{first} = {x}{inside} * 2")
    w.line(w.choose(f"{second} = {x}{rest}", f"{second}.copy_({x}{rest}.sigmoid())"))


@template(2)
def write_tokens(w: Writer) -> None:
    x = w.pick("tokens")
    w.line(
        w.choose(
            f"{x}[:, 0] = 0",
            f"{x}[..., ::2] *= 0.5",
            f"{x}[:, -1:].mul_(2)",
            f"{x}[:, :2] = {x}[:, 1:3].clone()",
            f"{x}.view(-1, {x.channels})[0].zero_()",
            f"{x}.scatter_(1, torch.zeros({x}.shape[0], 1, {x.channels}, dtype=torch.long), 0.5)",
            f"{x}.transpose(1, 2)[:, :3].add_(1)",
            f"{x}.index_add_(1, torch.tensor([0, 1]), {x}[:, :2].clone())",
            f"{x}[:, 0, :] += {x}.mean(1)",
            f"{x}.reshape(-1)[0] = 3",
            f"{x}[{x} > 1] = 1",
            f"{x}.unbind(1)[0].copy_({x}[:, 1])",
        )
    )


@template()
def write_vector(w: Writer) -> None:
    v = w.pick("vector")
    w.line(
        w.choose(
            f"{v}[:, 0] = 1",
            f"{v}.unsqueeze(1).mul_(2)",
            f"{v}[:, :4].fill_(0.5)",
            f"{v} += 1",
            f"{v}.unflatten(1, (2, -1))[:, 0].zero_()",
            f"{v}[1:] = {v}[:-1].clone()",
        )
    )


@template()
def append_in_loop(w: Writer) -> None:
    """Pieces in a Python list, changed there."""
    x = w.pick("image", channels={4, 16, 32})
    w.line(f"parts = list({x}.{w.choose('chunk(4, 1)', 'split(1, dim=1)', 'unbind(1)')})")
    if w.choose(True, False):
        w.line("for part in parts[1:]: part.add_(parts[0])")
    else:
        w.line("parts[0] = parts[0] + parts[1]")
    w.like(x, f"{w.choose('torch.cat', 'torch.stack')}(parts, 1).reshape({x}.shape)")
