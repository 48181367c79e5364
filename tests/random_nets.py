"""Random small CNNs: a description that prints and shrinks well, and the module that it stands for.

    from random_nets import nets
    @given(nets()) ... model = net.build(); example = net.example()

Activations have a scale of about one, and no step multiplies a rounding by more than a few: weights are
scaled by their fan-in, BatchNorm has an eps of 0.1, and one is added to every output, so that its largest
magnitude is the scale of what was added up. So the tolerance of the dtype is fair for every net.
"""

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from random_modules import GROUPS, KEEPS_SIZE, OPS, OUTPUTS, REPEATED, USES, RandomNet
from torch import nn

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Conv:
    """Arguments of Conv2d, its weight (``random``, ``zero``, ``rank one``) and a key of ``USES``."""

    in_channels: int
    out_channels: int
    kernel_size: Size
    stride: Size = (1, 1)
    padding: Any = (0, 0)
    dilation: Size = (1, 1)
    groups: int = 1
    bias: bool = True
    padding_mode: str = "zeros"
    weight: str = "random"
    frozen: bool = False
    use: str = "plain"

    def build(self) -> nn.Module:
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[:9]}
        conv = nn.Conv2d(**options)
        with torch.no_grad():
            if self.weight == "zero":
                conv.weight.zero_()
            if self.weight == "rank one":
                conv.weight.copy_(
                    conv.weight[:1] * torch.linspace(-1, 1, self.out_channels).view(-1, 1, 1, 1)
                )
        conv.requires_grad_(not self.frozen)
        return USES[self.use](conv)


@dataclasses.dataclass(frozen=True)
class Op:
    """A step without convolutions: a key of ``OPS``."""

    kind: str
    channels: int

    def build(self) -> nn.Module:
        return OPS[self.kind](self.channels)


@dataclasses.dataclass(frozen=True)
class Group:
    """One or more chains of parts, put together by a key of ``GROUPS``."""

    kind: str
    chains: tuple[tuple[Any, ...], ...]

    def build(self) -> nn.Module:
        return GROUPS[self.kind](*(nn.Sequential(*(part.build() for part in chain)) for chain in self.chains))


@dataclasses.dataclass(frozen=True)
class Net:
    """A whole net: its parts, what it is fed, what it returns (a key of ``OUTPUTS``), and its state."""

    parts: tuple[Any, ...]
    in_channels: int
    image: Size
    batch: int = 2
    inputs: str = "tensor"
    output: str = "tensor"
    dtype: torch.dtype = torch.float64
    channels_last: bool = False
    training: bool = False
    seed: int = 0

    def build(self, seed: int = 0) -> nn.Module:
        """The module; another ``seed`` gives the same structure with other weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1000 * seed)
            model = RandomNet([part.build() for part in self.parts], self.output)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias)
                    nn.init.normal_(module.running_mean)
                    nn.init.uniform_(module.running_var, 0.5, 1.5)
        return self._laid_out(model.to(self.dtype)).train(self.training)

    def example(self, batch: int = 0, larger: Size = (0, 0)) -> Any:
        """Inputs, of another batch and of a larger image when asked for."""
        generator = torch.Generator().manual_seed(self.seed)
        height, width = (size + more for size, more in zip(self.image, larger, strict=True))
        shape = (batch or self.batch, self.in_channels, height, width)
        x = self._laid_out(torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype))
        scale = torch.full((1,), 0.75, dtype=self.dtype)
        given = {"tensor": x, "tuple": (x, scale), "dict": {"x": x}}
        return {**given, "keywords": {"scale": scale, "x": x}}[self.inputs]

    def _laid_out(self, thing: Any) -> Any:
        return thing.to(memory_format=torch.channels_last) if self.channels_last else thing


def _often(common: Any, *rare: Any) -> st.SearchStrategy[Any]:
    """The first value about half of the time; shrinks towards it."""
    return st.sampled_from((common,) * len(rare) + rare)


def _geometry(draw: Any, size: Size, keep: bool) -> dict[str, Any]:
    """Kernel, stride, dilation, padding that ``size`` allows and that leave at least 3 x 3, or ``size``."""
    kernel = draw(st.sampled_from([(3, 3), (1, 1), (1, 3), (3, 1), (2, 2), (5, 1), (2, 3), (1, 4), (4, 2)]))
    dilation = draw(_often((1, 1), (2, 2), (1, 2)))
    mode = draw(_often("zeros", "reflect", "replicate", "circular"))
    spread = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    if any(reach >= extent for reach, extent in zip(spread, size, strict=True)):
        kernel, dilation, spread = (1, 1), (1, 1), (0, 0)
    found = {"kernel_size": kernel, "dilation": dilation, "padding_mode": mode}
    even = any(reach % 2 for reach in spread)
    if keep:
        half = (spread[0] // 2, spread[1] // 2)
        return {**found, "padding": "same" if even else draw(st.sampled_from([half, "same"]))}
    padding = draw(st.sampled_from([(0, 0), (1, 1), (2, 1), (0, 1), "valid"]))
    stride = draw(_often((1, 1), (2, 1), (2, 2), (1, 3)))
    if min(_after(size, {**found, "padding": padding, "stride": stride})) < 3:
        return {**found, "padding": "same"}
    return {**found, "padding": padding, "stride": stride}


def _after(size: Size, geometry: dict[str, Any]) -> Size:
    padding, stride = geometry["padding"], geometry.get("stride", (1, 1))
    if padding == "same":
        return size
    pads = (0, 0) if padding == "valid" else padding
    shapes = zip(size, geometry["kernel_size"], geometry["dilation"], pads, stride, strict=True)
    height, width = ((s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, d, p, step in shapes)
    return height, width


def _conv(draw: Any, channels: int, size: Size, keep: bool, out: int | None = None) -> tuple[Conv, Size]:
    use = draw(_often("plain", *USES))
    if use in REPEATED:
        out, keep = channels if out in (None, channels) else out, True
    use = "plain" if use in REPEATED and out != channels else use
    out = out or draw(st.sampled_from([4, 1, 2, 3, 6, 8]))
    geometry = _geometry(draw, size, keep)
    groups = [g for g in (1, 2, channels) if channels % g == 0 and out % g == 0]
    conv = Conv(
        channels,
        out,
        **geometry,
        groups=draw(st.sampled_from(groups)),
        bias=draw(st.booleans()),
        weight=draw(_often("random", "random", "zero", "rank one")),
        frozen=draw(_often(False, False, True)),
        use=use,
    )
    return conv, _after(size, geometry)


def _op(draw: Any, channels: int, size: Size, keep: bool) -> tuple[Op, Size]:
    kind = draw(st.sampled_from(KEEPS_SIZE if keep else tuple(OPS)))
    if kind == "pool":
        halved = ((size[0] + 1) // 2, (size[1] + 1) // 2)
        return (Op(kind, channels), halved) if min(halved) >= 3 else (Op("relu", channels), size)
    return Op(kind, channels), (size[0] + 1, size[1] + 1) if kind == "average" else size


def _chain(
    draw: Any, channels: int, size: Size, *, keep: bool, depth: int, out: int | None = None
) -> tuple[tuple[Any, ...], int, Size]:
    """Parts, ending with a convolution to ``out`` channels when it is given; with channels and size after."""
    parts: list[Any] = []
    for _ in range(draw(st.integers(1, 4 if depth else 2))):
        kinds = ("conv", "op", "group") if depth else ("conv", "op")
        part, channels, size = _part(draw, draw(st.sampled_from(kinds)), channels, size, keep, depth)
        parts.append(part)
    if out is not None:
        conv, size = _conv(draw, channels, size, keep, out)
        return (*parts, conv), out, size
    return tuple(parts), channels, size


def _part(draw: Any, what: str, channels: int, size: Size, keep: bool, depth: int) -> tuple[Any, int, Size]:
    if what == "conv":
        conv, size = _conv(draw, channels, size, keep)
        return conv, conv.out_channels, size
    if what == "op":
        op, size = _op(draw, channels, size, keep)
        return op, channels, size
    return _group(draw, channels, size, keep, depth - 1)


def _group(draw: Any, channels: int, size: Size, keep: bool, depth: int) -> tuple[Group, int, Size]:
    kind = draw(st.sampled_from(tuple(GROUPS)))
    if kind in ("residual", "large batch only"):
        chain, _, size = _chain(draw, channels, size, keep=True, depth=depth, out=channels)
        return Group(kind, (chain,)), channels, size
    if kind == "squeeze":
        chain, _, _ = _chain(draw, channels, (1, 1), keep=True, depth=0, out=channels)
        return Group(kind, (chain,)), channels, size
    if kind == "branches":
        drawn = [_chain(draw, channels, size, keep=True, depth=0) for _ in range(2)]
        return Group(kind, tuple(chain for chain, _, _ in drawn)), drawn[0][1] + drawn[1][1], size
    chain, channels, size = _chain(draw, channels, size, keep=keep, depth=depth)
    return Group(kind, (chain,)), channels, size


@st.composite
def nets(draw: Any) -> Net:
    """Nets of one to about eight convolutions; the first part is a convolution."""
    channels, size = draw(st.sampled_from([3, 1, 4])), (draw(st.integers(6, 10)), draw(st.integers(6, 10)))
    stem, after = _conv(draw, channels, size, keep=False)
    rest, _, _ = _chain(draw, stem.out_channels, after, keep=False, depth=2)
    return Net(
        parts=(stem, *rest),
        in_channels=channels,
        image=size,
        batch=draw(st.sampled_from([2, 1, 3])),
        inputs=draw(_often("tensor", "tuple", "dict", "keywords")),
        output=draw(st.sampled_from(tuple(OUTPUTS))),
        dtype=draw(_often(torch.float64, torch.float64, torch.float32)),
        channels_last=draw(_often(False, False, True)),
        training=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )
