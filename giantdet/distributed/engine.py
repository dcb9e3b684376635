"""DeepSpeed's engine as giantdet uses it, as types: nothing here imports DeepSpeed."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer


class Schedule(Protocol):
    """A learning-rate schedule that can be set to any step (`optim/schedules.py`)."""

    def go_to(self, step: int) -> None: ...


class Engine(Protocol):
    """The engine that `deepspeed.initialize` returns.

    The optimizer that the run asks for is `basic_optimizer`. `optimizer` is DeepSpeed's wrapper of it, one
    class for each ZeRO stage and precision, or `basic_optimizer` itself at stage 0 in float32; what is read
    of it are private attributes (`optim/fragments.py`).
    """

    module: nn.Module
    optimizer: Any
    basic_optimizer: Optimizer
    lr_scheduler: Schedule | None
    monitor: Any

    # Counters. A step is an optimizer step, a micro-step one forward and backward pass.
    global_steps: int
    global_samples: int
    micro_steps: int
    skipped_steps: int

    # Private: the limit of gradient clipping, and whether the last step has changed the weights.
    _config: Any
    _step_applied: bool

    def __call__(self, *inputs: Any, **named: Any) -> Any: ...
    def train(self) -> Any: ...
    def eval(self) -> Any: ...
    def backward(self, loss: Tensor) -> Any: ...
    def step(self) -> None: ...
    def destroy(self) -> None: ...

    def train_batch_size(self) -> int: ...
    def gradient_accumulation_steps(self) -> int: ...
    def is_gradient_accumulation_boundary(self) -> bool: ...
    def gradient_clipping(self) -> float: ...
    def zero_optimization_stage(self) -> int: ...
    def fp16_enabled(self) -> bool: ...

    def get_global_grad_norm(self) -> Any: ...  # number or tensor; None where DeepSpeed keeps none
    def was_step_applied(self) -> bool: ...
