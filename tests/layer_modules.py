"""Modules whose convolutions are more than their options say, or are held where a copy does not look."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from hard_modules import Base
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor

EXACT: dict[str, Callable[[], nn.Module]] = {}
"""Compressed at full rank they are what they were."""
REASONS: dict[str, tuple[Callable[[], nn.Module], str]] = {}
"""And their first convolution is left alone for this reason."""


def exact(make: Any) -> Any:
    EXACT[make.__name__] = make
    return make


def left_alone(reason: str) -> Callable[[Any], Any]:
    def note(make: Any) -> Any:
        REASONS[make.__name__] = (make, reason)
        return exact(make)

    return note


@exact
class HookKeepsAnOutput(Base):
    def prepare(self) -> None:
        self.conv.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen = output

    def forward(self, x: Tensor) -> Any:
        return self.out(x), self.seen


@exact
class HookCallsAnother(Base):
    def prepare(self) -> None:
        self.down = nn.Conv2d(3, 8, 1)
        self.conv.register_forward_hook(lambda module, args, output: output + self.down(args[0]))


@exact
class HandleKept(Base):
    def prepare(self) -> None:
        self.handle = self.conv.register_forward_hook(lambda module, args, output: output * 2)


@exact
class HookMadeByForward(Base):
    made = False

    def forward(self, x: Tensor) -> Any:
        if not self.made:
            self.made = True
            self.conv.register_forward_hook(lambda module, args, output: output * 2)
        return self.out(x)


@exact
class KnowsItsParent(Base):
    def prepare(self) -> None:
        self.conv.__dict__["owner"] = self

    def forward(self, x: Tensor) -> Any:
        return self.last(F.relu(self.conv.owner.conv(x)))


class Scaled(nn.Conv2d):
    factor = 2.0

    def scaled(self, x: Tensor) -> Tensor:
        return self(x) * 2


@exact
class AttributeOfAClass(Base):
    def prepare(self) -> None:
        self.conv = Scaled(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.conv(x) * getattr(self.conv, "factor", 1.0)) if x.shape[0] < 50 else x


@exact
class MethodOfAClass(Base):
    def prepare(self) -> None:
        self.conv = Scaled(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.conv.scaled(x))


class Switch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.merged = nn.Conv2d(3, 8, 3, padding=1), False

    def train(self, mode: bool = True) -> Any:  # and forgets to return itself
        super().train(mode)
        self.merged = not mode

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.merged else self.conv(x) * 3


@exact
class TrainReturnsNone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = Switch(), nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.last(F.relu(self.conv(x)))


@exact
class LambdaInATuple(Base):
    def prepare(self) -> None:
        self.steps = (lambda x: self.conv(x),)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.steps[0](x))


@exact
class LambdaDeepInside(Base):
    def prepare(self) -> None:
        self.steps = {"a": {"f": [lambda x: self.conv(x)]}}

    def forward(self, x: Tensor) -> Any:
        return self.last(self.steps["a"]["f"][0](x))


@exact
class ListInAClosure(Base):
    def prepare(self) -> None:
        steps = [self.conv, self.bn]
        self.start = lambda x: steps[1](steps[0](x))

    def forward(self, x: Tensor) -> Any:
        return self.last(self.start(x))


@exact
class LambdaInAPartial(Base):
    def prepare(self) -> None:
        self.step = functools.partial(lambda k, x: self.conv(x) * k, 2.0)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.step(x))


@exact
class ExpandedBuffer(Base):
    def prepare(self) -> None:
        self.register_buffer("mean", torch.tensor(0.5).expand(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.out(x - self.mean)


@exact
class BufferOfAnotherShape(Base):
    def prepare(self) -> None:
        self.register_buffer("history", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Any:
        self.history.data = torch.cat([self.history, x.mean()[None]])[-3:]
        return self.out(x)


@exact
class ParameterWithAnAttribute(Base):
    def prepare(self) -> None:
        self.gain = nn.Parameter(torch.ones(1))
        self.gain.power = 3.0

    def forward(self, x: Tensor) -> Any:
        return self.out(x) * self.gain * getattr(self.gain, "power", 1.0)


@exact
class OptionsAsNumbers(Base):
    def prepare(self) -> None:
        self.conv.padding, self.conv.stride, self.conv.dilation = 2, 2, 2


@exact
def evaluated_features() -> nn.Module:
    class Drops(Base):
        def forward(self, x: Tensor) -> Any:
            return self.last(F.dropout(self.conv(x), 0.5, self.training))

    return create_feature_extractor(Drops(), ["last"]).eval()


@left_alone("its _conv_forward was replaced on the instance")
class PatchedConvForward(Base):
    def prepare(self) -> None:
        def around(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.conv2d(F.pad(x, (1, 1, 0, 0), mode="circular"), weight, bias, 1, (1, 0))

        self.conv._conv_forward = functools.partial(around, self.conv)


class ExtraState(nn.Conv2d):
    def get_extra_state(self) -> Tensor:
        return torch.ones(1)

    def set_extra_state(self, state: Tensor) -> None:
        pass


@left_alone("its class ExtraState has its own get_extra_state")
class OwnState(Base):
    def prepare(self) -> None:
        self.conv = ExtraState(3, 8, 3, padding=1)


@left_alone("it has hooks of its state_dict")
class StateHook(Base):
    def prepare(self) -> None:
        self.conv.register_state_dict_post_hook(lambda *_: None)


@left_alone("its weight is 8x1x3x3, its options say 8x3x3x3")
class GreyStem(Base):
    def prepare(self) -> None:
        self.conv.weight = nn.Parameter(self.conv.weight.detach().sum(1, keepdim=True))

    def forward(self, x: Tensor) -> Any:
        return self.out(x[:, :1])


@left_alone("its padding was changed, which its reflect padding does not follow")
class ChangedReflection(Base):
    def prepare(self) -> None:
        self.conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.conv.padding = (2, 2)


class OwnName(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@left_alone("it is called with something else than one tensor, its input")
class CalledByAnotherName(Base):
    def prepare(self) -> None:
        self.conv = OwnName(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.conv(x=x))


class TakesAPair(nn.Conv2d):
    def forward(self, pair: Any) -> Tensor:
        return super().forward(pair[0]) * pair[1]


@left_alone("its class TakesAPair fails on a synthetic input")
class CalledWithAPair(Base):
    def prepare(self) -> None:
        self.conv = TakesAPair(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.conv((x, 2.0)))


class GivesAPair(nn.Conv2d):
    def forward(self, x: Tensor) -> Any:
        output = super().forward(x)
        return output, output.mean()


@left_alone("its class GivesAPair changes the output of its convolution in its own forward")
class AnswersAPair(Base):
    def prepare(self) -> None:
        self.conv = GivesAPair(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        output, mean = self.conv(x)
        return self.last(output) + mean


@exact
class HookAnswersAPair(Base):
    def prepare(self) -> None:
        self.conv.register_forward_hook(lambda module, args, output: (output, output.mean()))

    def forward(self, x: Tensor) -> Any:
        output, mean = self.conv(x)
        return self.last(output) + mean


@left_alone("its weight is exchanged for a call (torch.func.functional_call)")
class FunctionalCall(Base):
    def prepare(self) -> None:
        self.other = nn.Parameter(torch.randn(8, 3, 3, 3))

    def forward(self, x: Tensor) -> Any:
        return self.last(torch.func.functional_call(self.conv, {"weight": self.other}, (x,)))


@left_alone("it is called inside of torch.vmap")
class InsideOfVmap(Base):
    def forward(self, x: Tensor) -> Any:
        return self.last(torch.vmap(self.conv)(x))


@left_alone("its attribute basis has another meaning in a form")
class OwnBasis(Base):
    def prepare(self) -> None:
        self.conv.basis = 2.0


@left_alone("its weight or bias has hooks of its gradient")
class GradientHook(Base):
    def prepare(self) -> None:
        self.conv.weight.register_hook(lambda gradient: gradient * 0)


def _zero_gradient(parameter: Tensor) -> None:
    parameter.grad.zero_()


@left_alone("its weight or bias has hooks of its gradient")
class AccumulatedGradientHook(Base):
    def prepare(self) -> None:
        self.conv.bias.register_post_accumulate_grad_hook(_zero_gradient)


@left_alone("its parameter is also linear.weight")
class TwoParametersOneMemory(Base):
    def prepare(self) -> None:
        self.conv = nn.Conv2d(3, 8, 1)
        self.linear = nn.Linear(3, 8, bias=False)
        self.linear.weight = nn.Parameter(self.conv.weight.view(8, 3))

    def forward(self, x: Tensor) -> Any:
        return self.last(self.conv(x) + self.linear(x.movedim(1, -1)).movedim(-1, 1))


@left_alone("its weight is also read by")
class ViewOfAWeight(Base):
    def prepare(self) -> None:
        self.conv = nn.Conv2d(3, 8, 1)
        self.flat = self.conv.weight.view(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.conv(x) + F.linear(x.movedim(1, -1), self.flat).movedim(-1, 1))
