"""Modules that ask for what a tracer does not know: kinds of arguments, classes, contexts, errors."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from behaviour import X
from bypassing_modules import case
from hard_modules import Base
from torch import Tensor, nn
from torch.nn import functional as F

ODD = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(3))


def changed_input(model: Any) -> Tensor:
    given = X.clone()
    model(given)
    return given


@case(X.half(), changed_input)
class NormalisesInPlace(Base):
    def forward(self, x: Tensor) -> Any:
        x = x.float()
        x -= 0.5
        return self.out(x)


@case((X * 64).to(torch.uint8), lambda model: model(X))
class AsksWhetherItConverted(Base):
    def forward(self, image: Tensor) -> Any:
        x = image.float()
        return self.out(x if x is image else x / 255)


@case(X, lambda model: model(nn.Parameter(X)))
class AsksForAParameter(Base):
    def forward(self, x: Tensor) -> Any:
        return self.out(x) * (2 if type(x) is nn.Parameter else 1)


@case(X, lambda model: model(torch.randn(1, 3, 72, 72, generator=torch.Generator().manual_seed(1))))
class AsksForTheClassOfASize(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.out(x)
        return F.max_pool2d(y, 2) if isinstance(y.shape[-1], int) and y.shape[-1] > 64 else y


@case((X, [X + 1]), lambda model: model(X, [X]))
class AsksForANestedOne(Base):
    def forward(self, x: Tensor, more: list[Tensor]) -> Any:
        return self.out(x) * (2 if more[0] is x else 1)


def scaled(by: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * by


@case((X, scaled(2.0)), lambda model: model(X, scaled(3.0)))
class CallsWhatItIsGiven(Base):
    def forward(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Any:
        return function(self.out(x))


class Slots:
    __slots__ = ("mask",)

    def __init__(self, mask: Any) -> None:
        self.mask = mask


@case((X, Slots(1)), lambda model: model(X, Slots(None)))
class AsksForASlot(Base):
    def forward(self, x: Tensor, more: Slots) -> Any:
        return self.out(x) * (2 if more.mask is None else 1)


class Lazy:
    def __init__(self, number: int) -> None:
        self.number = number

    @property
    def mask(self) -> int | None:
        return self.number if self.number > 0 else None


@case((X, Lazy(1)), lambda model: model(X, Lazy(-1)))
class AsksForAProperty(AsksForASlot):
    pass


@case(X, lambda model: model(model.proto))
class AsksForItsBuffer(Base):
    def prepare(self) -> None:
        self.register_buffer("proto", torch.ones(1, 3, 8, 8))

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * (2 if x is self.proto else 1)


@case((X, nn.Conv2d(1, 1, 1)), lambda model: model(X, model.last))
class AsksForItsPart(Base):
    def forward(self, x: Tensor, head: nn.Module) -> Any:
        return self.out(x) * (2 if self.last is head else 1)


def deep(value: Any) -> Any:
    for _ in range(6):
        value = SimpleNamespace(a=value)
    return value


@case((X, deep(1)), lambda model: model(X, deep(None)))
class AsksDeepInside(Base):
    def forward(self, x: Tensor, more: Any) -> Any:
        return self.out(x) * (2 if more.a.a.a.a.a.a is None else 1)


@case(X, lambda model: model(ODD))
class CatchesOddSizes(Base):
    def prepare(self) -> None:
        self.down, self.up = nn.Conv2d(8, 8, 3, 2, padding=1), nn.ConvTranspose2d(8, 8, 2, 2)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        z = self.up(self.down(y))
        try:
            z = z + y
        except RuntimeError:
            z = F.interpolate(z, y.shape[-2:]) + y
        return self.last(z)


def inferred(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(X).clone()


@case(X, inferred)
class AsksForInference(Base):
    def forward(self, x: Tensor) -> Any:
        return self.out(x) * (2 if torch.is_inference_mode_enabled() else 1)


def in_half(model: Any) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        return model(X)


@case(X, in_half)
class AsksForTheAutocastDtype(Base):
    def forward(self, x: Tensor) -> Any:
        return x.to(torch.get_autocast_dtype("cpu"))
