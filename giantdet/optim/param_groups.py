"""Parameter groups: (module of the detector) x (layer of the backbone) x (with or without weight decay).

Groups have names and are found by name, never by position, because ZeRO reorders and merges them.
Norms and biases (tensors of at most one dimension) and position embeddings have no weight decay, as in
ViTDet, Swin and ConvNeXt; timm lists the embeddings in `no_weight_decay()`. Layers are those of timm's
`group_matcher`, and there are groups by layer only where their LRs differ.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from torch import nn

from giantdet.errors import InputError
from giantdet.optim.fragments import whole_shape

NO_DECAY = "/no_decay"


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    lr: float | None = None,
    modules: dict[str, tuple[str, ...]] | None = None,
    layer_decay: float | None = None,
    lr_multipliers: Mapping[str, float] | None = None,
    decay_all: bool = False,
) -> list[dict[str, Any]]:
    """Return one dict per group: `params`, `name`, `weight_decay` (and `lr`). Frozen parameters are left out.

    modules: patterns of parameter names by module, see `module_of`; None: the model's children.
    layer_decay: factor of the LR from each layer of a timm model to the layer below it, see `layers`.
    lr_multipliers: factor of the LR by module.
    decay_all: norms, biases and position embeddings have the weight decay, too.

    Raises InputError, a ValueError, for a multiplier of an unknown module, and for a layer decay where timm
    lists no layers.
    """
    exempt, multipliers = _undecayed_names(model), lr_multipliers or {}
    height = layers(model) if layer_decay is not None and layer_decay < 1 else {}
    groups: dict[str, dict[str, Any]] = {}
    known: set[str] = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = len(whole_shape(parameter)) > 1
        decayed = decay_all or (is_matrix and name not in exempt)
        module = module_of(name, modules)
        known.add(module)
        layer = f"/layer_{height[name][0]:02}" if name in height else ""
        key = module + layer + ("" if decayed else NO_DECAY)
        group = groups.setdefault(
            key, {"params": [], "name": key, "weight_decay": weight_decay if decayed else 0.0}
        )
        group["params"].append(parameter)
        if lr is not None:
            depth = height[name][1] if name in height else 0
            group["lr"] = lr * multipliers.get(module, 1.0) * (layer_decay or 1.0) ** depth
    if unknown := set(multipliers) - known:
        raise InputError(
            f"param_groups.lr_multipliers: no module {', '.join(sorted(unknown))} with trainable parameters; "
            f"there are {', '.join(sorted(known))}"
        )
    return list(groups.values())


def layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (layer, depth below the heads) by name, of the parameters of the timm models in `model`.

    As in ViTDet, the stem is layer 0, and the depth of the last layer is 1: its LR is decayed once.

    Raises InputError, a ValueError, where no part of the model has a `group_matcher`.
    """
    found: dict[str, tuple[int, int]] = {}
    for prefix, module in model.named_modules():
        matcher = getattr(module, "group_matcher", None)
        if not callable(matcher):
            continue
        from timm.models import group_parameters

        numbers = group_parameters(module, matcher(coarse=False), reverse=True)
        top = max(numbers.values()) + 1
        for name, number in numbers.items():
            found[f"{prefix}.{name}" if prefix else name] = (number, top - number)
    if not found:
        raise InputError(
            "param_groups.layer_decay: no part of the model knows its layers (timm's group_matcher)"
        )
    return found


def module_of(name: str, modules: dict[str, tuple[str, ...]] | None = None) -> str:
    """Return the module that a parameter belongs to: the first with a pattern that matches its name.

    Without patterns it is the first part of the name (`backbone.body.conv1.weight`: backbone). Raises
    InputError, a ValueError, where no pattern matches.
    """
    if modules is None:
        return name.split(".", 1)[0]
    for module, patterns in modules.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return module
    raise InputError(f"agvm.modules: no pattern fits parameter {name}; add one, or '*' for all the others")


def module_of_group(group: dict[str, Any]) -> str:
    """Return the module that a parameter group belongs to: the first part of its name."""
    return str(group.get("name", "")).split("/", 1)[0]


def _undecayed_names(model: nn.Module) -> set[str]:
    """Return the full names of the parameters that submodules list in timm's `no_weight_decay()`."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        listed = getattr(module, "no_weight_decay", None)
        if callable(listed):
            names |= {f"{prefix}.{name}" if prefix else name for name in listed()}
    return names


def group_table(groups: list[dict[str, Any]], lr: float | None = None) -> str:
    """Return a text table of the groups: name, tensors, parameters, weight decay, LR, and LR over `lr`."""
    lines = [f"{'group':<28}{'tensors':>8}{'parameters':>15}{'decay':>8}{'lr':>11}{'scale':>8}"]
    for group in groups:
        count = sum(whole_shape(p).numel() for p in group["params"])
        own = f"{group['lr']:.3g}" if "lr" in group else "-"
        scale = f"{group['lr'] / lr:.3g}" if lr and "lr" in group else "-"
        lines.append(
            f"{group['name']:<28}{len(group['params']):>8}{count:>15,}{group['weight_decay']:>8.3g}{own:>11}{scale:>8}"
        )
    return "\n".join(lines)
