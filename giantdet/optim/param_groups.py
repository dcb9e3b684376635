"""Parameter groups: (module of the detector) x (with or without weight decay).

Groups carry a name, because they are found by name, never by position: ZeRO reorders and merges.
Norms and biases (tensors of at most one dimension) and position embeddings are not decayed, the
habit of ViTDet, Swin and ConvNeXt; timm names the embeddings in `no_weight_decay()`.
"""

from __future__ import annotations

import fnmatch
from typing import Any

from torch import nn

NO_DECAY = "/no_decay"


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    lr: float | None = None,
    modules: dict[str, tuple[str, ...]] | None = None,
) -> list[dict[str, Any]]:
    """One dict a group: `params`, `name`, `weight_decay` (and `lr`). Frozen parameters are left out.

    `modules` are patterns of parameter names by module, see `module_of`; None: the model's children.
    """
    exempt = _undecayed_names(model)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and name not in exempt
        key = module_of(name, modules) + ("" if decayed else NO_DECAY)
        group = groups.setdefault(
            key, {"params": [], "name": key, "weight_decay": weight_decay if decayed else 0.0}
        )
        group["params"].append(parameter)
        if lr is not None:
            group["lr"] = lr
    return list(groups.values())


def module_of(name: str, modules: dict[str, tuple[str, ...]] | None = None) -> str:
    """The module that a parameter belongs to: the first with a pattern that fits its name.

    Without patterns it is the name's first part (`backbone.body.conv1.weight`: backbone). ValueError
    where no pattern fits.
    """
    if modules is None:
        return name.split(".", 1)[0]
    for module, patterns in modules.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return module
    raise ValueError(f"agvm.modules: no pattern fits parameter {name}; add one, '*' fits all that is left")


def module_of_group(group: dict[str, Any]) -> str:
    """The module that the name of a parameter group begins with."""
    return str(group.get("name", "")).split("/", 1)[0]


def _undecayed_names(model: nn.Module) -> set[str]:
    """Full names of what submodules list in timm's `no_weight_decay()`."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        listed = getattr(module, "no_weight_decay", None)
        if callable(listed):
            names |= {f"{prefix}.{name}" if prefix else name for name in listed()}
    return names


def group_table(groups: list[dict[str, Any]]) -> str:
    """The groups as lines of text: name, tensors, parameters, weight decay, LR."""
    lines = [f"{'group':<24}{'tensors':>8}{'parameters':>14}{'decay':>9}{'lr':>11}"]
    for group in groups:
        # At ZeRO-3 a partitioned parameter is empty and knows its size as ds_numel.
        count = sum(getattr(p, "ds_numel", p.numel()) for p in group["params"])
        lr = f"{group['lr']:.3g}" if "lr" in group else "-"
        lines.append(
            f"{group['name']:<24}{len(group['params']):>8}{count:>14,}{group['weight_decay']:>9.3g}{lr:>11}"
        )
    return "\n".join(lines)
