"""How long it takes to compress ResNet-50: trace, decompose, rewrite and check, on one thread.

    python examples/studies/resnet50_speed.py [--model resnet50] [--runs 3]

The time includes what ``compress`` does to prove its result.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torchvision

import fxbasis


def main() -> None:
    """Print the median time of ``compress(layers="all", size=0.5)``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = torchvision.models.get_model(options.model, weights=None).eval()
    example = torch.randn(1, 3, 224, 224)
    times = []
    for _ in range(options.runs):
        start = time.perf_counter()
        small = fxbasis.compress(model, example, layers="all", size=0.5)
        times.append(time.perf_counter() - start)
    done = len(fxbasis.plan_of(small).compressed)
    print(
        f"{options.model}: {done} of {len(fxbasis.plan_of(small))} convolutions compressed, one thread, "
        f"median of {options.runs} runs {statistics.median(times):.2f} s "
        f"(all: {', '.join(f'{t:.2f}' for t in times)})"
    )


if __name__ == "__main__":
    main()
