"""Faster training passes: compiled, or captured as a CUDA graph (`train.compile`, `train.cuda_graph`).

Both replace `Architecture.predict`, the part of a training step that has fixed shapes and no choice that
depends on the images. Everything around it stays as it is: DeepSpeed's engine, the hooks on parameters (its
own and AGVM's), the losses, and evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from giantdet.architectures import Architecture
from giantdet.config.resolved import ResolvedRun
from giantdet.data.blank import blank_batch
from giantdet.layers.blocks import compiled
from giantdet.structures import Batch


def apply(model: Architecture, run: ResolvedRun, device: torch.device) -> None:
    """Compile and capture the model's training pass as `run.giantdet.train` says.

    Called once the weights are where they stay, after `deepspeed.initialize`, and before AGVM adds hooks.
    """
    config = run.giantdet
    if config.train.compile:
        compile_training(model)
    if config.train.cuda_graph:
        batch = blank_batch(config.data, run.batch.micro, model.targets).to(device)
        capture_training(model, batch, accumulates=run.batch.accumulation > 1)


def compile_training(model: Architecture) -> None:
    """Compile the training pass with torch.compile; the first step then takes minutes.

    The results are the same up to rounding. The backward pass becomes one function too, so its gradients
    reach DeepSpeed all at once, and their reduction does not overlap with it.
    """
    model.predict = compiled(model.predict)  # type: ignore[method-assign]


def capture_training(model: Architecture, batch: Batch, accumulates: bool) -> None:
    """Capture the training pass and its backward as CUDA graphs, for batches of the shapes of `batch`.

    `batch` leaves no trace: buffers and the random state are restored. Gradients come out of the graph as
    out of any operator, so hooks on parameters run. With `accumulates` they are copied: otherwise the next
    replay would overwrite what autograd has kept as a parameter's gradient.

    Raises RuntimeError where the pass waits for the device.
    """
    flat = _Flat(model, batch)
    with _restored(model):
        torch.cuda.make_graphed_callables(flat, flat.tensors_of(batch), allow_unused_input=True)
    if accumulates:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(torch.clone)
    model.predict = flat.predictions  # type: ignore[method-assign]


class _Flat(nn.Module):
    """A model's training pass from tensors to tensors, the form that `make_graphed_callables` takes."""

    def __init__(self, model: Architecture, batch: Batch) -> None:
        super().__init__()
        self.model = model
        self.predict: Callable[[Batch], Any] = model.predict
        self.input_spec = tree_flatten(_without_windows(batch))[1]
        self.output_spec: TreeSpec = self.input_spec
        self.trained: list[bool | None] = []  # by leaf of the predictions; None: a head that does not exist

    def tensors_of(self, batch: Batch) -> tuple[Tensor, ...]:
        return tuple(tree_flatten(_without_windows(batch))[0])

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        content = tree_unflatten(list(tensors), self.input_spec)
        leaves, self.output_spec = tree_flatten(self.predict(Batch(*content)))
        self.trained = [None if leaf is None else leaf.requires_grad for leaf in leaves]
        return tuple(leaf for leaf in leaves if leaf is not None)

    def predictions(self, batch: Batch) -> Any:
        """Replay the graph on a batch; the predictions are overwritten by the next replay."""
        found = iter(self(*self.tensors_of(batch)))
        leaves: list[Tensor | None] = []
        for trained in self.trained:
            leaf = None if trained is None else next(found)
            # All outputs in floating point come with a gradient, targets too.
            leaves.append(leaf if leaf is None or trained else leaf.detach())
        return tree_unflatten(leaves, self.output_spec)


def _without_windows(batch: Batch) -> tuple[Any, ...]:
    assert batch.windows_B6 is None, "training batches show whole canvases"
    return tuple(batch[:-1])


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore the model's buffers and the random state at the end."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        yield
    with torch.no_grad():
        for buffer, content in kept:
            buffer.copy_(content)
