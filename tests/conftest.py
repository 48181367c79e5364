"""Small nets that carry their own answers; one thread, so that results and times repeat.

``net.macs`` is the closed-form count by layer name for the whole batch of ``net.example`` (2 images of
3 x 8 x 8), written out as batch * height * width * out_channels * fan_in. Work outside of any layer stands
under "(top level)". Nets come in eval() with BatchNorm statistics that matter.

Fixtures: one for each net by its key in ``NETS`` (``plain_net``, ``shared_net``...), and ``net``, which
runs a test on each of them. Helpers: ``from conftest import NETS, build, close``.

Hypothesis draws the same 50 examples each time, or 10,000 others under ``--hypothesis-profile=long``.

No postponed annotations here: torch 2.8 cannot pickle a graph of a forward that has them.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.nn import functional as F

pytest_plugins = ["cli_runs"]  # the fixtures of the command line
pytest.register_assert_rewrite("behaviour", "hard_modules")  # their helpers assert

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}

settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=50)
settings.register_profile("long", deadline=None, max_examples=10_000, print_blob=True)
settings.load_profile("fixed")


class Net(nn.Module):
    """A net with its example input and its closed-form MACs by layer."""

    def __init__(self, macs: dict[str, int]) -> None:
        super().__init__()
        self.macs = macs
        self.example = torch.randn(2, 3, 8, 8)


class PlainNet(Net):
    """conv-bn-relu, then a conv with bias."""

    def __init__(self) -> None:
        super().__init__({"conv1": 2 * 8 * 8 * 8 * 27, "conv2": 2 * 6 * 6 * 6 * 72})
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn(self.conv1(x))))


class GroupedNet(Net):
    """The second conv has 4 groups of 3 filters with a fan-in of 18."""

    def __init__(self) -> None:
        super().__init__({"conv1": 2 * 8 * 8 * 8 * 27, "conv2": 2 * 8 * 8 * 12 * 18})
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x)))


class DepthwiseNet(Net):
    """1x1 expansion, depthwise 3x3, 1x1 projection."""

    def __init__(self) -> None:
        super().__init__(
            {"expand": 2 * 8 * 8 * 12 * 3, "depthwise": 2 * 8 * 8 * 12 * 9, "project": 2 * 8 * 8 * 6 * 12}
        )
        self.expand = nn.Conv2d(3, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.project = nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))


class StridedNet(Net):
    """Stride (2, 1), then dilation 2 with reflect padding."""

    def __init__(self) -> None:
        super().__init__({"conv1": 2 * 4 * 8 * 8 * 27, "conv2": 2 * 4 * 8 * 6 * 72})
        self.conv1 = nn.Conv2d(3, 8, 3, stride=(2, 1), padding=1)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=2, dilation=2, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x)))


class SharedNet(Net):
    """One conv called twice, at two sizes."""

    def __init__(self) -> None:
        super().__init__({"stem": 2 * 8 * 8 * 8 * 27, "shared": 2 * (8 * 8 + 4 * 4) * 8 * 72})
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(F.max_pool2d(F.relu(self.shared(F.relu(self.stem(x)))), 2))


class AliasedNet(Net):
    """One conv under two names, called by both."""

    def __init__(self) -> None:
        super().__init__({"stem": 2 * 8 * 8 * 8 * 27, "first": 2 * 2 * 8 * 8 * 8 * 72})
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(F.relu(self.stem(x)))))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.bn(self.conv1(x)))))


class ResidualNet(Net):
    """A stem and a residual block, whose convs have dotted names."""

    def __init__(self) -> None:
        super().__init__(
            {
                "stem": 2 * 8 * 8 * 8 * 27,
                "block.conv1": 2 * 8 * 8 * 8 * 72,
                "block.conv2": 2 * 8 * 8 * 8 * 72,
            }
        )
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


class FunctionalNet(Net):
    """A conv, F.conv2d on a Parameter of the net, and a Linear."""

    def __init__(self) -> None:
        super().__init__({"conv": 2 * 8 * 8 * 8 * 27, "(top level)": 2 * 6 * 6 * 4 * 72, "head": 2 * 5 * 4})
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(4, 8, 3, 3) / 8)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv2d(F.relu(self.conv(x)), self.kernel).mean((2, 3)))


NETS: dict[str, Callable[[], Net]] = {
    "plain": PlainNet,
    "grouped": GroupedNet,
    "depthwise": DepthwiseNet,
    "strided": StridedNet,
    "shared": SharedNet,
    "aliased": AliasedNet,
    "residual": ResidualNet,
    "functional": FunctionalNet,
}


def build(key: str) -> Net:
    """A net of ``NETS``: the same weights each time, eval(), BatchNorm statistics that matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = NETS[key]()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


def close(expected: Tensor, actual: Tensor) -> bool:
    """Same shape and dtype, and equal to the dtype's tolerance of the largest magnitude."""
    if (expected.shape, expected.dtype) != (actual.shape, actual.dtype):
        return False
    gap = (expected.double() - actual.double()).abs().max()
    return bool(gap <= TOLERANCES[expected.dtype] * expected.double().abs().max())


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> Net:
    return build(request.param)


@pytest.fixture
def plain_net() -> Net:
    return build("plain")


@pytest.fixture
def grouped_net() -> Net:
    return build("grouped")


@pytest.fixture
def depthwise_net() -> Net:
    return build("depthwise")


@pytest.fixture
def strided_net() -> Net:
    return build("strided")


@pytest.fixture
def shared_net() -> Net:
    return build("shared")


@pytest.fixture
def aliased_net() -> Net:
    return build("aliased")


@pytest.fixture
def residual_net() -> Net:
    return build("residual")


@pytest.fixture
def functional_net() -> Net:
    return build("functional")
