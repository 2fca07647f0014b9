"""Statements on images [B, C, H, W]."""

from __future__ import annotations

from tests.fuzz.grammar.registry import template
from tests.fuzz.writer import Dim, NotApplicable, Value, Writer


def sized(image: Value, channels: int, *size: Dim) -> tuple[Dim, ...]:
    """Dimensions like the image's, with other channels or another size."""
    return ("B", channels, *(size or image.dims[2:]))


def halves(w: Writer, how: str) -> Value:
    """An image that may be halved: once or twice where sizes are multiples of four."""
    image = w.pick("image")
    deep = str(image.dims[2]).count("/")
    if deep >= 2 or (w.odd and how == "exact"):
        raise NotApplicable
    return image


@template(5)
def conv2d(w: Writer) -> None:
    x = w.pick("image")
    out = w.choose(4, 16, 16, 32)
    kernel = w.choose(1, 3, 3, 5)
    extra = w.choose(
        f"padding={kernel // 2}",
        f"padding={kernel // 2}, bias=False",
        'padding="same"',
        f'padding={kernel // 2}, padding_mode="{w.choose("reflect", "replicate", "circular")}"',
        f"padding={kernel // 2}, groups={w.choose(2, 4)}",
        f"padding={kernel // 2 * 2}, dilation=2",
    )
    layer = w.layer(f"nn.Conv2d({x.channels}, {out}, {kernel}, {extra})")
    w.new("image", sized(x, out), f"{layer}({x})")


@template()
def depthwise(w: Writer) -> None:
    x = w.pick("image")
    c = x.channels
    layer = w.layer(f"nn.Conv2d({c}, {c}, 3, padding=1, groups={c})")
    w.like(x, f"{layer}({x})")


@template()
def resnet(w: Writer) -> None:
    x = w.pick("image", channels={16, 32})
    c = x.channels
    norm, conv = w.layer(f"nn.GroupNorm(4, {c})"), w.layer(f"nn.Conv2d({c}, {c}, 3, padding=1)")
    w.like(x, f"{x} + {conv}(F.silu({norm}({x})))")


@template()
def conv_of_parameter(w: Writer) -> None:
    x = w.pick("image")
    c = x.channels
    weight = w.parameter(16, c, 3, 3, scale=round((9 * c) ** -0.5, 3))
    bias = w.choose("", f", {w.parameter(16)}", ", bias=None")
    w.new("image", sized(x, 16), f"F.conv2d({x}, {weight}{bias}, padding=1)")


@template()
def standardised_conv(w: Writer) -> None:
    x = w.pick("image", channels={16, 32})
    c = x.channels
    weight = w.parameter(16, c, 3, 3)
    scaled = w.choose(
        f"{weight} / math.sqrt({9 * c})",
        f"F.normalize({weight}.flatten(1), dim=1).view_as({weight})",
        f"({weight} - {weight}.mean((1, 2, 3), keepdim=True)) / {round((9 * c) ** 0.5, 2)}",
    )
    w.new("image", sized(x, 16), f"F.conv2d({x}, {scaled}, padding=1)")


@template()
def weight_norm(w: Writer) -> None:
    x = w.pick("image")
    c = x.channels
    norm = w.choose("weight_norm", "spectral_norm")
    made = f"nn.utils.parametrizations.{norm}(nn.Conv2d({c}, 16, 3, padding=1))"
    w.new("image", sized(x, 16), f"{w.layer(made)}({x})")


@template()
def fixed_filter(w: Writer) -> None:
    x = w.pick("image")
    c = x.channels
    taps = w.buffer("torch.tensor([1.0, 3.0, 3.0, 1.0])[:, None] * torch.ones(4) / 32")
    kernel = w.temporary(f"{taps}.to({x}.dtype)[None, None].repeat({c}, 1, 1, 1)")
    padded = f"F.pad({x}, (2, 1, 2, 1))"
    w.like(x, f"F.conv2d({padded}, {kernel}, groups={c})")


@template()
def transposed_conv(w: Writer) -> None:
    x = w.pick("image")
    c = x.channels
    if w.choose(True, False):
        layer = w.layer(f"nn.ConvTranspose2d({c}, 16, 3, padding=1)")
        w.new("image", sized(x, 16), f"{layer}({x})")
        return
    layer = w.layer(f"nn.ConvTranspose2d({c}, 16, 4, stride=2, padding=1)")
    up = w.temporary(f"{layer}({x})")
    w.new("image", sized(x, 16), f"F.avg_pool2d({up}, 2)")


@template(3)
def down_and_up(w: Writer) -> None:
    """A level of a UNet: any size, restored by size or by scale."""
    x = w.pick("image")
    c = x.channels
    conv = w.layer(f"nn.Conv2d({c}, {c}, 3, padding=1)")
    down = w.choose(
        f"{w.layer(f'nn.Conv2d({c}, {c}, 3, stride=2, padding=1)')}({x})",
        f"F.avg_pool2d({x}, 2, ceil_mode=True)",
        f"F.max_pool2d({x}, 2, ceil_mode=True)",
        f"F.interpolate({x}, size=(({x}.shape[2] + 1) // 2, ({x}.shape[3] + 1) // 2))",
    )
    h = w.temporary(f"{conv}({down})")
    by_size = (
        f'size={x}.shape[-2:], mode="{w.choose("nearest", "bilinear", "nearest-exact", "bicubic")}"'
    )
    by_scale = f'scale_factor={w.choose("2", "2.0")}, mode="{w.choose("nearest", "bilinear")}"'
    up = f"F.interpolate({h}, {by_size if w.odd else w.choose(by_size, by_scale)})"
    w.like(x, f"{x} + {up}")


@template()
def cropped_up(w: Writer) -> None:
    """Odd sizes as some models do them: up by two, and cut."""
    x = w.pick("image")
    c = x.channels
    conv = w.layer(f"nn.Conv2d({c}, {c}, 3, padding=1)")
    padded = w.temporary(f"F.pad({x}, (0, {x}.shape[3] % 2, 0, {x}.shape[2] % 2))")
    up = w.temporary(f"F.interpolate({conv}(F.avg_pool2d({padded}, 2)), scale_factor=2)")
    w.like(x, f"{up}[:, :, :{x}.shape[2], :{x}.shape[3]]")


@template()
def pixel_shuffle(w: Writer) -> None:
    if w.odd:
        raise NotApplicable
    x = w.pick("image", channels={4, 16})
    c = x.channels
    conv = w.layer(f"nn.Conv2d({4 * c}, {4 * c}, 1)")
    w.like(x, f"F.pixel_shuffle({conv}(F.pixel_unshuffle({x}, 2)), 2)")


@template(3)
def norm_of_image(w: Writer) -> None:
    x = w.pick("image", channels={16, 32})
    c = x.channels
    made = w.choose(
        f"nn.GroupNorm(4, {c})",
        f"nn.GroupNorm({c}, {c}, affine=False)",
        f"nn.GroupNorm(1, {c}, eps=1e-3)",
        f"nn.BatchNorm2d({c})",
        f"nn.BatchNorm2d({c}, affine=False)",
        f"nn.InstanceNorm2d({c}, affine=True)",
        f"nn.InstanceNorm2d({c})",
    )
    w.like(x, f"{w.layer(made)}({x})")


@template()
def functional_norm(w: Writer) -> None:
    x = w.pick("image", channels={16, 32})
    c = x.channels
    w.like(
        x,
        w.choose(
            f"F.group_norm({x}, 4, {w.parameter(c)}, {w.parameter(c)})",
            f"F.group_norm({x}, 4)",
            f"F.layer_norm({x}.permute(0, 2, 3, 1), ({c},)).permute(0, 3, 1, 2)",
            f"{x} * torch.rsqrt({x}.pow(2).mean(1, keepdim=True) + 1e-5)",
            f"F.normalize({x}, dim=1) * {round(c**0.5, 1)}",
            f"({x} - {x}.mean((2, 3), keepdim=True)) / ({x}.std((2, 3), keepdim=True) + 1e-2)",
            f"F.instance_norm({x})",
        ),
    )


@template(3)
def activation(w: Writer) -> None:
    x = w.pick(w.choose("image", "image", "tokens", "vector"))
    w.like(
        x,
        w.choose(
            f"F.silu({x})",
            f"F.gelu({x})",
            f'F.gelu({x}, approximate="tanh")',
            f"F.relu({x})",
            f"F.leaky_relu({x}, 0.2)",
            f"F.mish({x})",
            f"F.softplus({x})",
            f"F.elu({x})",
            f"F.hardswish({x})",
            f"torch.tanh({x})",
            f"{x} * torch.sigmoid({x})",
            f"{x} + torch.sin({x}) ** 2",
            f"{x}.clamp(-1.5, 1.5)",
            f"torch.relu({x}) - 0.2 * torch.relu(-{x})",
            f"F.relu6({x})",
            f"torch.where({x} > 0, {x}, 0.1 * {x})",
            f"torch.maximum({x}, 0.3 * {x})",
            f"F.logsigmoid({x})",
        ),
    )


@template()
def prelu(w: Writer) -> None:
    x = w.pick("image")
    w.like(x, f"{w.layer(w.choose('nn.PReLU()', f'nn.PReLU({x.channels})'))}({x})")


@template(4)
def pad(w: Writer) -> None:
    """Padding that a convolution without its own follows: of sizes, cropping, of channels."""
    x = w.pick("image")
    c = x.channels
    how = w.choose(
        "(1, 1, 1, 1)",
        "(0, 2, 1, 1)",
        "(1, 1, 1, 1), value=0.5",
        '(1, 1, 1, 1), mode="reflect"',
        '(1, 1, 2, 0), mode="replicate"',
        '(2, 0, 1, 1), mode="circular"',
        "(2, 2, 2, 2)",
        "(2, 0, 0, 2)",
    )
    if "(2, 2, 2, 2)" in how:
        x_cut = f"{x}[:, :, 1:-1, 1:-1]"
        source = f"F.pad({x_cut}, {how})"
    else:
        source = f"F.pad({x}, {how})"
    layer = w.layer(f"nn.Conv2d({c}, 16, 3)")
    w.new("image", sized(x, 16), f"{layer}({source})")


@template(2)
def crop_by_padding(w: Writer) -> None:
    x = w.pick("image")
    c = x.channels
    how = w.choose("(-1, 1, 0, 0)", "(1, -1, 1, -1)", "(0, 0, -1, 1)", "(-2, 2, 1, -1)")
    layer = w.layer(f"nn.Conv2d({c}, 16, 3, padding=1)")
    w.new("image", sized(x, 16), f"{layer}(F.pad({x}, {how}))")


@template(2)
def pad_channels(w: Writer) -> None:
    x = w.pick("image")
    c = x.channels
    before = w.choose(0, 2)
    layer = w.layer(f"nn.Conv2d({c + 4}, 16, 3, padding=1)")
    padded = f"F.pad({x}, (0, 0, 0, 0, {before}, {4 - before}){w.maybe(', value=1.0')})"
    w.new("image", sized(x, 16), f"{layer}({padded})")


@template()
def wide_stride(w: Writer) -> None:
    """Patches and back, as transformers do: sizes in multiples of two only."""
    if w.odd:
        raise NotApplicable
    x = w.pick("image")
    c = x.channels
    patch = w.layer(f"nn.Conv2d({c}, 32, 2, stride=2)")
    linear = w.layer("nn.Linear(32, 16)")
    tokens = w.temporary(f"{linear}({patch}({x}).flatten(2).transpose(1, 2))")
    h, v = w.temporary(f"{x}.shape[2] // 2"), w.temporary(f"{x}.shape[3] // 2")
    w.line(f"{tokens} = {tokens}.reshape(-1, {h}, {v}, 2, 2, 4)")
    w.line(f'{tokens} = torch.einsum("nhwpqc->nchpwq", {tokens})')
    w.new("image", sized(x, 4), f"{tokens}.reshape(-1, 4, {h} * 2, {v} * 2)")


@template(3)
def combine(w: Writer) -> None:
    kind = w.choose("image", "image", "tokens", "vector")
    x = w.pick(kind)
    y = w.pick(kind, dims=x.dims)
    w.like(
        x,
        w.choose(
            f"{x} + {y}",
            f"{x} - 0.5 * {y}",
            f"{x} * torch.sigmoid({y})",
            f"torch.lerp({x}, {y}, 0.3)",
            f"torch.lerp({x}, {y}, torch.sigmoid({y}))",
            f"torch.addcmul({x}, {y}, {y}, value=0.1)",
            f"torch.add({x}, {y}, alpha=0.5)",
            f"({x} + {y}) / math.sqrt(2)",
            f"torch.stack([{x}, {y}]).mean(0)",
            f"torch.stack([{x}, {y}], dim=1).sum(1)",
            f"sum([{x}, {y}])",
            f"torch.maximum({x}, {y})",
        ),
    )


@template(3)
def concatenate(w: Writer) -> None:
    x = w.pick("image")
    y = w.pick("image")
    if x.dims[2:] != y.dims[2:] or x.channels + y.channels > 64:
        raise NotApplicable
    both = x.channels + y.channels
    layer = w.layer(f"nn.Conv2d({both}, 16, {w.choose('1', '3, padding=1')})")
    w.new("image", sized(x, 16), f"{layer}(torch.cat([{x}, {y}], dim=1))")


@template(3)
def halve_channels(w: Writer) -> None:
    x = w.pick("image", channels={16, 32})
    c = x.channels
    half = c // 2
    made = w.choose(
        f"a, b = {x}.chunk(2, dim=1)",
        f"a, b = {x}.split({half}, 1)",
        f"a, b = {x}.split([{half}, {half}], dim=1)",
        f"a, b = torch.tensor_split({x}, 2, dim=1)",
        f"a, b = {x}[:, :{half}], {x}[:, {half}:]",
        f"a, b = {x}[:, ::2], {x}[:, 1::2]",
        f"a, b = {x}.unflatten(1, (2, {half})).unbind(1)",
        f"a, b = {x}.narrow(1, 0, {half}), {x}.select(1, 3).unsqueeze(1)",
        f"b, a = {x}.reshape(-1, 2, {half}, *{x}.shape[2:]).transpose(0, 1)",
    )
    w.line(made)
    w.new("image", sized(x, half), w.choose("a * torch.sigmoid(b)", "a + b", "F.silu(b) * a"))


@template()
def rearranged(w: Writer) -> None:
    """Moves values about, and does not change shapes."""
    x = w.pick("image", channels={4, 16, 32})
    c = x.channels
    w.like(
        x,
        w.choose(
            f"{x}.roll((1, 2), (2, 3))",
            f"{x}.flip(3)",
            f"torch.flip({x}, [1])",
            f"{x}[:, torch.arange({c - 1}, -1, -1)]",
            f"{x}.index_select(1, {w.buffer(f'torch.randperm({c})')})",
            f"F.channel_shuffle({x}, 2)",
            f"{x}.unflatten(1, (2, {c // 2})).swapaxes(1, 2).flatten(1, 2)",
            f"{x}.movedim(1, -1).contiguous().movedim(-1, 1)",
            f"{x}.repeat(1, 2, 1, 1)[:, 1:{c + 1}]",
            f"{x}.repeat_interleave(2, dim=1)[:, :{c}]",
            f"torch.cat([{x}[:, 1:], {x}[:, :1]], 1)",
            f"{x}.expand(-1, -1, -1, -1).clone()",
            f"F.fold(F.unfold({x}, 3, padding=1), {x}.shape[2:], 3, padding=1) / 9",
            f"{x}.permute(0, 2, 3, 1).reshape(-1, {c}).view({x}.shape[0], *{x}.shape[2:], {c})"
            ".permute(0, 3, 1, 2)",
            f"{x}.tile(2, 1, 1, 1)[:{x}.shape[0]]",
            f"torch.rot90({x}, 2, (2, 3))",
        ),
    )


@template(2)
def reduced(w: Writer) -> None:
    """An image's statistics as a vector."""
    x = w.pick("image")
    w.new(
        "vector",
        ("B", x.channels),
        w.choose(
            f"{x}.mean((2, 3))",
            f"{x}.sum(dim=(-1, -2)) / ({x}.shape[2] * {x}.shape[3])",
            f"{x}.amax((2, 3))",
            f"{x}.std((2, 3))",
            f"F.adaptive_avg_pool2d({x}, 1).flatten(1)",
            f"{x}.flatten(2).logsumexp(-1) - 3",
            f"{x}.flatten(2).softmax(-1).mul({x}.flatten(2)).sum(-1)",
            f"torch.linalg.vector_norm({x}, dim=(2, 3)) / 8",
            f"{x}.flatten(2).max(dim=-1).values",
            f"{x}.var((2, 3), correction=0)",
            f"{x}.flatten(2).median(-1)[0]",
        ),
    )


@template(2)
def squeeze_excite(w: Writer) -> None:
    x = w.pick("image", channels={16, 32})
    c = x.channels
    down, up = w.layer(f"nn.Conv2d({c}, 8, 1)"), w.layer(f"nn.Conv2d(8, {c}, 1)")
    gate = f"torch.sigmoid({up}(F.relu({down}({x}.mean((2, 3), keepdim=True)))))"
    w.like(x, f"{x} * {gate}")


@template(2)
def fourier(w: Writer) -> None:
    x = w.pick("image")
    f = w.temporary(f"torch.fft.fftn({x}.float(), dim=(-2, -1))")
    how = w.choose("plain", "real", "freeu")
    if how == "plain":
        w.like(x, f"torch.fft.ifftn({f} * 0.8, dim=(-2, -1)).real.to({x}.dtype)")
    elif how == "real":
        w.like(x, f"torch.fft.irfft2(torch.fft.rfft2({x}.float()), s={x}.shape[-2:]).to({x}.dtype)")
    else:
        w.line(f"{f} = torch.fft.fftshift({f}, dim=(-2, -1))")
        mask = w.temporary(f"torch.ones({x}.shape)")
        y, z = w.temporary(f"{x}.shape[2] // 2"), w.temporary(f"{x}.shape[3] // 2")
        w.line(f"{mask}[..., {y} - 1 : {y} + 1, {z} - 1 : {z} + 1] = 0.6")
        w.line(f"{f} = torch.fft.ifftshift({f} * {mask}, dim=(-2, -1))")
        w.like(x, f"torch.fft.ifftn({f}, dim=(-2, -1)).real.to({x}.dtype)")


@template()
def image_position(w: Writer) -> None:
    """Coordinates made in forward, added to an image."""
    x = w.pick("image", channels={16, 32})
    c = x.channels
    ys = w.temporary(f"torch.arange({x}.shape[2]).float() / {x}.shape[2]")
    xs = w.temporary(f"torch.linspace(-1, 1, {x}.shape[3], dtype={x}.dtype)")
    grid = w.temporary(f'torch.stack(torch.meshgrid({ys}, {xs}, indexing="ij"))')
    conv = w.layer(f"nn.Conv2d({c + 2}, {c}, 1)")
    both = f"torch.cat([{x}, {grid}.to({x}.dtype).expand({x}.shape[0], -1, -1, -1)], dim=1)"
    w.like(x, f"{conv}({both})")


@template()
def cumulative(w: Writer) -> None:
    x = w.pick("image")
    w.like(
        x,
        w.choose(
            f"{x}.cumsum(2) / torch.arange(1, {x}.shape[2] + 1).view(1, 1, -1, 1)",
            f"{x}.flatten(2).cumsum(-1).view_as({x}) / 8",
            f"{x} / (1 + {x}.abs().cumsum(1))",
        ),
    )


@template(2)
def shared_conv(w: Writer) -> None:
    """One layer, called twice."""
    x = w.pick("image", channels={16, 32})
    y = w.pick("image", dims=x.dims)
    conv = w.layer(f"nn.Conv2d({x.channels}, {x.channels}, 3, padding=1)")
    w.like(
        x,
        w.choose(
            f"{conv}(F.silu({conv}({x})))", f"{conv}({x}) + {conv}({y})", f"{conv}({x}) * 0.5 + {y}"
        ),
    )


@template()
def video_conv(w: Writer) -> None:
    """Frames taken out of the batch or made of an image, a 3d convolution, and back."""
    x = w.pick("image", channels={16, 32})
    c = x.channels
    conv = w.layer(
        f"nn.Conv3d({c}, {c}, {w.choose('3, padding=1', '(3, 1, 1), padding=(1, 0, 0)', '1')})"
    )
    v = w.temporary(f"torch.stack([{x}, {x}.flip(3)], dim=2)")
    w.like(x, f"{conv}({v}).{w.choose('mean(2)', 'select(2, 0)', 'unbind(2)[1]')}")


@template()
def guidance(w: Writer) -> None:
    """Both halves of a doubled batch in one call, and extrapolation between them."""
    x = w.pick("image", channels={16, 32})
    c = x.channels
    conv = w.layer(f"nn.Conv2d({c}, {c}, 3, padding=1)")
    w.line(f"both = {conv}(torch.cat([{x}, 0.5 * {x}]))")
    w.line(w.choose("a, b = both.chunk(2)", f"a, b = both.split({x}.shape[0])"))
    w.like(x, "b + 2.0 * (a - b)")
