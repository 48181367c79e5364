"""One forward pass of many batches side by side, halted at each layer until all batches have come there.

So a layer can be changed for all of them at once, from what all of them bring, and each part of the model
runs once for each batch, however many layers are changed. Every batch has a thread; only one runs at a time.
The activations of all batches at the halting layer are in memory together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from .nests import map_tensors
from .running import ExampleInputs, as_arguments, in_mode, seeded, uncompiled

__all__ = ["lockstep"]


class _Stopped(BaseException):
    """Ends the thread of a batch that is not needed any more."""


class _Runner:
    """One batch on its way through the model: runs until it halts before a layer, or ends."""

    def __init__(self, model: nn.Module, inputs: ExampleInputs) -> None:
        self.place: str | None = None
        self.input: Tensor | None = None
        self.error: BaseException | None = None
        self.done = self.stopped = False
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._work, args=(model, inputs), daemon=True)
        self.thread.start()

    def _work(self, model: nn.Module, inputs: ExampleInputs) -> None:
        self._go.acquire()
        try:
            with suppress(_Stopped), torch.no_grad():
                if not self.stopped:
                    args, kwargs = as_arguments(map_tensors(torch.clone, inputs))  # the model may change them
                    model(*args, **kwargs)
        except BaseException as error:
            self.error = error
        self.done, self.place = True, None
        self._halted.release()

    def halt(self, place: str, input: Tensor) -> None:
        """Called in the thread: wait until the others have come."""
        if not self.stopped:  # as it is where the model has caught the last _Stopped
            self.place, self.input = place, input
            self._halted.release()
            self._go.acquire()
            self.input = None
        if self.stopped:
            raise _Stopped

    def go_on(self) -> None:
        """Run to the next halt or to the end."""
        self._go.release()
        self._halted.acquire()
        if self.error is not None:
            raise self.error


def lockstep(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[ExampleInputs],
    visit: Callable[[str, dict[int, Tensor]], None],
) -> None:
    """Run all batches in eval(); before each call of a layer, ``visit`` it with the input that each brings.

    Args:
        model: in place; ``visit`` may change the layer that it is called for.
        layers: submodules by name.
        batches: inputs.
        visit: gets the name, and by number of the batch the first argument of the call.

    >>> net, seen = nn.Sequential(nn.Linear(1, 1), nn.ReLU()), []
    >>> inputs = [torch.ones(2, 1), torch.ones(3, 1)]
    >>> lockstep(net, {"0": net[0]}, inputs, lambda name, found: seen.append((name, len(found))))
    >>> seen
    [('0', 2)]
    """
    runners: list[_Runner] = []
    mine: dict[int, _Runner] = {}

    def hook(name: str) -> Any:
        def halt(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() in mine:  # and not called by the visitor
                mine[threading.get_ident()].halt(name, args[0] if args else kwargs["input"])

        return halt

    handles = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        with seeded(), in_mode(model, False), uncompiled():
            for inputs in batches:
                runners.append(_Runner(model, inputs))
            mine |= {runner.thread.ident or 0: runner for runner in runners}
            _advance(runners, visit)
    finally:
        _stop(runners)
        for handle in handles:
            handle.remove()


def _advance(runners: Sequence[_Runner], visit: Callable[[str, dict[int, Tensor]], None]) -> None:
    moving = list(runners)
    while moving:
        for runner in moving:
            runner.go_on()
        halted = [runner for runner in runners if not runner.done]
        if not halted:
            return
        moving = [runner for runner in halted if runner.place == halted[0].place]
        inputs = {index: runner.input for index, runner in enumerate(runners) if runner in moving}
        visit(str(halted[0].place), {index: x for index, x in inputs.items() if x is not None})


def _stop(runners: Sequence[_Runner]) -> None:
    for runner in runners:
        if not runner.done:
            runner.stopped = True
            runner._go.release()
        runner.thread.join()
