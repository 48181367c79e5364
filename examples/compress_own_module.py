"""Compress a module of your own: rules for layers, save and load, train on, fold.

python examples/compress_own_module.py
"""

import tempfile

import torch
from torch import nn

import fxbasis


class Net(nn.Module):
    """A small CNN with a grouped convolution and two inputs' worth of features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 5, padding=2, padding_mode="reflect")
        self.mix = nn.Conv2d(32, 64, 3, stride=2, padding=1, groups=2)
        self.head = nn.Conv2d(64, 10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) to logits (N, 10)."""
        x = torch.relu(self.mix(torch.relu(self.stem(x))))
        return self.head(x).mean((2, 3))


def main() -> None:
    """The way of a model, on random data."""
    torch.manual_seed(0)
    model, example = Net(), torch.randn(4, 3, 32, 32)

    rules = {"all": {"size": 0.25}, "stem": {"size": 12, "method": "qr"}, "head": None}
    small = fxbasis.compress(model, example, layers=rules)
    print(fxbasis.profile(small, example))

    # Train it on like any module.
    optimizer = torch.optim.SGD(small.parameters(), lr=0.01)
    loss = nn.functional.cross_entropy(small(example), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        again = fxbasis.load(Net(), fxbasis.save(small, folder))  # no data, no pickle
        assert torch.equal(again(example), small(example))
        print(fxbasis.export_onnx(small, example, f"{folder}/net.onnx"))

    model.load_state_dict(fxbasis.fold(small).state_dict())  # the original's keys
    print(f"folded: outputs differ by {(model(example) - small(example)).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
