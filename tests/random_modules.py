"""The modules that ``random_nets`` puts together: uses of one convolution, steps, groups, outputs.

No postponed annotations here: torch 2.8 cannot pickle a graph of a forward that has them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class RandomNet(nn.Module):
    def __init__(self, parts: list[nn.Module], output: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.output = output

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        if scale is not None:
            x = x * scale
        taps = []
        for part in self.parts:
            x = part(x)
            taps.append(x)
        return OUTPUTS[self.output](x + 1, taps[0] + 1)


class Pair(NamedTuple):
    last: Tensor
    first: Tensor


@dataclasses.dataclass
class Result:
    last: Tensor
    first: Tensor


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda last, first: last,
    "tuple": lambda last, first: (last, first),
    "list": lambda last, first: [last, None, first],
    "dict": lambda last, first: {"last": last, "first": first.mean((2, 3))},
    "named tuple": Pair,
    "dataclass": Result,
}


class WithConv(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv


class EachImage(WithConv):
    """Unbatched calls, in a loop that no graph can keep."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.conv(image) for image in x])


class Readers(WithConv):
    """Reads options of the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).to(self.conv.weight.dtype)
        return y / self.conv.out_channels**0.5 + self.conv.stride[0] + self.conv.kernel_size[1]


class WeightReader(WithConv):
    """A penalty of the weight beside the output: its other reader."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.conv.weight.square().mean()


class Keyword(WithConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(input=x)


class Twice(WithConv):
    """One module at two call sites."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.conv(x)))


class Aliased(WithConv):
    """One module under two names, called by both."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        self.again = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.conv(x)))


class Tied(WithConv):
    """One weight in two convolutions."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        options = (conv.stride, conv.padding, conv.dilation, conv.groups, False, conv.padding_mode)
        self.other = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, *options)
        self.other.weight = conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.tanh(self.conv(x)))


def halve(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 0.5


def hooked(conv: nn.Conv2d) -> nn.Conv2d:
    conv.register_forward_hook(halve)
    return conv


USES: dict[str, Callable[[nn.Conv2d], nn.Module]] = {
    "plain": lambda conv: conv,
    "keyword": Keyword,
    "readers": Readers,
    "hooked": hooked,
    "each image": EachImage,
    "weight reader": WeightReader,
}
REPEATED: dict[str, Callable[[nn.Conv2d], nn.Module]] = {"twice": Twice, "aliased": Aliased, "tied": Tied}
USES.update(REPEATED)


class Step(nn.Module):
    """A step that is written in the forward of its net."""

    def __init__(self, channels: int) -> None:
        super().__init__()


class Relu(Step):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class InPlace(Step):
    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu_(x * 1.0, 0.5)
        x += 0.25
        return x.mul_(0.75)


class FunctionalDropout(Step):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.25, training=self.training)


class TrainingNoise(Step):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        return x


class BatchBranch(Step):
    """A branch on the size of the batch, which symbolic tracing cannot take."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) if x.shape[0] > 2 else torch.sin(x)


class ShapeScale(Step):
    """Sizes in the arithmetic: right only when they are not kept as constants."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.reshape(n, c * h, w).view(n, c, h, w) * (1 + 1 / (n * h))


class Constant(Step):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tensor([0.5], dtype=x.dtype)


class CallCount(Step):
    """A buffer that forward changes."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


OPS: dict[str, Callable[[int], nn.Module]] = {
    "relu": Relu,
    "relu in place": lambda channels: nn.ReLU(inplace=True),
    "batch norm": lambda channels: nn.BatchNorm2d(channels, eps=0.1),
    "in place": InPlace,
    "pool": lambda channels: nn.MaxPool2d(3, 2, 1),
    "average": lambda channels: nn.AvgPool2d(2, 1, 1),
    "dropout": lambda channels: nn.Dropout(0.25),
    "dropout of channels": lambda channels: nn.Dropout2d(0.25),
    "functional dropout": FunctionalDropout,
    "training noise": TrainingNoise,
    "batch branch": BatchBranch,
    "shape scale": ShapeScale,
    "constant": Constant,
    "call count": CallCount,
}
KEEPS_SIZE = tuple(kind for kind in OPS if kind not in ("pool", "average"))


class WithChain(nn.Module):
    def __init__(self, *chains: nn.Module) -> None:
        super().__init__()
        self.chains = nn.ModuleList(chains)


class Nested(WithChain):
    def forward(self, x: Tensor) -> Tensor:
        return self.chains[0](x)


class Residual(WithChain):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.chains[0](x)) * 0.5


class Branches(WithChain):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([chain(x) for chain in self.chains], 1)


class Squeeze(WithChain):
    """A gate for each channel from means over the image, as in squeeze-and-excitation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.chains[0](x.mean((2, 3), keepdim=True)))


class Checkpointed(WithChain):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.chains[0], x, use_reentrant=False)
        return y


class WithoutGradient(WithChain):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.chains[0](x)


class LargeBatchOnly(WithChain):
    """Convolutions that a small batch does not reach."""

    def forward(self, x: Tensor) -> Tensor:
        return self.chains[0](x) if x.shape[0] > 2 else x


GROUPS: dict[str, Callable[..., nn.Module]] = {
    "nested": Nested,
    "residual": Residual,
    "branches": Branches,
    "squeeze": Squeeze,
    "checkpoint": Checkpointed,
    "no grad": WithoutGradient,
    "large batch only": LargeBatchOnly,
}
