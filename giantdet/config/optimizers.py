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
    """Learning rate, after the warmup and before scaling (`lr_scaling`, layer decay, AGVM)."""
    weight_decay: NonNegative = 0.0
    """Weight decay of matrices and kernels; norms, biases and position embeddings have none unless
    `param_groups.decay_norms_and_biases` is true."""

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
    """Decay of the first and of the second moment."""
    eps: NonNegative = 1e-8
    """Added to the root of the second moment."""
    torch_adam: bool = False
    """Use torch.optim's implementation instead of DeepSpeed's, which is compiled at the first use. giantdet
    sets it to true unless the optimizer is offloaded on a machine with a GPU."""
    adam_w_mode: bool = True
    """True: the weight decay is decoupled from the gradient (AdamW), for the type Adam too."""
    foreach: bool | None = None
    """Update many tensors in one kernel; null: as torch.optim chooses."""
    fp32_optimizer_states: bool = True
    """Keep the moments in float32 where the weights are bf16 or fp16 and offloaded to the CPU."""


class AdamW(Adam):
    """AdamW (Loshchilov and Hutter 2019)."""


class MomentumConfig(OptimizerConfig):
    """Base of the sections of optimizers with momentum."""

    momentum: NonNegative = 0.0
    """Factor of the running sum of gradients; 0: none."""
    dampening: float = 0.0
    """Share of the gradient that is left out of this sum."""
    nesterov: bool = False
    """Nesterov momentum."""

    def problems(self) -> Iterator[str]:
        """See `OptimizerConfig.problems`."""
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            yield "nesterov needs a momentum, and no dampening"


class SGD(MomentumConfig):
    """Stochastic gradient descent, torch.optim.SGD."""

    foreach: bool | None = None
    """Update many tensors in one kernel; null: as torch.optim chooses."""


class Lion(OptimizerConfig):
    """Lion (Chen et al. 2023)."""

    BUILT_BY = "timm"

    betas: Betas = (0.9, 0.99)
    """Weight of the momentum in the update, and decay of the momentum."""


class Lamb(OptimizerConfig):
    """LAMB (You et al. 2020)."""

    MOMENTS = 2
    WHOLE_WEIGHTS = True
    BUILT_BY = "timm"

    betas: Betas = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: NonNegative = 1e-6
    """Added to the root of the second moment."""
    bias_correction: bool = True
    """Correct the moments for their start from 0."""
    grad_averaging: bool = True
    """Weight the gradient by 1 - beta1 in the first moment."""
    trust_clip: bool = False
    """Bound the trust ratio by 1."""
    always_adapt: bool = False
    """Scale parameters without weight decay by a trust ratio, too."""
    decoupled_decay: bool = False
    """Decouple the weight decay from the gradient."""


class Lars(MomentumConfig):
    """LARS (You et al. 2017)."""

    WHOLE_WEIGHTS = True
    BUILT_BY = "timm"

    trust_coeff: float = 0.001
    """Factor of the trust ratio, norm of the weights over norm of the gradient."""
    eps: NonNegative = 1e-8
    """Added to the denominator of the trust ratio."""
    trust_clip: bool = False
    """Bound the scaled LR by the LR."""
    always_adapt: bool = False
    """Scale parameters without weight decay by a trust ratio, too."""


class Muon(OptimizerConfig):
    """Muon (Jordan et al. 2024), and AdamW for parameters that are not matrices."""

    WHOLE_WEIGHTS = True
    BUILT_BY = "timm"

    momentum: NonNegative = 0.95
    """Decay of the matrices' momentum."""
    nesterov: bool = False
    """Nesterov momentum."""
    betas: Betas = (0.9, 0.95)
    """AdamW's betas, for parameters that are not matrices."""
    ns_steps: Whole = 5
    """Newton-Schulz iterations."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    """Scale of a matrix's LR. original: sqrt(max(1, rows / columns)); match_rms_adamw: 0.2 sqrt(max(rows,
    columns)), so that AdamW's LRs and weight decays can be kept."""


class DeepSpeedMuon(OptimizerConfig):
    """DeepSpeed's Muon for the weights of linear layers, at every ZeRO stage, and AdamW for all the others.

    A matrix's LR is scaled by sqrt(max(1, rows / columns)), Jordan's rule, and the momentum is Nesterov's.
    """

    MOMENTS = 2  # AdamW's; matrices have one
    BUILT_BY = "giantdet"

    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Decay of the matrices' momentum."""
    ns_method: Literal["gram", "standard"] = "gram"
    """Newton-Schulz iteration. gram: on the Gram matrix, in float16 where there is hardware for it; standard:
    in bfloat16."""
    adam_lr: NonNegative | None = None
    """LR of AdamW's parameters; null: `lr`. Muon's is often 10 to 50 times as large."""
    betas: Betas = (0.9, 0.95)
    """AdamW's betas."""
    eps: NonNegative = 1e-10
    """AdamW's eps."""


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    section.__name__: section for section in (Adam, AdamW, SGD, Lion, Lamb, Lars, Muon, DeepSpeedMuon)
}
