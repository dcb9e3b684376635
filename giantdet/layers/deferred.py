"""Build a model without allocating its large weights.

Inside `deferred_init()` every parameter of `LARGE` elements or more is on the meta device, and the calls that
would have initialised it (`nn.init`, timm's own schemes) are recorded. `materialise` allocates one such
parameter and replays its recorded calls, or copies a checkpoint's tensor into it (`fill`). So a model of
billions of parameters can be given to ZeRO-3 weight by weight, and no process holds more than its own
partition and one whole weight (`engine/zero.py`). Small parameters and all buffers are allocated at once.

The idea is from torchdistx's `deferred_init`; here only in-place operations on parameters are recorded.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import isfunction
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map

LARGE = 2**16


class _Call(NamedTuple):
    """An in-place operation on a view of a parameter."""

    function: Any
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Tape(TorchDispatchMode):
    """Records the in-place operations on deferred parameters, by their storage."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[int, list[_Call]] = {}
        self.blank: set[int] = set()  # storages of torch.empty: their content need not be kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            if self.knows(args[0]):
                return self.record(func, args[0], args[1:], kwargs)
            self.blank.discard(_key(args[0]))
        result = func(*args, **kwargs)
        if func.overloadpacket is torch.ops.aten.empty:
            self.blank.add(_key(result))
        return result

    def knows(self, tensor: Tensor) -> bool:
        return tensor.is_meta and _key(tensor) in self.calls

    def record(self, function: Any, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if tree_any(lambda x: isinstance(x, Tensor) and x.is_meta, (args, kwargs)):
            raise NotImplementedError(f"{function} initialises a weight from another one")
        args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
        view = (tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        self.calls[_key(tensor)].append(_Call(function, *view, args, kwargs))
        return tensor

    def recording(self, function: Any) -> Any:
        """Return a function of torch.nn.init that records its call for a deferred parameter.

        The operations inside it cannot be recorded one by one: functions that draw until all values are in
        range do nothing on the meta device.
        """

        def initialise(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.knows(tensor):
                return self.record(function, tensor, args, kwargs)
            return cast("Tensor", function(tensor, *args, **kwargs))

        return initialise


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def deferred_init(seed: int = 0) -> Iterator[None]:
    """Put the large parameters of modules that are built inside on the meta device; see `materialise`.

    `seed` and the name of a parameter determine its values, so they are the same on all ranks and in any
    order. Raises NotImplementedError for a model that initialises one large weight from another.
    """
    tape, register = _Tape(), nn.Module.register_parameter

    def register_deferred(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is None or parameter.numel() < LARGE or hasattr(parameter, "_deferred"):
            register(module, name, parameter)
            return
        empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        calls = tape.calls[_key(empty)] = []
        if _key(parameter) not in tape.blank:  # created with values, as in nn.Parameter(torch.randn(...))
            content = parameter.detach().clone()
            whole = (tuple(empty.shape), empty.stride(), 0)
            calls.append(_Call(torch.ops.aten.copy_.default, *whole, (content,), {}))
        empty._deferred = (tape, calls, seed)  # type: ignore[attr-defined]
        register(module, name, empty)

    drawing = {name: f for name, f in vars(nn.init).items() if name.endswith("_") and isfunction(f)}
    nn.Module.register_parameter = register_deferred  # type: ignore[method-assign,assignment]
    for name, function in drawing.items():
        setattr(nn.init, name, tape.recording(function))
    try:
        with tape:
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        for name, function in drawing.items():
            setattr(nn.init, name, function)


def is_deferred(parameter: Tensor) -> bool:
    """Return whether a parameter was created in `deferred_init` and is not materialised yet."""
    return hasattr(parameter, "_deferred")


@torch.no_grad()
def fill(parameter: nn.Parameter, content: Tensor) -> None:
    """Set the tensor that a deferred parameter will be materialised from.

    The tensor is kept and not copied; one of a memory-mapped file takes no memory until then.
    """
    tape, _, seed = parameter._deferred  # type: ignore[attr-defined]
    whole = (tuple(parameter.shape), parameter.stride(), 0)
    copied = [_Call(torch.ops.aten.copy_.default, *whole, (content,), {})]
    parameter._deferred = (tape, copied, seed)  # type: ignore[attr-defined]


@torch.no_grad()
def materialise(parameter: nn.Parameter, name: str) -> nn.Parameter:
    """Return a deferred parameter allocated on the CPU and initialised as its model's constructor would.

    The random numbers are seeded by the parameter's name. They are drawn on the CPU whatever the device of
    the run, so that they are the same on every machine.
    """
    _, calls, seed = parameter._deferred  # type: ignore[attr-defined]
    real = torch.empty(parameter.shape, dtype=parameter.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # torch's generator uses 32 bits of a seed
        for call in calls:
            call.function(real.as_strided(call.size, call.stride, call.offset), *call.args, **call.kwargs)
    return nn.Parameter(real, requires_grad=parameter.requires_grad)


def real_parameters(model: nn.Module, dtype: torch.dtype) -> Iterator[nn.Parameter]:
    """Yield the model's parameters one by one, each materialised and cast to `dtype` when it is requested."""
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if is_deferred(parameter):
                module._parameters[name] = materialise(parameter, f"{prefix}.{name}".lstrip("."))
            real = module._parameters[name]
            assert real is not None
            real.data = real.data.to(dtype)
            yield real
