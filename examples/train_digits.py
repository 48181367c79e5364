"""Train the demo's network on scikit-learn's handwritten digits, and write its weights.

    python examples/train_digits.py --out fxbasis/demo/digits_resnet.safetensors

The hyper-parameters were chosen by 5-fold cross-validation inside the 1347 training images, by the accuracy
of the network and of its copy at half rank; ``--validate`` shows both on one fifth of them. The weight decay
is strong, because it removes the directions of a convolution that the digits do not need: that is what makes
a trained CNN compressible. The held-out images are looked at once, after the last epoch.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from sklearn.model_selection import train_test_split
from torch import nn

from fxbasis.demo.digits import MEAN, STD, accuracy, load_digits_split
from fxbasis.demo.network import DigitsResNet

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 120, 64, 0.1, 0.01
BLACK = -MEAN / STD


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Images (N, 1, 8, 8), each moved by -1, 0 or 1 pixel down and to the right, with black moving in."""
    count, size = len(images), images.shape[-1]
    padded = F.pad(images, (1, 1, 1, 1), value=BLACK)
    rows, columns = (torch.randint(0, 3, (count, 1)) + torch.arange(size) for _ in range(2))
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def train(images: torch.Tensor, labels: torch.Tensor) -> DigitsResNet:
    """A network trained from a fixed seed on images (N, 1, 8, 8) and labels (N,), in eval mode."""
    torch.manual_seed(0)
    model = DigitsResNet()
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, EPOCHS * steps, pct_start=0.15, cycle_momentum=False
    )
    for epoch in range(EPOCHS):
        for chosen in torch.randperm(len(images))[: steps * BATCH].view(steps, BATCH):
            loss = F.cross_entropy(model(shifted(images[chosen])), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        if epoch % 20 == 19:
            print(f"epoch {epoch + 1:3d} of {EPOCHS}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def half_rank(model: nn.Module) -> nn.Module:
    """A copy whose 3x3 convolutions, all but the first, keep half of their ranks (truncated SVD)."""
    small = copy.deepcopy(model)
    for name, conv in small.named_modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and name != "conv1":
            u, s, v = torch.linalg.svd(conv.weight.detach().flatten(1), full_matrices=False)
            s[len(s) // 2 :] = 0
            conv.weight.data = (u * s @ v).view_as(conv.weight)
    return small


def main() -> None:
    """Train and write the weights, or show the accuracy on a fifth of the training images."""
    parser = argparse.ArgumentParser(description="Train the demo's network on 8x8 handwritten digits.")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, help="safetensors file to write")
    task.add_argument("--validate", action="store_true", help="hold out a fifth of the training images")
    args = parser.parse_args()
    torch.set_num_threads(1)  # more threads add the numbers up in another order: other weights
    images, labels, test_images, test_labels = load_digits_split()
    if args.validate:
        images, test_images, labels, test_labels = train_test_split(
            images, labels, test_size=0.2, stratify=labels, random_state=1
        )
    start = time.perf_counter()
    model = train(images, labels)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    print(f"accuracy on {len(images)} training images: {accuracy(model, images, labels):.2f} %")
    held_out = accuracy(model, test_images, test_labels)
    print(f"accuracy on {len(test_images)} held-out images: {held_out:.2f} %")
    if args.validate:
        print(f"the same at half rank: {accuracy(half_rank(model), test_images, test_labels):.2f} %")
    else:
        args.out.write_bytes(save(model.state_dict()))


if __name__ == "__main__":
    main()
