"""Build the optimizer that the JSON's `optimizer` block names.

DeepSpeed builds Adam, AdamW and SGD (torch.optim's). Lion, LAMB, LARS and Muon are timm's: DeepSpeed's own
Lion and LAMB are CUDA kernels.

LAMB and LARS scale a step by the norm of a whole weight, and Muon orthogonalises its momentum. At ZeRO-1 to 3
an optimizer sees flat partitions of many weights joined together. So these three need stage 0, where it sees
each weight; config/resolve.py refuses them at other stages.

DeepSpeedMuon is Muon for the other stages: DeepSpeed's ZeRO optimizers recognise its class and orthogonalise
whole matrices before they partition. From a JSON alone DeepSpeed 0.19.8 would choose every weight of two or
more dimensions, and it fails on those of convolutions (a shape error, and a hang at stages 1 to 3); it would
also rename the groups. So the groups are made here, and the weights of linear layers are Muon's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from giantdet.config.optimizers import DeepSpeedMuon, OptimizerConfig
from giantdet.optim.param_groups import NO_DECAY


def optimizer_factory(config: OptimizerConfig) -> Callable[[list[dict[str, Any]]], Optimizer] | None:
    """Return a function from parameter groups to the optimizer; None if DeepSpeed builds it from the JSON.

    `deepspeed.initialize(optimizer=...)` accepts the function.
    """
    if config.BUILT_BY == "deepspeed":
        return None
    if isinstance(config, DeepSpeedMuon):
        return _deepspeed_muon
    from timm import optim

    build, params = getattr(optim, config.name), config.model_dump(exclude_unset=True)
    if config.name == "Lamb":
        params["max_grad_norm"] = None  # DeepSpeed clips gradients, as gradient_clipping says
    return lambda groups: build(groups, **params)


def with_muon(
    model: nn.Module, groups: list[dict[str, Any]], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Return the groups as `config` needs them: for DeepSpeedMuon each is split, for others they stay.

    Muon's half has the decayed weights of linear layers and "/muon" after the group's name; AdamW's half has
    the rest. Position tables and class tokens are matrices too, but no layer's weights, and stay AdamW's.
    """
    if not isinstance(config, DeepSpeedMuon):
        return groups
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    adam_lr = config.lr if config.adam_lr is None else config.adam_lr
    # Where the LR is 0 that of every group is.
    ratio = adam_lr / config.lr if config.lr else 1.0
    muons = {"use_muon": True, "momentum": config.momentum, "ns_method": config.ns_method}
    adams = {"use_muon": False, "betas": config.betas, "eps": config.eps}
    found = []
    for group in groups:
        decayed = not group["name"].endswith(NO_DECAY)
        chosen = [p for p in group["params"] if decayed and id(p) in linear]
        others = [p for p in group["params"] if not (decayed and id(p) in linear)]
        if chosen:
            found.append(group | {"params": chosen, "name": f"{group['name']}/muon"} | muons)
        if others:
            found.append(group | {"params": others, "lr": group["lr"] * ratio} | adams)
    return found


def _deepspeed_muon(groups: list[dict[str, Any]]) -> Optimizer:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in groups:
        for p in group["params"]:
            p.use_muon = group["use_muon"]  # what DeepSpeed's ZeRO optimizers look at
    optimizer: Optimizer = MuonWithAuxAdam(groups)
    return optimizer
