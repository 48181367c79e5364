"""Compress a torchvision model, check it, export it and measure it.

    python examples/compress_torchvision.py --weights resnet18.pth --out resnet18-half

Without --weights the weights are random: times and sizes hold, accuracy does not exist.
"""

import argparse

import torch
import torchvision

import fxbasis


def main() -> None:
    """Compress ResNet-18's wide convolutions to half of their filters as basis."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", help="a state_dict file of torchvision's resnet18")
    parser.add_argument("--out", default="resnet18-half")
    options = parser.parse_args()

    model = torchvision.models.resnet18(weights=None).eval()
    if options.weights:
        model.load_state_dict(torch.load(options.weights, weights_only=True))
    example = torch.randn(1, 3, 224, 224)
    print(fxbasis.number_convs(model, example))

    small = fxbasis.compress(
        model,
        example,
        layers=lambda conv: conv.index > 1 and max(conv.kernel_size) > 1,  # not the stem, no 1x1
        size=0.5,
    )
    remarks = () if options.weights else ("Weights are random: accuracy does not exist.",)
    print(fxbasis.report(model, small, example, options.out, title="ResNet-18", remarks=remarks))
    print(f"written to {options.out}")

    # Back to the original's structure: the same function, the original's state_dict keys.
    model.load_state_dict(fxbasis.fold(small).state_dict())


if __name__ == "__main__":
    main()
