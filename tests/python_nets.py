"""Small nets of which a graph would be wrong, at least in train(); and the table of all nets."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from graph_nets import GRAPHS, Base, Case, OddNames, Plain
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class Record:
    value: Tensor
    label: str


class DropoutAmongConvs(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.body(x), 0.5, training=self.training))


class TrainingBranch(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.last(y) if self.training else self.last(y + self.body(x))


class AuxiliaryHead(Base):
    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        return (self.last(y), self.aux(y)) if self.training else self.last(y)


class TrainingConstant(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x)) * torch.tensor(2.0 if self.training else 3.0)


class NoGrad(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.conv(x)
        return self.last(y)


class EnableGrad(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = self.conv(x)
        return self.last(y)


class Autocast(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.conv(x)
        return self.last(y.float())


class AutocastOff(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        with torch.autocast("cpu", enabled=False):
            return self.last(y.float())


class Checkpoint(Base):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.last, self.body(x), use_reentrant=self.reentrant)


class BatchBranch(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.body(x))
        return y * 2 if x.shape[0] > 2 else y


class BatchLoop(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.last(self.conv(sample[None])) for sample in x])


class RangeLoop(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.last(self.conv(x[i : i + 1])) for i in range(x.shape[0])])


class Assertion(Base):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 3
        return self.last(self.body(x))


class DataBranch(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x)) if x.sum() > 0 else self.conv(x)


class TypeBranch(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x)) if isinstance(x, Tensor) else x


class DrawsInForward(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x)) + torch.rand(1)


class PythonLayerDrop(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.body(x))
        return y if self.training and random.random() < 0.5 else y * 2


class CountsCalls(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.last(self.body(x))


class DataclassOutput(Base):
    def forward(self, x: Tensor) -> Record:
        return Record(self.last(self.body(x)), "logits")


class VarArgs(Base):
    def forward(self, *images: Tensor) -> Tensor:
        return self.last(self.body(images[0]))


class KeywordArgs(Base):
    def forward(self, x: Tensor, **options: Tensor) -> Tensor:
        y = self.last(self.body(x))
        return y * options["scale"] if "scale" in options else y


class ItemAssignment(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, 0] = 0
        return self.last(y)


class TupleDefault(Base):
    def forward(self, x: Tensor, size: tuple[int, int] = (4, 4)) -> Tensor:
        return F.adaptive_avg_pool2d(self.last(self.body(x)), size)


class FunctionDefault(Base):
    def forward(self, x: Tensor, activation: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
        return activation(self.last(self.body(x)))


class ReservedNames(Base):
    def __init__(self) -> None:
        super().__init__()
        self.graph = nn.Conv2d(6, 6, 1)
        self.meta = {"classes": 6}

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(self.last(self.body(x)))


class KeywordName(OddNames):
    def __init__(self) -> None:
        super().__init__()
        self.parts["class"] = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["class"](super().forward(x))


class GraphInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = fx.symbolic_trace(Plain())

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) if x.shape[0] < 3 else self.part(x) * 2


class Nested(nn.Module):
    """A part that branches inside a model that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.part = BatchBranch()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.stem(x))


def patched_for_copies() -> nn.Module:
    """Patched with a bound method, which a deep copy binds to the copy."""
    model = Plain()
    model.forward = model.body  # type: ignore[method-assign]
    return model


def one_conv() -> nn.Module:
    return nn.Conv2d(3, 8, 3, padding=1)


PYTHON: dict[str, tuple[Case, str]] = {
    "no_grad": (Case(NoGrad), "no_grad"),
    "enable_grad": (Case(EnableGrad), "no_grad"),
    "autocast": (Case(Autocast), "autocast"),
    "autocast switched off": (Case(AutocastOff), "autocast"),
    "reentrant checkpoint": (Case(lambda: Checkpoint(True)), ""),
    "checkpoint": (Case(lambda: Checkpoint(False)), ""),
    "branch on the batch": (Case(BatchBranch), r"control flow.*python_nets\.py:\d+"),
    "loop over the batch": (Case(BatchLoop), r"iterated.*python_nets\.py:\d+"),
    "range over the batch": (Case(RangeLoop), r"python_nets\.py:\d+"),
    "assert": (Case(Assertion), r"python_nets\.py:\d+"),
    "branch on data": (Case(DataBranch), r"python_nets\.py:\d+"),
    "branch on a type": (Case(TypeBranch), ""),
    "random numbers in forward": (Case(DrawsInForward), ""),
    "buffer that counts": (Case(CountsCalls), r"sets its attribute count.*python_nets\.py:\d+"),
    "item assignment": (Case(ItemAssignment), r"python_nets\.py:\d+"),
    "tuple as default": (Case(TupleDefault), "default of its argument size is a tuple"),
    "function as default": (Case(FunctionDefault), "NotImplementedError"),
    "reserved names": (Case(ReservedNames, 3), "graph has another meaning"),
    "keyword as a name": (Case(KeywordName, 3), "no Python code"),
    "graph inside": (Case(GraphInside), r"python_nets\.py:\d+"),
    "patched forward": (Case(patched_for_copies, 1), "replaced on the instance"),
    "DataParallel": (Case(lambda: nn.DataParallel(Plain())), r"data_parallel\.py:\d+"),
}
EVAL_ONLY: dict[str, tuple[Case, str]] = {
    "functional dropout among convs": (
        Case(DropoutAmongConvs),
        r"train\(\) and eval\(\) take different ways",
    ),
    "training branch": (Case(TrainingBranch), r"train\(\) and eval\(\) take different ways"),
    "auxiliary head": (Case(AuxiliaryHead), r"train\(\) and eval\(\) take different ways"),
    "constant of the mode": (Case(TrainingConstant), "use different constants"),
    "random layer drop": (Case(PythonLayerDrop), "draws random numbers"),
}
EITHER: dict[str, Case] = {
    "branching part": Case(Nested, 3),
    "dataclass output": Case(DataclassOutput),
    "*args": Case(VarArgs),
    "**kwargs": Case(KeywordArgs),
    "one Conv2d": Case(one_conv, 1),
}
WITH_REASON = PYTHON | EVAL_ONLY
ALL = GRAPHS | {key: case for key, (case, _) in WITH_REASON.items() if key != "autocast"} | EITHER
