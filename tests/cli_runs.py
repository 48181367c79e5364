"""Fixtures and helpers of the tests of the command line: tiny models in a file, and a run of a verb on them.

``source`` is the file, ``tiny`` the spec of its net, ``done`` what ``compress`` wrote for it, made once;
``run`` calls the program and gives back exit code, stdout and stderr, in which there is no traceback.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxbasis.cli import main

SIZE = ["--input", "2x3x8x8"]
KEEP = "--keep-if-slower"  # what is rewritten here is small, hence slower than dense
SOURCE = """
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 16, 3)
        self.down = nn.Conv2d(16, 32, 1)

    def forward(self, x):
        return self.down(F.relu(self.body(F.relu(self.bn(self.stem(x)))))).mean((2, 3))


class Branching(Net):
    def forward(self, x):
        return super().forward(x) if x.shape[1] == 3 else x


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Standard(Net):
    def __init__(self):
        super().__init__()
        self.body = Standardised(16, 16, 3)

    def forward(self, x):
        return F.conv2d(super().forward(x)[:, :, None, None], torch.ones(2, 32, 1, 1)).flatten(1)


class Strings(Net):
    def forward(self, x):
        return "no tensor"


def net():
    torch.manual_seed(0)
    return Net()


def broken():
    net = Net()
    net.body.weight.data.fill_(float("nan"))
    return net


def fails():
    raise RuntimeError("no such checkpoint")


def number():
    return 3


def prints():
    print("built")

    class Says(Net):
        def forward(self, x):
            print("runs")
            return super().forward(x)

    return Says()


def two_lines():
    class Shouts(Net):
        def forward(self, x):
            if x.sum() > 0 or True:
                raise ValueError("first line\\nsecond line")
    return Shouts()


standard = Standard
branching, strings, linear, needs = Branching, Strings, lambda: nn.Linear(8, 2), lambda size: Net()
one = lambda: nn.Conv2d(3, 16, 3)
"""


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "nets.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="session")
def tiny(source: Path) -> str:
    return f"{source}:net"


@pytest.fixture(scope="session")
def done(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``compress`` wrote, made once."""
    out = tmp_path_factory.mktemp("cli") / "done"
    options = ["--runs", "3", "--size", "4", KEEP]
    assert main(["compress", tiny, *SIZE, "--out", str(out), *options]) == 0
    return out


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:  # argparse: --help, --version and mistakes in options
            code = int(exit_.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


def error_of(result: tuple[int, str, str], code: int) -> str:
    """What stands on stderr of a run that failed with the code: an error, and nothing on stdout."""
    found, out, err = result
    assert (found, out) == (code, "")
    assert "error: " in err
    return err
