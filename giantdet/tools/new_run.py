"""The JSON of a run for a data set, a size of model and a machine: a recipe, adapted, with its reasons.

The recipe gives everything that does not depend on these: model, optimizer, losses, schedule. What depends
on them is chosen here, by rules that a reader can repeat by hand; `about.why` of the JSON has the reason for
each value. The rules that are measured name where; the others are conventions of the field.
"""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from giantdet.config.architectures.suited import SUITED, Facts, Suited, slots
from giantdet.config.load import parse_run
from giantdet.config.recipes import recipe_path
from giantdet.config.types import DataConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.dataset import check_files, nothing_to_train
from giantdet.errors import ConfigError, DataError
from giantdet.tools.canvas import STRIDE, canvas
from giantdet.tools.costs import GIB
from giantdet.tools.machines import MACHINES, Machine
from giantdet.tools.plan import Choice, Plan, make_plan

SIZES = {
    "small": "mask_rcnn_convnext_tiny_16_adamw",
    "base": "mask_rcnn_swin_base_16_adamw",
    "large": "mask_rcnn_vitdet_large_64_adamw",
    "giant": "mask_rcnn_vitdet_dinov2g_64_adamw",
}
"""The recipes behind the sizes."""
LEAST_STEPS = 1000
STEPS_AN_EPOCH = 25
LEAST_BATCH = 4
EVALUATIONS = 10
FEW_IMAGES = 2000
BANDWIDTH, EFFICIENCY = 50e9, 0.4  # the defaults of `giantdet plan`


@dataclass
class NewRun:
    """A run's JSON as it is built, with the reason for each value by its dotted path."""

    raw: dict[str, Any]
    why: dict[str, str] = field(default_factory=dict)

    def set(self, path: str, suited: Suited | None) -> None:
        """Set a value by its dotted path; None: leave it as the recipe has it."""
        if suited is None:
            return
        *parents, last = path.split(".")
        node = self.raw
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = suited.value
        self.why[path.removeprefix("giantdet.")] = suited.why

    def text(self) -> str:
        """Return each value with its reason, one a line."""
        lines = []
        for path, why in self.why.items():
            root = self.raw if path.split(".")[0] in self.raw else self.raw["giantdet"]
            node: Any = root
            for key in path.split("."):
                node = node.get(key)
            lines.append(f"{path} = {json.dumps(node)}: {why}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Wishes:
    """What the user gives."""

    data: Path
    images: Path | None = None
    val: Path | None = None
    size: str = "small"
    """One of `SIZES`, the name of a recipe, or a JSON."""
    weights: Path | None = None
    """A local file of the backbone's weights; None: timm's tag, as the recipe has it."""
    side: int | None = None
    """Largest side of the canvas in pixels; None: the recipe's."""
    gpus: int = 1
    machine: Machine = MACHINES["h100"]
    is_cpu: bool = False
    output: Path = Path("run.json")


def new_run(wishes: Wishes) -> NewRun:
    """Return the run's JSON. Raises ConfigError or DataError where there can be none."""
    recipe = recipe_path(SIZES.get(wishes.size, wishes.size))
    raw = json.loads(recipe.read_text(encoding="utf-8-sig"))
    of_recipe = parse_run(raw, recipe).giantdet.data  # an old or broken JSON is refused by its own key
    dataset = _open(wishes.data, wishes.images)
    new = NewRun(copy.deepcopy(raw))
    new.raw.pop("$schema", None)
    model = new.raw["giantdet"].get("model", {}).get("type", "mask_rcnn")
    if model not in SUITED:
        raise ConfigError(f"{recipe.stem}: {model} is not a model of objects alone; use {', '.join(SUITED)}")
    _set_data(new, wishes, dataset)
    scale = _set_canvas(new, dataset, of_recipe, wishes.side)
    facts = _facts(dataset, scale)
    for path, suited in SUITED[model](facts).items():
        new.set(f"giantdet.model.{path}", suited)
    new.set("giantdet.data.max_objects", slots(facts))
    if (most := slots(facts)) is not None:
        new.set("giantdet.eval.max_detections", Suited(most.value, most.why))
    _set_augmentation(new, dataset, facts)
    _set_weights(new, wishes)
    images = len(dataset.training_indices(new.raw["giantdet"]["data"].get("filter_empty", True)))
    batch = _set_batch(new, wishes, images)
    _set_length(new, recipe, images, batch, _reference(raw), wishes)
    _set_about(new, recipe, wishes)
    parse_run(new.raw, wishes.output)
    return new


def _open(annotations: Path, images: Path | None) -> CocoDataset:
    if images is None:
        try:
            images = Path(json.loads(annotations.read_text(encoding="utf-8-sig"))["info"]["images"])
        except (OSError, ValueError, KeyError, TypeError):
            images = None
    if images is None or not images.is_dir():
        CocoDataset(annotations, annotations.parent)  # what is wrong with the annotations comes first
        raise DataError(f"{annotations} does not tell where its images are; give their folder with --images")
    dataset = CocoDataset(annotations, images)
    check_files(dataset)
    if not dataset.summary().objects:
        raise nothing_to_train(dataset)
    return dataset


def _set_data(new: NewRun, wishes: Wishes, dataset: CocoDataset) -> None:
    summary = dataset.summary()
    data = new.raw["giantdet"].setdefault("data", {})
    for key in ("train", "val", "classes"):
        data.pop(key, None)
    counts = f"{summary.images} images, {summary.objects} objects, {len(summary.objects_per_class)} classes"
    section = {"annotations": os.path.abspath(wishes.data), "images": os.path.abspath(dataset.root)}
    new.set("giantdet.data.train", Suited(section, counts))
    val = wishes.val
    if val is None:
        beside = wishes.data.with_name("val.json")
        val = beside if wishes.data.name == "train.json" and beside.is_file() else None
    if val is None:
        new.why["data.val"] = (
            "none is given (--val), so AP is not measured; import-data --val-share makes one"
        )
        data["val"] = None
        return
    checked = _open(val, wishes.images if wishes.images is not None else _own_images(val, dataset.root))
    if unknown := [name for name in checked.class_names if name not in dataset.class_names]:
        raise DataError(f"{val}: the class {unknown[0]!r} is not among those of {wishes.data}")
    section = {"annotations": os.path.abspath(val), "images": os.path.abspath(checked.root)}
    new.set("giantdet.data.val", Suited(section, f"{len(checked)} images"))


def _own_images(annotations: Path, default: Path) -> Path | None:
    """Return None where a file names its own folder of images, else that of the training images."""
    try:
        return (
            None if "images" in json.loads(annotations.read_text(encoding="utf-8-sig"))["info"] else default
        )
    except (OSError, ValueError, KeyError, TypeError):
        return default


def _set_canvas(new: NewRun, dataset: CocoDataset, of_recipe: DataConfig, most: int | None) -> float:
    """Set the canvas and the short sides; return the median scale of the images on it."""
    data = new.raw["giantdet"]["data"]
    limits = (of_recipe.short_side, max(of_recipe.size))
    if most is not None:
        limits = (most, max(most // STRIDE, 1) * STRIDE)
    found = canvas(dataset.sizes_hw, *limits)
    scale, short = found.scale, found.short_side
    new.set("giantdet.data.size", Suited(found.size, found.why))
    how = "enlarged" if scale > 1.05 else "reduced" if scale < 0.95 else "about as large as they are"
    new.set("giantdet.data.short_side", Suited(short, f"images are {how} (factor {scale:.2f})"))
    if "short_sides" in data.get("augment", {}):
        sides = sorted({max(32, round(short * factor / 32) * 32) for factor in np.linspace(0.6, 1.0, 6)})
        text = "multi-scale training from 0.6 of the short side on, as in the recipes"
        new.set("giantdet.data.augment.short_sides", Suited(sides, text))
    return scale


def _facts(dataset: CocoDataset, scale: float) -> Facts:
    boxes = dataset.boxes_K4
    sides = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)) * scale
    most = int(np.diff(dataset.object_start).max())
    return Facts(float(np.median(sides)), dataset.has_masks, most)


def _set_augmentation(new: NewRun, dataset: CocoDataset, facts: Facts) -> None:
    augment = new.raw["giantdet"]["data"].get("augment", {})
    if augment.get("jitter") is not None and facts.side < 64:
        text = f"objects of {facts.side:.0f} pixels would vanish at the recipe's {augment['jitter'][0]:g}"
        new.set("giantdet.data.augment.jitter", Suited([0.5, 2.0], text))
    if len(dataset) < FEW_IMAGES:
        why = f"{len(dataset)} images are few: brightness, contrast, saturation and hue vary too"
        new.set(
            "giantdet.data.augment.photometric",
            Suited(True, f"{why}; turn it off if colours are the classes"),
        )


def _set_weights(new: NewRun, wishes: Wishes) -> None:
    model = new.raw["giantdet"]["model"]
    backbone = model.setdefault("backbone", {})
    if wishes.weights is not None:
        backbone.pop("pretrained", None)
        new.set("giantdet.model.backbone.init_weights", Suited(os.path.abspath(wishes.weights), "as given"))
    elif backbone.get("init_weights") is None and model.get("init_weights") is None:
        why = f"timm loads the weights of {backbone.get('name')} at the first start; offline: --weights FILE"
        new.set("giantdet.model.backbone.pretrained", Suited(True, why))


def _reference(raw: dict[str, Any]) -> int | None:
    """Return the batch that a recipe's LR is for."""
    given = raw["giantdet"].get("lr_scaling", {}).get("reference_batch") or raw.get("train_batch_size")
    return given if isinstance(given, int) else None


def _set_batch(new: NewRun, wishes: Wishes, images: int) -> int:
    """Set the batch, micro-batch, precision and ZeRO stage; return the batch."""
    reference = _reference(new.raw) or 16
    wanted = min(reference, max(LEAST_BATCH, 2 ** int(math.log2(max(1, images / STEPS_AN_EPOCH)))))
    each = max(1, round(wanted / wishes.gpus))
    if wishes.is_cpu:
        new.set("bf16.enabled", Suited(False, "CPUs compute in float32"))
    where = f"{wishes.gpus} x {wishes.machine.name}"
    new.raw |= {"train_batch_size": wishes.gpus, "train_micro_batch_size_per_gpu": 1}
    new.raw["gradient_accumulation_steps"] = 1
    # lr_scaling and the schedule do not change memory, and need values that are chosen later.
    plain = copy.deepcopy(new.raw)
    plain["giantdet"].pop("lr_scaling", None)
    plain["giantdet"]["model"]["backbone"]["pretrained"] = False
    plain["giantdet"]["model"]["backbone"].pop("init_weights", None)
    plan = make_plan(parse_run(plain), wishes.gpus, wishes.machine, BANDWIDTH, EFFICIENCY, images)
    choice = _choice(plan, each)
    if choice is None:
        fewest = plan.fewest_gpus()
        advice = f"; --gpus {fewest} or more is enough" if fewest and not wishes.is_cpu else ""
        need, room = min(c.memory for c in plan.choices) / GIB, wishes.machine.memory / GIB
        raise ConfigError(
            f"{wishes.size} does not fit on {where}: an image needs {need:.1f} GiB of {room:.1f}{advice}, or "
            f"a smaller --size ({', '.join(SIZES)})"
        )
    if choice is not plan.own:
        text = f"the quickest that fits on {where}"
        new.set("zero_optimization.stage", Suited(choice.stage, text))
        every: bool | int = choice.every if choice.every > 1 else bool(choice.every)
        blocks = Suited(every, f"{text}: blocks {plan.blocks(choice)}")
        new.set("giantdet.model.backbone.checkpoint_blocks", blocks)
    micro = max(n for n in range(1, each + 1) if each % n == 0 and n <= max(1, choice.largest))
    batch = int(each * wishes.gpus)
    few = f"about {STEPS_AN_EPOCH} steps an epoch, but at least {LEAST_BATCH} images"
    few = few if wanted < reference else "the recipe's"
    multiple = f"; a multiple of {wishes.gpus}" if wishes.gpus > 1 else ""
    new.set("train_batch_size", Suited(batch, f"{few}{multiple}"))
    fits = f"up to {choice.largest} images fit in {wishes.machine.memory / 1e9:.0f} GB (estimated, see plan)"
    new.set("train_micro_batch_size_per_gpu", Suited(micro, f"{where}: {fits}"))
    new.raw["gradient_accumulation_steps"] = "auto"
    return batch


def _choice(plan: Plan, images: int) -> Choice | None:
    """Return the fastest ZeRO stage and recomputation with so many images in a micro-batch, or None.

    ZeRO-0 is left to recipes that have it. If nothing has room for as many, it is among those that have room
    for the most. Of those within 2% of its time it is the recipe's own, or that of the recipe's stage, or
    else the one that needs the least memory.
    """
    known = [choice for choice in plan.choices if choice.stage >= min(1, plan.own.stage)]
    most = min(images, max(choice.largest for choice in known))
    if most < 1:
        return None
    fitting = [choice for choice in known if choice.largest >= most]
    best = min(choice.seconds for choice in fitting)
    near = [choice for choice in fitting if choice.seconds <= 1.02 * best]
    own = plan.own
    return min(near, key=lambda c: (c is not own, c.stage != own.stage, c.memory))


def _set_length(
    new: NewRun, recipe: Path, images: int, batch: int, reference: int | None, wishes: Wishes
) -> None:
    """Set epochs, schedule, LR rule, and the intervals of evaluations and checkpoints."""
    train = new.raw["giantdet"].setdefault("train", {})
    old = float(train.pop("epochs", 0) or 0)
    train.pop("steps", None)
    least = math.ceil(LEAST_STEPS * batch / images)
    epochs = max(math.ceil(old), least)
    steps = math.ceil(epochs * images / batch)
    short = f"{LEAST_STEPS} steps at least, for {images} images at a batch of {batch}"
    why = short if epochs > old else "the recipe's"
    new.set("giantdet.train.epochs", Suited(epochs, f"{why}: {steps} steps"))
    adam = "adam" in new.raw["optimizer"]["type"].lower()
    if reference is not None and batch != reference:
        rule = "sqrt" if adam else "linear"
        factor = math.sqrt(batch / reference) if adam else batch / reference
        value = {"reference_batch": reference, "rule": rule}
        text = f"the recipe's LR is for a batch of {reference}; with this rule x {factor:.3g}"
        new.set("giantdet.lr_scaling", Suited(value, text))
    _set_schedule(new, epochs / old if old else None, steps)
    every = max(1, round(epochs / EVALUATIONS))
    interval = Suited(f"{every} epochs", f"about {EVALUATIONS} times in the run")
    if new.raw["giantdet"]["data"]["val"] is not None:
        new.set("giantdet.train.eval_every", interval)
    else:
        del new.raw["giantdet"]["data"]["val"]
        train.pop("eval_every", None)
    new.set("giantdet.train.save_every", interval)
    train["output"] = f"runs/{wishes.output.stem}"


def _set_schedule(new: NewRun, stretch: float | None, steps: int) -> None:
    """Stretch the milestones of the recipe's schedule with its epochs, and shorten a long warmup."""
    params = new.raw.get("scheduler", {}).get("params", {})
    if "milestones" in params and stretch is not None:
        values = [_stretched(value, stretch) for value in params["milestones"]]
        if values != params["milestones"]:
            new.set("scheduler.params.milestones", Suited(values, "at the recipe's shares of the run"))
    warmup = params.get("warmup_num_steps", 0)
    if isinstance(warmup, int) and warmup > steps // 10:
        new.set("scheduler.params.warmup_num_steps", Suited(steps // 10, "a tenth of the run"))


def _stretched(length: Any, stretch: float) -> Any:
    """Return a length in epochs times `stretch`, and another as it is."""
    number, _, unit = str(length).partition(" ")
    return f"{float(number) * stretch:.4g} epochs" if unit in ("epoch", "epochs") else length


def _set_about(new: NewRun, recipe: Path, wishes: Wishes) -> None:
    start = f"giantdet train --config {wishes.output}"
    if wishes.gpus > 1:
        start = f"deepspeed --num_gpus {wishes.gpus} scripts/train.py --deepspeed_config {wishes.output}"
    new.raw = {
        "about": {
            "what": f"{recipe.stem} for {wishes.data}",
            "command": start,
            "why": new.why,
        }
    } | {key: value for key, value in new.raw.items() if key != "about"}
