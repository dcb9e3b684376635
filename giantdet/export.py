"""Export models as safetensors and config.json, and load exports and the weights of other projects.

An export is a folder with the files of Hugging Face models: `model.safetensors` (or numbered shards and
`model.safetensors.index.json`) and `config.json`. It can be loaded without DeepSpeed and without the run's
JSON. It is written shard by shard: at ZeRO-3 the parameters of a shard are gathered, saved and released
before the next shard, so that no process holds more than its own partition and one shard.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveInt, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from giantdet import __version__
from giantdet.architectures import Architecture, build_model
from giantdet.architectures.class_layers import Transfer, rows_by_name, transfer
from giantdet.architectures.foreign import classes_of, from_project, project_of, translate
from giantdet.checkpoint.files import SavedTensors, damage, share
from giantdet.config.architectures import ArchitectureConfig, ModelConfig
from giantdet.config.architectures.common import NormConfig
from giantdet.config.classes import Category, Classes, ClassKind
from giantdet.config.resolved import ResolvedRun
from giantdet.config.section import Section
from giantdet.config.types import DataConfig, TtaConfig
from giantdet.distributed import comm
from giantdet.errors import InputError
from giantdet.export_folder import CONFIG, INDEX, WEIGHTS, export_folder
from giantdet.layers.deferred import is_deferred, materialise
from giantdet.layers.frozen import BESIDE, PREFIX, LeftOut, fill_in, left_out_of, magnitude, round_and_check
from giantdet.layers.model_names import with_timm_name, without_source
from giantdet.layers.weight_files import read_tensors
from giantdet.layers.weight_names import model_tensors
from giantdet.layers.weights import load_backbone_weights, load_strictly, persistent_buffers
from giantdet.optim.fragments import local_share, whole_shape

logger = logging.getLogger("giantdet")

GIB = 2**30


class ExportConfig(Section):
    """config.json of an export: all that is needed to build the model and to interpret its outputs."""

    format: Literal["giantdet"] = "giantdet"
    version: str = __version__
    model: ModelConfig
    norm: NormConfig = NormConfig()
    size: tuple[PositiveInt, PositiveInt]
    """Canvas (height, width) in pixels."""
    short_side: PositiveInt
    """Short side in pixels that images are scaled to."""
    long_side: PositiveInt | None = None
    """See `DataConfig`."""
    window_stride: PositiveInt | None = None
    """See `EvalConfig`."""
    tta: TtaConfig | None = None
    """The settings of --tta; see `EvalConfig`."""
    categories: tuple[Category, ...]
    """(category id of the data set, name) of the classes of objects, by class index."""
    semantic_categories: tuple[Category, ...] = ()
    """The same of the classes of semantic maps, by number."""
    left_out: LeftOut | None = None
    """Where the weights of a frozen backbone come from, if the export leaves them out."""

    @property
    def classes(self) -> Classes:
        """The classes that the model predicts."""
        return Classes(objects=self.categories, semantic=self.semantic_categories)

    def data_config(self, **settings: Any) -> DataConfig:
        """Return the settings of data that the model is evaluated with, and `settings` beside them."""
        return DataConfig(size=self.size, short_side=self.short_side, long_side=self.long_side, **settings)


def export_config(run: ResolvedRun, classes: Classes) -> ExportConfig:
    """Return the config.json of an export of this run, without the paths of its initial weights.

    `classes` are those that the model predicts.
    """
    model, left_out = run.giantdet.model, None
    backbone = with_timm_name(model.backbone)
    if not run.giantdet.train.export_backbone:
        left_out = left_out_of(backbone, run.precision)
        if left_out.kind == "tag":
            backbone = backbone.model_copy(update={"name": left_out.source})
    backbone = without_source(backbone).model_copy(
        update={"init_weights": None, "pretrained": False, "compile_blocks": False}
    )
    return ExportConfig(
        model=model.model_copy(update={"backbone": backbone, "init_weights": None}),
        norm=run.giantdet.norm,
        size=run.giantdet.data.size,
        short_side=run.giantdet.data.short_side,
        long_side=run.giantdet.data.long_side,
        window_stride=run.giantdet.eval.window_stride,
        tta=run.giantdet.eval.tta,
        categories=classes.objects,
        semantic_categories=classes.semantic,
        left_out=left_out,
    )


def export_model(model: nn.Module, folder: Path, config: ExportConfig, shard: float = 2.0) -> None:
    """Write a model to a folder; it may be that of a DeepSpeed engine at any ZeRO stage.

    All ranks call it, and the main rank writes. A file has at most `shard` GiB, or a single tensor.
    """
    tensors = dict(model.named_parameters()) | persistent_buffers(model)
    if config.left_out is not None:
        named = model.named_parameters()
        config = _with_magnitude(config, (local_share(p) for name, p in named if name.startswith(PREFIX)))
        tensors = {name: t for name, t in tensors.items() if not name.startswith(PREFIX)}
    sizes = {n: whole_shape(t).numel() * t.element_size() for n, t in tensors.items()}
    writer = _ShardWriter(folder) if comm.is_main() else None
    for names in shard_plan(sizes, int(shard * GIB)):
        partitioned = [tensors[name] for name in names if hasattr(tensors[name], "ds_id")]
        with _gathered(partitioned):
            if writer is not None:
                writer.write({name: tensors[name].detach().cpu().contiguous() for name in names})
    if writer is not None:
        writer.finish(config)
    comm.barrier()


def export_checkpoint(checkpoint: Path, folder: Path, config: ExportConfig, shard: float = 2.0) -> None:
    """Write the model of a saved checkpoint, in one process and without an engine.

    Where the checkpoint has averaged weights, these are exported, as training does. Weights are float32 in a
    checkpoint, and are exported in the type that the model was trained in. Raises InputError, a ValueError,
    for a damaged checkpoint.
    """
    if found := damage(checkpoint):
        raise InputError(f"{checkpoint}: {'; '.join(found)}")
    saved = SavedTensors(checkpoint)
    parameters = saved.state["parameters"]
    sizes = {name: math.prod(p["shape"]) * _dtype(p).itemsize for name, p in parameters.items()}
    buffers = {name: saved.buffer(name) for name in saved.kinds if saved.has("buffer", name)}
    sizes |= {name: buffer.nbytes for name, buffer in buffers.items()}

    def tensor(name: str) -> Tensor:
        if name in buffers:
            return buffers[name]
        kind, shape = "ema" if saved.has("ema", name) else "weight", parameters[name]["shape"]
        return saved.read(kind, name, 0, math.prod(shape)).view(shape).to(_dtype(parameters[name]))

    if config.left_out is not None:
        left = [name for name in sizes if name.startswith(PREFIX)]
        config = _with_magnitude(config, (tensor(name) for name in left if name in parameters))
        sizes = {name: size for name, size in sizes.items() if name not in left}
    writer = _ShardWriter(folder)
    for names in shard_plan(sizes, int(shard * GIB)):
        writer.write({name: tensor(name) for name in names})
    writer.finish(config)


def _with_magnitude(config: ExportConfig, own: Iterable[Tensor]) -> ExportConfig:
    """Complete what an export says of the tensors that it leaves out, from each rank's parts of them."""
    assert config.left_out is not None
    found = comm.mean_over_ranks([sum(map(magnitude, own))])[0] * comm.world_size()
    left_out = config.left_out.model_copy(update={"magnitude": found})
    return config.model_copy(update={"left_out": left_out})


def _dtype(parameter: dict[str, Any]) -> torch.dtype:
    dtype = getattr(torch, parameter["dtype"])
    assert isinstance(dtype, torch.dtype)
    return dtype


def shard_plan(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Split the names, in their order, into shards of at most `limit` bytes, or of a single larger tensor."""
    plan: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and plan[-1]:
            plan.append([])
            room = limit
        plan[-1].append(name)
        room -= size
    return plan


class _ShardWriter:
    """Writes shards under temporary names, and renames them when their number is known."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[list[str]] = []
        self.bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        for old in [*folder.glob("*.safetensors"), folder / INDEX]:
            if old.name != BESIDE:  # the user's
                old.unlink(missing_ok=True)

    def write(self, tensors: dict[str, Tensor]) -> None:
        file = self._temporary(len(self.shards))
        save_file(tensors, file, metadata={"format": "pt"})
        share(file)
        self.shards.append(list(tensors))
        self.bytes += sum(t.numel() * t.element_size() for t in tensors.values())

    def finish(self, config: ExportConfig) -> None:
        total = len(self.shards)
        names = (
            [WEIGHTS]
            if total == 1
            else [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
        )
        for i, name in enumerate(names):
            self._temporary(i).rename(self.folder / name)
        if total > 1:
            where = {key: name for name, keys in zip(names, self.shards, strict=True) for key in keys}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": where}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (self.folder / CONFIG).write_text(config.model_dump_json(indent=2) + "\n")

    def _temporary(self, i: int) -> Path:
        return self.folder / f"shard-{i}.safetensors.part"


def _gathered(parameters: list[Tensor]) -> Any:
    if not parameters:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def read_export_config(folder: Path) -> ExportConfig:
    """Return the config.json of an export.

    Raises InputError, a ValueError, that names the file, if it is missing or not a giantdet export.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise InputError(f"{folder}: not a giantdet export (no {CONFIG})")
    try:
        return ExportConfig.model_validate_json(file.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        raise InputError(f"{file}: not from a giantdet export ({what})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: cannot be read ({error})") from None


def load_detector(
    folder: str | Path, device: torch.device | str = "cpu", backbone: str | Path | None = None
) -> tuple[Architecture, ExportConfig]:
    """Return the detector of an export, in evaluation mode and float32, and its config.json.

    `folder` is what `export_folder` takes. `backbone` is the file of the frozen backbone's weights, where the
    export leaves them out and timm's tag is not to be asked. Raises InputError, a ValueError, where the
    folder is not an export or its weights do not match.
    """
    folder = export_folder(folder)
    config = read_export_config(folder)
    model = build_model(config.model, config.size, config.norm)
    state = read_tensors(folder)
    if config.left_out is not None:
        state |= fill_in(model.backbone, config.model.backbone, config.left_out, folder, backbone)
        round_and_check(model.backbone, config.left_out, folder)
    elif backbone is not None:
        raise InputError(f"{folder} holds its backbone: leave out {backbone}")
    load_strictly(model, state, str(folder))
    return model.float().to(device).eval(), config


def load_weights(model: Architecture, config: ArchitectureConfig, classes: Classes | None = None) -> None:
    """Load the initial weights of a detector: `model.init_weights`, or those that the backbone section names.

    `model.init_weights` is the folder of an export, its model.safetensors, or a file of another project
    (`architectures/foreign`), under any prefix (`layers/weight_names.py`). The rows of layers that belong to
    classes are taken over by name where both sides have names: `classes` are those of the run. Otherwise
    such a layer is taken over if it has as many classes. A part such as the mask head may be missing. What
    is taken over and what starts with new weights is printed.
    Raises InputError, a ValueError, that lists every key, for any other mismatch.
    """
    if config.init_weights is None:
        load_backbone_weights(model.backbone, config.backbone)
        return
    path = Path(config.init_weights)
    expected = model.state_dict()
    tensors = read_tensors(config.init_weights)
    tensors = model_tensors(tensors, expected, translate, str(path))
    state = dict(from_project(tensors, model, config, str(path)))
    if not any(key in expected for key in state):
        raise InputError(
            f"{path} has no tensor named as in {config.type}; if these are weights of a backbone, give "
            "them in model.backbone.init_weights"
        )
    folder = path if path.is_dir() else path.parent
    known = classes_of(tensors)
    if project_of(tensors) is None and (folder / CONFIG).is_file():
        export = read_export_config(folder)
        known = export.classes
        if export.left_out is not None:
            state |= fill_in(model.backbone, config.backbone, export.left_out, path)
    by_kind = _transfers(known, classes)
    fresh: list[str] = []
    for layer in model.class_layers():
        for key in [key for key in state if key.startswith(layer.prefix) and key in expected]:
            if layer.kind in by_kind and known is not None:
                others = by_kind[layer.kind].others
                state[key] = rows_by_name(layer, state[key], _initial(model, key), others)
            elif state[key].shape != expected[key].shape:
                state[key] = _initial(model, key)
                fresh.append(key)
    for kind, found in by_kind.items():
        if found.renamed:
            names = ", ".join(f"{name!r} from {other!r}" for name, other in found.renamed)
            logger.warning("%s: classes of %s taken over under other names: %s", path, kind, names)
        if found.fresh:
            taken = ", ".join(found.taken) or "none"
            new = ", ".join(found.fresh)
            logger.warning("%s: classes of %s taken over: %s; new weights for: %s", path, kind, taken, new)
    if fresh:
        logger.warning("%s: trained on other classes; new weights for: %s", path, ", ".join(fresh))
    if untrained := model.add_optional_parts(state):
        logger.warning("%s has no %s; new weights for it", path, ", ".join(untrained))
    load_strictly(model, state, str(path))


def _initial(model: Architecture, key: str) -> Tensor:
    """Return the values that a parameter was initialised with; a deferred one is allocated for that."""
    parameter = model.get_parameter(key)
    return (materialise(parameter, key) if is_deferred(parameter) else parameter).detach()


def _transfers(known: Classes | None, classes: Classes | None) -> dict[ClassKind, Transfer]:
    """Return how each kind of classes is taken over where both sides have names."""
    if known is None or classes is None:
        return {}
    kinds: tuple[ClassKind, ...] = ("objects", "semantic", "stuff")
    return {
        kind: transfer(getattr(known, kind), getattr(classes, kind))
        for kind in kinds
        if getattr(known, kind) and getattr(classes, kind)
    }
