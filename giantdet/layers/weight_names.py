"""Find a model's tensors in a file: under which prefix of their names they are.

Checkpoints nest a model's tensors (`state_dict`, `model`, `teacher`) and wrappers prefix their names
(`module.`, `_orig_mod.`, `backbone.`). With nests joined by dots (`weight_files.py`), both are one prefix,
which is found by the names that the model expects.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping

from torch import Tensor

from giantdet.errors import InputError

_log = logging.getLogger(__name__)

Translate = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]

_WRAPPERS = ("_forward_module.", "_orig_mod.", "module.")
_AVERAGES = (
    *("state_dict_ema", "model_ema"),  # in the order of timm's `load_state_dict`
    *("ema_state_dict", "model_ema_state_dict", "ema_model", "ema_state", "ema"),
    "teacher",  # DINO's average, which its evaluation takes
)
_PREFERRED = (
    *_AVERAGES,
    *("state_dict", "model_state_dict", "model", "student"),
    *("online_encoder", "target_encoder", "base_encoder", "momentum_encoder", "encoder_q", "encoder_k"),
    *("net", "network", "encoder", "backbone", "module", "_orig_mod", "_forward_module"),
)
"""The order in which one of several complete sets of weights is taken."""

# What timm's filters raise for the tensors of another model.
FOREIGN = (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError)


def model_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], translate: Translate, what: str
) -> dict[str, Tensor]:
    """Return the tensors of a model among those `found`, without the prefix of their names.

    The prefix is the one under which most of the `expected` names are found, after `translate`, which
    renames those of other projects; at least half of them. Of several such prefixes the preferred one is
    taken. Prefix, choice and the tensors that are left out are logged. Without such a prefix, the nest that
    timm would read is returned, without wrappers, for the caller's report.

    Raises InputError, a ValueError, if none of several prefixes is preferred.
    """
    wanted = {key: t.shape for key, t in expected.items() if not key.endswith("num_batches_tracked")}

    def score(prefix: str) -> tuple[int, int]:
        """Return how many of the wanted names are found, and how many of them have the wanted shape."""
        try:
            state = translate(below(found, prefix))
        except FOREIGN:
            return 0, 0
        shapes = [state[key].shape == shape for key, shape in wanted.items() if key in state]
        return len(shapes), sum(shapes)

    if score("")[0] == len(wanted):
        return dict(found)
    scores = {prefix: score(prefix) for prefix in prefixes(found, len(wanted) / 2)}
    best = max(scores.values(), default=(0, 0))
    if best[0] * 2 < max(len(wanted), 1):
        return below(found, _usual_prefix(found))
    tied = [prefix for prefix in scores if scores[prefix] == best]
    # `translate` may remove a prefix itself; the shorter one hides fewer tensors from the strict comparison.
    tied = [one for one in tied if not any(one.startswith(o) for o in tied if o != one)]
    chosen = _preferred(tied)
    if chosen is None:
        raise InputError(
            f"{what} has several complete sets of weights, under {_quoted(tied)}: save one of them to a "
            "file of its own with torch.save"
        )
    if chosen:
        _report(found, chosen, [prefix for prefix in tied if prefix != chosen], what)
    return below(found, chosen)


def below(found: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors under a prefix of their names, without it."""
    return {key[len(prefix) :]: tensor for key, tensor in found.items() if key.startswith(prefix)}


def prefixes(found: Mapping[str, Tensor], least: float) -> list[str]:
    """Return the beginnings of the names, up to a dot, that at least so many tensors have; "" is the
    first."""
    counts: Counter[str] = Counter()
    for key in found:
        parts = key.split(".")
        counts.update("".join(f"{part}." for part in parts[:depth]) for depth in range(len(parts)))
    return [prefix for prefix, count in counts.items() if count >= least]


def _usual_prefix(found: Mapping[str, Tensor]) -> str:
    """Return the nest that timm would read, if there is one, and the wrappers that all its tensors have."""
    prefix = ""
    for name in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if any(key.startswith(f"{name}.") for key in found):
            prefix = f"{name}."
            break
    while True:
        below = [key for key in found if key.startswith(prefix)]
        wrapper = next((w for w in _WRAPPERS if all(key.startswith(prefix + w) for key in below)), None)
        if wrapper is None:
            return prefix
        prefix += wrapper


def _preferred(tied: list[str]) -> str | None:
    """Return the preferred one of several prefixes; None if they differ in names of unknown meaning."""
    if len(tied) == 1:
        return tied[0]
    parts: list[set[str]] = [set(prefix.split(".")) - {""} for prefix in tied]
    shared = parts[0].intersection(*parts[1:])
    own = [names - shared for names in parts]
    if any(not names <= set(_PREFERRED) for names in own):
        return None
    ranks = [sorted(map(_PREFERRED.index, names)) for names in own]
    return tied[ranks.index(min(ranks))] if ranks.count(min(ranks)) == 1 else None


def _report(found: Mapping[str, Tensor], chosen: str, others: list[str], what: str) -> None:
    left: Counter[str] = Counter()
    for parts in (key.split(".") for key in found if not key.startswith(chosen)):
        pairs = zip(parts, chosen.split("."), strict=False)
        left[next(part for part, mine in pairs if part != mine)] += 1
    names = ", ".join(f"{name} ({count})" for name, count in left.items()) or "nothing"
    if others:
        is_average = not set(_AVERAGES).isdisjoint(chosen.split("."))
        why = "averages before raw weights, as timm does" if is_average else "the usual choice"
        _log.warning(
            "%s: took the weights under '%s', not %s (%s); left out tensors of %s",
            *(what, chosen, _quoted(others), why, names),
        )
    else:
        _log.info("%s: took the weights under '%s'; left out tensors of %s", what, chosen, names)


def _quoted(prefixes: list[str]) -> str:
    return ", ".join(f"'{prefix}'" for prefix in prefixes)
