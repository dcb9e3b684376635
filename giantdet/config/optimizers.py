"""The `params` of the JSON's `optimizer` block: one section for every supported optimizer.

A new optimizer is one class here, and a line in OPTIMIZERS. Defaults are those of the library that builds it:
Adam, AdamW and SGD are DeepSpeed's and torch's, DeepSpeedMuon is DeepSpeed's, the others are timm's
(optim/optimizers.py). Adagrad is not supported: at ZeRO-1 and 2 DeepSpeed 0.19 constructs it a second time,
which loses its parameter groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from giantdet.config.section import NonNegative, Section, Whole, wish


def _betas(value: Any) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(map(_is_beta, value)):
        raise wish("two numbers of at least 0 and less than 1")
    return value[0], value[1]


def _is_beta(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


Betas = Annotated[tuple[float, float], BeforeValidator(_betas), WithJsonSchema({"type": "array"})]


class OptimizerConfig(Section):
    """Base of the sections of all optimizers."""

    MOMENTS: ClassVar[int] = 1
    """Number of float32 values that the optimizer keeps for each parameter."""
    WHOLE_WEIGHTS: ClassVar[bool] = False
    """True if the optimizer needs whole weights, which ZeRO-1 to 3 partition."""
    BUILT_BY: ClassVar[Literal["deepspeed", "timm", "giantdet"]] = "deepspeed"
    """deepspeed: from the JSON; timm, giantdet: by optim/optimizers.py, from a class of timm or DeepSpeed."""

    lr: NonNegative
    weight_decay: NonNegative = 0.0

    @property
    def name(self) -> str:
        """The optimizer's `type` in the JSON."""
        return type(self).__name__

    def problems(self) -> Iterator[str]:
        """Yield messages about wrong combinations of values; each begins with the name of a parameter."""
        return iter(())


class Adam(OptimizerConfig):
    """Adam (Kingma and Ba 2015)."""

    MOMENTS = 2

    betas: Betas = (0.9, 0.999)
    eps: NonNegative = 1e-8
    torch_adam: bool = False
    """Use torch.optim's implementation instead of DeepSpeed's, which is compiled at the first use. giantdet
    sets it to true unless the optimizer is offloaded on a machine with a GPU."""
    adam_w_mode: bool = True
    foreach: bool | None = None
    fp32_optimizer_states: bool = True


class AdamW(Adam):
    """AdamW (Loshchilov and Hutter 2019)."""


class MomentumConfig(OptimizerConfig):
    """Base of the sections of optimizers with momentum."""

    momentum: NonNegative = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def problems(self) -> Iterator[str]:
        """See `OptimizerConfig.problems`."""
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            yield "nesterov needs a momentum, and no dampening"


class SGD(MomentumConfig):
    """Stochastic gradient descent, torch.optim.SGD."""

    foreach: bool | None = None


class Lion(OptimizerConfig):
    """Lion (Chen et al. 2023)."""

    BUILT_BY = "timm"

    betas: Betas = (0.9, 0.99)


class Lamb(OptimizerConfig):
    """LAMB (You et al. 2020)."""

    MOMENTS = 2
    WHOLE_WEIGHTS = True
    BUILT_BY = "timm"

    betas: Betas = (0.9, 0.999)
    eps: NonNegative = 1e-6
    bias_correction: bool = True
    grad_averaging: bool = True
    trust_clip: bool = False
    always_adapt: bool = False
    decoupled_decay: bool = False


class Lars(MomentumConfig):
    """LARS (You et al. 2017)."""

    WHOLE_WEIGHTS = True
    BUILT_BY = "timm"

    trust_coeff: float = 0.001
    eps: NonNegative = 1e-8
    trust_clip: bool = False
    always_adapt: bool = False


class Muon(OptimizerConfig):
    """Muon (Jordan et al. 2024), and AdamW for parameters that are not matrices."""

    WHOLE_WEIGHTS = True
    BUILT_BY = "timm"

    momentum: NonNegative = 0.95
    nesterov: bool = False
    betas: Betas = (0.9, 0.95)
    ns_steps: Whole = 5
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw"


class DeepSpeedMuon(OptimizerConfig):
    """DeepSpeed's Muon for the weights of linear layers, at every ZeRO stage, and AdamW for all the others.

    A matrix's LR is scaled by sqrt(max(1, rows / columns)), Jordan's rule, and the momentum is Nesterov's.
    """

    MOMENTS = 2  # AdamW's; matrices have one
    BUILT_BY = "giantdet"

    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    ns_method: Literal["gram", "standard"] = "gram"
    """Newton-Schulz iteration. gram: on the Gram matrix, in float16 where there is hardware for it; standard:
    in bfloat16."""
    adam_lr: NonNegative | None = None
    """LR of AdamW's parameters; None: `lr`. Muon's is often 10 to 50 times as large."""
    betas: Betas = (0.9, 0.95)
    eps: NonNegative = 1e-10


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    section.__name__: section for section in (Adam, AdamW, SGD, Lion, Lamb, Lars, Muon, DeepSpeedMuon)
}
