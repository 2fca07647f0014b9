"""What is Python's in a forward: branches, casts, random numbers, state, arguments of all kinds."""

from __future__ import annotations

from tests.fuzz.grammar.registry import template
from tests.fuzz.writer import Writer


@template(3)
def cast(w: Writer) -> None:
    x = w.pick(w.choose("image", "tokens", "vector"))
    w.like(
        x,
        w.choose(
            f"{x}.float().tanh().to({x}.dtype)",
            f"{x}.to(torch.float32).square().mean(-1, keepdim=True).to({x}.dtype) + {x}",
            f"{x}.double().sin().type_as({x})",
            f"{x}.to(torch.bfloat16).to({x}.dtype)",
            f"{x}.half().to({x}.dtype) * 0.5",
            f"{x}.float().softmax(dim=1).to({x}.dtype) * 8",
            f"{x}.float().exp().log1p().type_as({x})",
            f"{x} * torch.tensor(0.5)",
            f"{x} * torch.as_tensor([2.0], dtype={x}.dtype)",
            f"{x}.type(torch.float64).cumsum(-1).div(10).type({x}.dtype)",
            f"{x} + torch.full((), 0.5)",
            f"{x} / {x}.detach().abs().max()",
            f"{x} * {x}.new_tensor(1.5)",
        ),
    )


@template(2)
def branch(w: Writer) -> None:
    """A branch on what the module is or on sizes of the call."""
    x = w.pick(w.choose("image", "tokens"))
    question = w.choose(
        "self.training",
        "self.flag",
        f"{x}.shape[0] > 3",
        f"{x}.shape[-1] % 2 == 0",
        f"{x}.shape[1] > 8",
        f"{x}.numel() > 2000",
        f"{x}.ndim == 4",
        f"{x}.dtype == torch.float32",
        f"{x}.shape[2] >= {x}.shape[-1]",
        "torch.is_grad_enabled()",
    )
    if question == "self.flag":
        w.init("self.flag = True")
    y = w.like(x, f"{x} * 2 if {question} else {x} - 1")
    if w.choose(True, False):
        w.line(f"if {x}.shape[0] >= 64: {y} = {y}.contiguous()")


@template()
def noise(w: Writer) -> None:
    x = w.pick(w.choose("image", "tokens"))
    c = x.channels
    w.like(
        x,
        w.choose(
            f"{x} + torch.randn_like({x})",
            f"{x} + torch.randn({x}.shape, dtype={x}.dtype)",
            f"{x} * (1 + torch.rand({x}.shape[0], *[1] * ({x}.ndim - 1)))",
            f"F.dropout({x}, 0.3, training=True)",
            f"{x} + torch.randn({x}.shape[-1])",
            f"{x} * torch.bernoulli(torch.full_like({x}, 0.8))",
            f"{x} + torch.empty_like({x}).normal_()",
            f"{x} + torch.randint(0, 3, ({x}.shape[0],) + (1,) * ({x}.ndim - 1))",
            f"torch.cat([{x}[:, 1:], torch.randn_like({x}[:, :1])], 1)",
            f"{x} + torch.randn(1) + 0 * {c}",
        ),
    )


@template()
def state(w: Writer) -> None:
    """A module that remembers: refused, or right call after call."""
    x = w.pick(w.choose("image", "tokens"))
    how = w.choose("count", "last", "cache")
    if how == "count":
        b = w.buffer("torch.ones(1)")
        w.line(f"{b}.add_(1.0)")
        w.like(x, f"{x} * {b}")
    elif how == "last":
        w.init("self.steps = 0")
        w.line("self.steps += 1")
        w.like(x, f"{x} * self.steps")
    else:
        w.init("self.cache = {}")
        w.line(f"key = {x}.shape[-1]")
        w.line("if key not in self.cache: self.cache[key] = torch.arange(key) / key")
        w.like(x, f"{x} + self.cache[key]")


@template(2)
def optional(w: Writer) -> None:
    """An argument that may be None, a flag, a string, a number."""
    x = w.pick(w.choose("image", "tokens"))
    how = w.choose("none", "flag", "mode", "scale", "int", "kwargs", "default")
    if how == "none":
        w.argument("cond", "None")
        w.like(x, f"{x} if cond is None else {x} + cond")
    elif how == "flag":
        w.argument("upsample", w.choose("True", "False"))
        w.like(x, f"{x} * 2 if upsample else {x} + 1")
    elif how == "mode":
        w.argument("mode", '"double"')
        w.like(x, f'{x} * 2 if mode == "double" else {x}')
    elif how == "scale":
        w.argument("conditioning_scale", "0.5")
        w.like(x, f"{x} * conditioning_scale")
    elif how == "int":
        w.argument("num_frames", "2")
        w.like(x, f"{x}.repeat_interleave(num_frames, 0)[: {x}.shape[0]]")
    elif how == "kwargs":
        w.argument("cross_attention_kwargs", '{"scale": 0.5}')
        w.line("scale = dict(cross_attention_kwargs).pop('scale', 1.0)")
        w.like(x, f"{x} * scale")
    else:
        w.argument("attention_kwargs", "None")
        w.line("attention_kwargs = attention_kwargs or {}")
        w.like(x, f"{x} * attention_kwargs.get('scale', 0.7)")


@template(2)
def residuals(w: Writer) -> None:
    """Lists and dicts of tensors, popped or looked up."""
    x = w.pick("image", dims=("B", 16, "H", "W"))
    how = w.choose("list", "tuple", "dict", "nested", "image_embeds")
    image = "torch.randn(B, 16, H, W)"
    if how in ("list", "tuple"):
        both = f"[{image}, {image}]" if how == "list" else f"({image}, {image})"
        w.argument("block_residuals", both)
        read = w.choose("block_residuals.pop(0)", "block_residuals[-1]", "sum(block_residuals)")
        if how == "tuple" and "pop" in read:
            read = "block_residuals[0]"
        w.like(x, f"{x} + {read}")
    elif how == "dict":
        w.argument("controls", f'{{"middle": {image}, "text": torch.randn(B, 16)}}')
        w.like(x, f'{x} + controls["middle"] * controls["text"][..., None, None].sigmoid()')
    elif how == "nested":
        w.argument("adapters", f'{{"a": {{"b": [{image}], "weight": 0.5}}}}')
        w.like(x, f'{x} + adapters["a"]["b"][0] * adapters["a"]["weight"]')
    else:
        w.argument("added_cond_kwargs", '{"image_embeds": [torch.randn(B, 1, 16)]}')
        layer = w.layer("nn.Linear(16, 16)")
        embeds = f'{layer}(added_cond_kwargs["image_embeds"][0]).mean(1)'
        w.like(x, f"{x} + {embeds}[:, :, None, None]")


@template()
def table_without_batch(w: Writer) -> None:
    """Positions [L, 2] that all samples share, as Flux's img_ids."""
    x = w.pick("tokens", dims=("B", "L", 16))
    w.argument("ids_table", "torch.stack([torch.arange(L), torch.arange(L) * 37], -1)")
    f = w.temporary("10000.0 ** (-torch.arange(8) / 8)")
    a = w.temporary(f"(ids_table[..., None] * {f}).flatten(1)")
    w.like(x, w.choose(f"{x} + {a}.sin()", f"{x} * {a}.cos()[None]"))


@template(2)
def block(w: Writer) -> None:
    """A loop over layers, or over a module dict."""
    x = w.pick("image", channels={16, 32})
    c = x.channels
    layers = w.layer(f"nn.ModuleList(nn.Conv2d({c}, {c}, 3, padding=1) for _ in range(2))")
    out = w.like(x, f"{x}")
    w.line(
        w.choose(
            f"for layer in {layers}: {out} = {out} + F.silu(layer({out}))",
            f"for k, layer in enumerate({layers}): {out} = layer({out}) * (k + 1)",
            f"skips = [{out} := layer({out}) for layer in {layers}]; {out} = sum(skips)",
        )
    )


@template(3)
def blocks(w: Writer) -> None:
    """Modules with modules inside, one after the other."""
    if w.choose(True, False):
        x = w.pick("image", channels={16, 32})
        vectors = [v for v in w.values if v.kind == "vector"]
        if vectors and w.choose(True, False):
            block = w.layer(f"Resnet({x.channels}, time={vectors[-1].channels})")
            w.like(x, f"{block}({x}, {vectors[-1]})")
        else:
            w.like(x, f"{w.layer(f'nn.Sequential(Resnet({x.channels}), nn.SiLU())')}({x})")
        return
    x = w.pick("tokens", channels={16, 32})
    block = w.layer(f"Transformer({x.channels})")
    w.like(x, w.choose(f"{block}({x})", f"{block}({block}({x}))"))


@template()
def depends_on_values(w: Writer) -> None:
    """What no graph can hold: refused, with this line."""
    x = w.pick(w.choose("image", "tokens"))
    w.like(
        x,
        w.choose(
            f"{x} * 2 if {x}.mean() > 0 else {x} * 3",
            f"{x} * {x}.abs().max().item()",
            f"{x} + {x}[{x} > 0].mean()",
            f"{x} * float({x}.std())",
            f"{x} + len({x}.flatten().tolist())",
            f"{x} + ({x} > 0).nonzero().shape[0] / {x}.numel()",
            f"{x} + torch.from_numpy({x}.detach().numpy())",
        ),
    )


@template()
def context(w: Writer) -> None:
    """Under a context manager."""
    x = w.pick(w.choose("image", "tokens"))
    manager = w.choose(
        "torch.no_grad()",
        "torch.autocast('cpu', enabled=False)",
        "torch.autocast('cpu', dtype=torch.bfloat16)",
        "torch.device('cpu')",
    )
    weight = w.parameter(x.channels)
    turned = f"{x}.movedim(1, -1)" if x.kind == "image" else str(x)
    out = w.like(x, f"{x}")
    back = ".movedim(-1, 1)" if x.kind == "image" else ""
    square = w.layer(f"nn.Linear({x.channels}, {x.channels})")
    w.line(f"with {manager}: {out} = ({square}({turned}) * {weight}){back}.to({x}.dtype)")


@template()
def hook(w: Writer) -> None:
    x = w.pick("image", channels={16, 32})
    layer = w.layer(f"nn.Conv2d({x.channels}, {x.channels}, 3, padding=1)")
    w.init(
        w.choose(
            f"{layer}.register_forward_hook(lambda m, i, o: o * 2)",
            f"{layer}.register_forward_pre_hook(lambda m, i: (i[0] + 1,))",
        )
    )
    w.like(x, f"{layer}({x})")


@template()
def checkpointed(w: Writer) -> None:
    x = w.pick("image", channels={16, 32})
    layer = w.layer(f"nn.Conv2d({x.channels}, {x.channels}, 3, padding=1)")
    w.like(x, f"torch.utils.checkpoint.checkpoint({layer}, {x}, use_reentrant=False)")


@template()
def values_made(w: Writer) -> None:
    """Constants made in forward, of sizes of the call or not."""
    x = w.pick("image")
    w.like(
        x,
        w.choose(
            f"{x} + torch.ones({x}.shape[-1], dtype={x}.dtype).cumsum(0) / 10",
            f"{x} * torch.arange({x.channels}).view(1, -1, 1, 1) / {x.channels}",
            f"{x} + torch.eye({x}.shape[2], {x}.shape[3])",
            f"{x} * torch.linspace(0.5, 1, {x}.shape[2])[:, None]",
            f"{x}.masked_fill(torch.ones({x}.shape[2], {x}.shape[3]).triu(1).bool(), 0.5)",
            f"{x} + torch.zeros(1, {x.channels}, 1, 1).to({x})",
            f"{x} * torch.hann_window({x}.shape[3])",
            f"{x} + {w.buffer('torch.randn(1, ' + str(x.channels) + ', 1, 1)')}",
            f"{x} * torch.tensor([math.pi / 3], dtype={x}.dtype)",
            f"{x} + 1 / {x}.shape[0]",
            f"{x} * {x}.shape[2] / ({x}.shape[2] + {x}.shape[3])",
        ),
    )
