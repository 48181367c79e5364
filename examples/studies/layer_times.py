"""ONNX Runtime time against MACs: six convolutions, every form at a half and a quarter of the work.

    python examples/studies/layer_times.py [--out examples/studies/layer_times.md] [--repeats 3]

Each time is measured afresh ``--repeats`` times; the table has the median of the ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

import torch
from torch import nn

import fxbasis
from fxbasis.export.layer_runs import processor, runtime
from fxbasis.export.layer_times import time_ratio
from fxbasis.passes.ranking import cost_ratio, ranks_by_cost, rounded_down
from fxbasis.structures import FORMS

LAYERS = [(64, 64, 3, 56), (128, 128, 3, 28), (256, 256, 3, 14), (512, 512, 3, 7), (64, 256, 1, 56)]
LAYERS += [(512, 2048, 1, 7)]
NO_GAIN_AT_1X1 = (
    "spatial",
    "cp",
    "cp4",
    "tt",
)  # without a kernel to split they are the output form, or dearer

HEAD = """# Time and work of one convolution in every form

ONNX Runtime time over that of the dense layer, at the largest ranks in multiples of 16 whose MACs are at most
a half and a quarter of the dense ones; the ratio of MACs stands beside it. What lies above that ratio is what
the runtime loses to smaller convolutions, to the layout of its input and output, and to the copies of the
gauge form.

{runtime}, torch {torch}, {processor}, {processors} processors, one image, float32; {repeats} measurements of
each, median; one is 9 to 200 rounds in turns with the dense layer, on the clock of the calling thread's
processor time. Load of the machine, shared with other programs: {before} at the start, {after} at the end.
Where other programs hold the second processor, the calling thread does most of the work of two threads, and
the last column says little more than the one before it.

| layer | dense, 1 thread | form | ranks | MACs | time, 1 thread | time, 2 threads |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="examples/studies/layer_times.md")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    before, rows = os.getloadavg()[0], []
    for sizes in LAYERS:
        found = rows_of(*sizes, options.repeats)
        print("\n".join(found), flush=True)
        rows += found
    facts = {"runtime": runtime(), "torch": torch.__version__, "processor": processor()}
    facts |= {"processors": str(os.cpu_count()), "repeats": str(options.repeats)}
    text = HEAD.format(before=f"{before:.1f}", after=f"{os.getloadavg()[0]:.1f}", **facts)
    Path(options.out).write_text(text + "\n".join(rows) + "\n", encoding="utf-8")


def rows_of(channels: int, filters: int, kernel: int, size: int, repeats: int) -> list[str]:
    """The rows of one layer, with stride 1 and an output of the size of its input."""
    conv = nn.Conv2d(channels, filters, kernel, padding=kernel // 2)
    record = fxbasis.number_convs(conv, torch.zeros(1, channels, size, size))[0]
    dense = fxbasis.measure_layer(record, forms=[], cache=False)
    name = f"{channels} -> {filters}, {kernel}x{kernel}, {size}x{size}"
    rows = []
    for form in FORMS:
        if form == "weight" or (kernel == 1 and form in NO_GAIN_AT_1X1):
            continue
        for part in (0.5, 0.25):
            ranks = rounded_down(record, ranks_by_cost(record, part, "macs", form), 16, form)
            times = [
                statistics.median(
                    time_ratio(record, form, ranks, threads, cache=False) for _ in range(repeats)
                )
                for threads in (1, 2)
            ]
            shown = (form, ", ".join(map(str, ranks)), f"{cost_ratio(record, ranks, form):.2f}")
            shown += tuple(f"{time:.2f}" for time in times)
            rows.append(f"| {name} | {dense.dense_ms:.2f} ms | {' | '.join(shown)} |")
    return rows


if __name__ == "__main__":
    main()
