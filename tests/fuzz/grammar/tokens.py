"""Statements on tokens [B, L, C], and from images to tokens and back."""

from __future__ import annotations

from tests.fuzz.grammar.registry import template
from tests.fuzz.writer import NotApplicable, Value, Writer


@template(4)
def linear(w: Writer) -> None:
    x = w.pick(w.choose("tokens", "tokens", "vector"))
    out = w.choose(16, 32)
    layer = w.layer(f"nn.Linear({x.channels}, {out}{w.maybe(', bias=False')})")
    w.new(x.kind, (*x.dims[:-1], out), f"{layer}({x})")


@template(2)
def linear_of_parameter(w: Writer) -> None:
    x = w.pick(w.choose("tokens", "tokens", "vector"))
    c = x.channels
    scale = round(c**-0.5, 3)
    weight = w.parameter(16, c, scale=scale)
    turned = w.parameter(c, 16, scale=scale)
    made = w.choose(
        f"F.linear({x}, {weight})",
        f"F.linear({x}, {weight}, {w.parameter(16)})",
        f"{x} @ {turned}",
        f"{x} @ {weight}.T",
        f"torch.matmul({x}, {turned})",
        f'torch.einsum("...c,cd->...d", {x}, {turned})',
        f"{x}.matmul({weight}.t()) + {w.parameter(16)}",
        f"F.linear({x}, {weight} * {w.parameter(16, 1)}.sigmoid())",
        f"torch.tensordot({x}, {turned}, dims=1)",
    )
    w.new(x.kind, (*x.dims[:-1], 16), made)


@template(2)
def batched_product(w: Writer) -> None:
    x = w.pick("tokens")
    c = x.channels
    scale = round(1 / c, 4)
    turned = w.parameter(c, c, scale=round(c**-0.5, 3))
    w.like(
        x,
        w.choose(
            f'torch.einsum("blc,bmc,bmd->bld", {x}, {x}, {x}) * {scale} / {x}.shape[1]',
            f"torch.bmm(({x} @ {x}.transpose(1, 2) * {scale}).softmax(-1), {x})",
            f"torch.bmm({x}, {turned}.expand({x}.shape[0], -1, -1))",
            f"torch.baddbmm({x}, {x}, {turned}[None].repeat({x}.shape[0], 1, 1), alpha=0.5)",
            f'torch.einsum("blc,cd->bld", {x}, {turned})',
            f"({x} @ ({x}.transpose(1, 2) @ {x})) * {scale} / {x}.shape[1]",
            f"torch.matmul({x}.unsqueeze(1), {turned}.view(1, 1, {c}, {c})).squeeze(1)",
            f"torch.addmm({x}.flatten(0, 1), {x}.flatten(0, 1), {turned}).view_as({x})",
        ),
    )


@template(2)
def to_tokens(w: Writer) -> None:
    x = w.pick("image", channels={16, 32})
    c = x.channels
    made = w.choose(
        f"{x}.flatten(2).transpose(1, 2)",
        f"{x}.permute(0, 2, 3, 1).reshape({x}.shape[0], -1, {c})",
        f"{x}.permute(0, 2, 3, 1).flatten(1, 2)",
        f"{x}.view({x}.shape[0], {c}, -1).mT",
        f"{x}.flatten(-2).swapaxes(-1, -2).contiguous()",
    )
    w.new("tokens", ("B", f"{x.dims[2]}{x.dims[3]}", c), made)


@template(3)
def to_image(w: Writer) -> None:
    t = w.pick("tokens")
    images = [v for v in w.values if v.kind == "image" and f"{v.dims[2]}{v.dims[3]}" == t.dims[1]]
    if not images:
        raise NotApplicable
    x = images[-1]
    made = w.choose(
        f"{t}.transpose(1, 2).reshape(-1, {t.channels}, *{x}.shape[2:])",
        f"{t}.mT.unflatten(2, {x}.shape[2:])",
        f"{t}.permute(0, 2, 1).view({x}.shape[0], {t.channels}, {x}.shape[2], {x}.shape[3])",
        f"{t}.view({x}.shape[0], {x}.shape[2], {x}.shape[3], -1).permute(0, 3, 1, 2)",
    )
    w.new("image", ("B", t.channels, *x.dims[2:]), made)


@template(3)
def norm_of_tokens(w: Writer) -> None:
    x = w.pick("tokens")
    c = x.channels
    layers = (
        f"nn.LayerNorm({c})",
        f"nn.LayerNorm({c}, eps=1e-6, elementwise_affine=False)",
        f"nn.LayerNorm({c}, bias=False)",
        f"nn.RMSNorm({c})",
        f"nn.RMSNorm({c}, elementwise_affine=False)",
    )
    how = w.choose("layer", "layer", "written", "batch")
    if how == "layer":
        w.like(x, f"{w.layer(w.choose(*layers))}({x})")
    elif how == "batch":
        layer = w.layer(f"nn.{w.choose('BatchNorm1d', 'InstanceNorm1d')}({c})")
        w.like(x, f"{layer}({x}.transpose(1, 2)).transpose(1, 2)")
    else:
        v = w.temporary(f"{x}.to(torch.float32).pow(2).mean(-1, keepdim=True)")
        w.like(x, f"({x} * torch.rsqrt({v} + 1e-6)).to({x}.dtype) * {w.parameter(c)}")


@template(2)
def feed_forward(w: Writer) -> None:
    x = w.pick("tokens")
    c = x.channels
    if w.choose(True, False):
        up, down = w.layer(f"nn.Linear({c}, {4 * c})"), w.layer(f"nn.Linear({2 * c}, {c})")
        w.line(f"a, gate = {up}({x}).chunk(2, dim=-1)")
        gate = w.choose("F.gelu(gate)", "F.silu(gate)", "torch.sigmoid(gate)")
        w.like(x, f"{x} + {down}(a * {gate})")
    else:
        made = f"nn.Sequential(nn.Linear({c}, 48), nn.GELU(), nn.Dropout(0.1), nn.Linear(48, {c}))"
        w.like(x, f"{x} + {w.layer(made)}({x})")


def _mask(w: Writer, keys: Value) -> str:
    """A mask [B, 1, 1, L] over the keys' tokens: none, bool or additive."""
    masks = [v for v in w.values if v.kind == "mask" and v.dims == keys.dims[:2]]
    if not masks:
        return ""
    m = masks[-1]
    return w.choose(
        "",
        f"{m}[:, None, None].bool()",
        f"torch.where({m}[:, None, None] > 0, 0.0, -math.inf).to({keys}.dtype)",
        f"((1 - {m}.to({keys}.dtype)) * -10000.0)[:, None, None]",
        f"torch.zeros_like({m}, dtype={keys}.dtype).masked_fill({m} < 0.5, float('-inf'))"
        "[:, None, None]",
    )


@template(4)
def attention(w: Writer) -> None:
    """Heads by views, scaled dot product attention or written out, self or cross, masked or not."""
    x = w.pick("tokens")
    y = w.pick("tokens") if w.choose(True, False) else x
    c = x.channels
    q = w.layer(f"nn.Linear({c}, {c})")
    k, v = (
        w.layer(f"nn.Linear({y.channels}, {c}, bias=False)"),
        w.layer(f"nn.Linear({y.channels}, {c})"),
    )
    heads = w.choose(1, 2, 4)
    split = w.choose(
        ".unflatten(-1, (HEADS, -1)).transpose(1, 2)",
        ".view(X.shape[0], -1, HEADS, WIDTH).transpose(1, 2)",
        ".reshape(X.shape[0], X.shape[1], HEADS, WIDTH).permute(0, 2, 1, 3)",
    )
    names = []
    for layer, source in ((q, x), (k, y), (v, y)):
        ways = {"HEADS": heads, "WIDTH": c // heads, "X": source}
        text = split
        for word, replacement in ways.items():
            text = text.replace(word, str(replacement))
        names.append(w.temporary(f"{layer}({source}){text}"))
    mask = _mask(w, y)
    if w.choose(True, True, False):
        options = f", attn_mask={mask}" if mask else w.choose("", f", scale={c**-0.5:.3f}")
        if not mask and x is y:
            options += w.maybe(", is_causal=True")
        a = w.temporary(f"F.scaled_dot_product_attention({', '.join(names)}{options})")
    else:
        s = w.temporary(f"{names[0]} @ {names[1]}.transpose(-1, -2) * {(c / heads) ** -0.5:.3f}")
        if mask and ".bool()" in mask:
            w.line(f"{s} = {s}.masked_fill(~{mask}, -math.inf)")
        elif mask:
            w.line(f"{s} = {s} + {mask}")
        soft = w.choose("softmax(dim=-1)", f"float().softmax(-1).type_as({s})")
        a = w.temporary(f"{s}.{soft} @ {names[2]}")
    w.line(f"{a} = {a}.transpose(1, 2).{w.choose('flatten(2)', f'reshape({x}.shape[0], -1, {c})')}")
    out = w.layer(f"nn.Linear({c}, {c})")
    w.like(x, w.choose(f"{x} + {out}({a})", f"{out}({a})"))


@template(2)
def fused_attention(w: Writer) -> None:
    """One linear for queries, keys and values; grouped keys, norms of heads."""
    x = w.pick("tokens")
    c = x.channels
    qkv = w.layer(f"nn.Linear({c}, {3 * c})")
    made = w.choose(
        f"q, k, v = {qkv}({x}).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)",
        f"q, k, v = {qkv}({x}).view({x}.shape[0], -1, 3, 2, {c // 2}).permute(2, 0, 3, 1, 4)",
        f"q, k, v = (a.unflatten(-1, (2, -1)).transpose(1, 2) for a in {qkv}({x}).chunk(3, -1))",
    )
    w.line(made)
    if w.choose(True, False):
        norm = w.layer(f"nn.RMSNorm({c // 2})")
        w.line(f"q, k = {norm}(q), {norm}(k)")
    if w.choose(True, False):
        w.line("k, v = (a[:, :1].repeat_interleave(2, dim=1) for a in (k, v))")
    w.like(x, "F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)")


@template(2)
def multihead(w: Writer) -> None:
    x = w.pick("tokens")
    y = w.pick("tokens", channels={x.channels})
    c = x.channels
    layer = w.layer(f"nn.MultiheadAttention({c}, 2, batch_first=True)")
    masks = [v for v in w.values if v.kind == "mask" and v.dims == y.dims[:2]]
    pad = w.maybe(f", key_padding_mask={masks[-1]} == 0") if masks else ""
    way = w.choose(
        f"{layer}({x}, {y}, {y}, need_weights=False{pad})[0]", f"{layer}({x}, {y}, {y}{pad})[0]"
    )
    w.like(x, f"{x} + {way}")


@template()
def encoder_layer(w: Writer) -> None:
    x = w.pick("tokens")
    first = w.maybe(", norm_first=True")
    layer = w.layer(f"nn.TransformerEncoderLayer({x.channels}, 2, 32, batch_first=True{first})")
    w.like(x, f"{layer}({x})")


@template(2)
def convolution_1d(w: Writer) -> None:
    x = w.pick("tokens")
    c = x.channels
    made = w.choose(
        f"nn.Conv1d({c}, {c}, 3, padding=1)",
        f"nn.Conv1d({c}, {c}, 1)",
        f'nn.Conv1d({c}, {c}, 3, padding="same", padding_mode="replicate")',
        f"nn.Conv1d({c}, {c}, 3, padding=1, groups={c})",
        f"nn.ConvTranspose1d({c}, {c}, 3, padding=1)",
        f"nn.utils.parametrizations.weight_norm(nn.Conv1d({c}, {c}, 3, padding=1))",
        f"nn.Conv1d({c}, {c}, 3, padding=2, dilation=2)",
    )
    w.like(x, f"{w.layer(made)}({x}.transpose(1, 2)).transpose(1, 2)")


@template()
def recurrent(w: Writer) -> None:
    x = w.pick("tokens")
    layer = w.layer(f"nn.{w.choose('GRU', 'LSTM')}({x.channels}, {x.channels}, batch_first=True)")
    w.like(x, f"{layer}({x})[0]")


@template(2)
def reduced_tokens(w: Writer) -> None:
    x = w.pick("tokens")
    masks = [v for v in w.values if v.kind == "mask" and v.dims == x.dims[:2]]
    if masks and w.choose(True, False):
        m = masks[-1]
        made = w.choose(
            f"({x} * {m}[..., None]).sum(1) / {m}.sum(1, keepdim=True).clamp(min=1)",
            f"torch.where({m}[..., None] > 0, {x}, -9.0).amax(1)",
            f"{x}.masked_fill({m}[..., None] == 0, 0).sum(1) / {m}.sum(1)[:, None].to({x}.dtype)",
        )
    else:
        made = w.choose(
            f"{x}.mean(1)",
            f"{x}.sum(1) / {x}.shape[1]",
            f"{x}[:, 0]",
            f"{x}[:, -1]",
            f"{x}.amax(1)",
            f"{x}.cumsum(1)[:, -1] * 0.2",
            f"{x}.unbind(1)[0]",
            f"{x}.logsumexp(1)",
            f"{x}.sort(dim=1).values[:, 1]",
            f"{x}.topk(2, dim=1).values.sum(1)",
            f"{x}.prod(1).tanh() + {x}[:, 0]",
        )
    w.new("vector", ("B", x.channels), made)


@template(2)
def moved_tokens(w: Writer) -> None:
    x = w.pick("tokens")
    c = x.channels
    w.like(
        x,
        w.choose(
            f"{x}.roll(1, 1)",
            f"{x}.flip(1)",
            f"torch.cat([{x}[:, 1:], {x}[:, :1]], dim=1)",
            f"F.pad({x}, (0, 0, 1, 0))[:, :-1]",
            f"F.pad({x}, (1, -1))",
            f"torch.cat([{w.parameter(1, 2, c)}.expand({x}.shape[0], -1, -1), {x}], 1)[:, 2:]",
            f"torch.cat([{w.parameter(2, c)}.repeat({x}.shape[0], 1, 1), {x}], 1)[:, :-2]",
            f"torch.gather({x}, 1, torch.zeros_like({x}, dtype=torch.long)) + {x}",
            f"{x}.cumsum(1) / torch.arange(1, {x}.shape[1] + 1)[None, :, None].to({x}.dtype)",
            f"{x} * torch.ones({x}.shape[1], {x}.shape[1]).tril().sum(1)[:, None] / {x}.shape[1]",
            f"{x} + {x}.mean(1, keepdim=True)",
            f"{x} + {x}.mean(0, keepdim=True)",
            f"{x}[:, torch.arange({x}.shape[1]).flip(0)]",
            f"{x}.reshape(-1, {c}).unflatten(0, ({x}.shape[0], -1))",
            f"{x} + torch.outer(torch.arange({x}.shape[1]) / 10.0, torch.linspace(0, 1, {c}))",
            f"torch.take_along_dim({x}, {x}.argsort(1), 1) * 0.5 + {x}",
        ),
    )


@template()
def learned_positions(w: Writer) -> None:
    x = w.pick("tokens")
    table = w.parameter(1, 400, x.channels)
    w.like(
        x,
        w.choose(
            f"{x} + {table}[:, :{x}.shape[1]]",
            f"{x} + {table}.narrow(1, 0, {x}.shape[1]).to({x}.dtype)",
            f"{x} + F.embedding(torch.arange({x}.shape[1]), {table}[0])",
        ),
    )


@template(3)
def rotary(w: Writer) -> None:
    """Positions times frequencies, and tokens turned by them: in every way models write it."""
    x = w.pick("tokens")
    c = x.channels
    half = c // 2
    frequency = f"10000.0 ** (-torch.arange({half}) / {half})"
    kind = w.choose(".float()", "", ".to(torch.float64)")
    where = w.temporary(f"torch.arange({x}.shape[1]){kind}")
    angle = w.temporary(f"torch.outer({where}, {frequency})")
    how = w.choose("real", "complex", "strided", "halves")
    if how == "complex":
        turn = w.temporary(f"torch.polar(torch.ones_like({angle}), {angle})")
        z = f"torch.view_as_complex({x}.float().reshape(*{x}.shape[:-1], -1, 2))"
        w.like(x, f"torch.view_as_real({z} * {turn}).flatten(2).type_as({x})")
        return
    cos, sin = (w.temporary(f"{angle}.{f}().to({x}.dtype)") for f in ("cos", "sin"))
    if how == "real":
        w.line(f"real, imag = {x}.unflatten(-1, (-1, 2)).unbind(-1)")
        turned = f"torch.stack([real * {cos} - imag * {sin}, real * {sin} + imag * {cos}], -1)"
        w.like(x, f"{turned}.flatten(2)")
    elif how == "halves":
        w.line(f"a, b = {x}.chunk(2, dim=-1)")
        w.like(x, f"torch.cat([a * {cos} - b * {sin}, b * {cos} + a * {sin}], dim=-1)")
    else:
        out = w.like(x, f"torch.empty_like({x})")
        w.line(f"a, b = {x}[..., 0::2], {x}[..., 1::2]")
        w.line(f"{out}[..., 0::2] = a * {cos} - b * {sin}")
        w.line(f"{out}[..., 1::2] = a * {sin} + b * {cos}")


@template()
def tied(w: Writer) -> None:
    """An embedding and the layer that is its transpose; a weight used both ways."""
    x = w.pick("tokens")
    c = x.channels
    layer = w.layer(f"nn.Linear({c}, 16)")
    w.line(f"a = {layer}({x})")
    w.like(x, w.choose(f"a @ {layer}.weight", f"F.linear(a, {layer}.weight.t())"))


@template()
def shared_linear(w: Writer) -> None:
    x = w.pick("tokens")
    y = w.pick("tokens", dims=x.dims)
    layer = w.layer(f"nn.Linear({x.channels}, {x.channels})")
    w.like(
        x,
        w.choose(
            f"{layer}(F.gelu({layer}({x})))",
            f"{layer}({x}) + {layer}({y}.flip(1))",
            f"{layer}({x}) + {layer}({x}.mean(1, keepdim=True))",
        ),
    )
