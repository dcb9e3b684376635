"""The sections for DeepSpeed's keys against what the installed DeepSpeed reads."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from giantdet.config.classes import Classes
from giantdet.config.deepspeed import AutoSection
from giantdet.config.deepspeed import DeepSpeedConfig as Ours
from giantdet.config.load import load_run
from giantdet.config.resolve import resolve
from giantdet.config.section import Section
from giantdet.config.unsupported import UNSUPPORTED

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed, so there is nothing to compare with")

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

RECIPES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))

MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "comms_logger": CommsLoggerConfig,
    "tensorboard": TensorBoardConfig,
    "csv_monitor": CSVConfig,
    "wandb": WandbConfig,
    "comet": CometConfig,
    "compile": CompileConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
}


class Recorder(dict):  # type: ignore[type-arg]
    """A dict that records which of its keys were accessed."""

    def __init__(self, *args: Any, seen: set[str]) -> None:
        super().__init__(*args)
        self.seen = seen

    def __copy__(self) -> Recorder:
        return Recorder(self, seen=self.seen)

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self


def test_top_level_keys() -> None:
    seen: set[str] = set()
    # These are only accessed if others are present.
    given = {"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {}}}
    DeepSpeedConfig(Recorder(given, seen=seen))
    assert set(Ours.model_fields) <= seen, "keys that DeepSpeed does not read"
    ours = set(Ours.model_fields) | set(UNSUPPORTED)
    assert seen - ours <= {"sequence_parallel_size", "model_info"}, "keys of DeepSpeed that we do not know"
    assert set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(UNSUPPORTED)


def names_of(model: type[BaseModel], path: str) -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        yield f"{path}.{field.alias or name}", field.annotation
        for candidate in (field.annotation, *typing.get_args(field.annotation)):
            if inspect.isclass(candidate) and issubclass(candidate, BaseModel):
                yield from names_of(candidate, f"{path}.{field.alias or name}")


def section_of(block: str) -> type[Section]:
    found: Any = Ours
    for name in block.split("."):
        found = found.model_fields[name].annotation
    assert issubclass(found, Section)
    return found


def kinds_of(annotation: Any) -> set[Any]:
    """Return the types that our field accepts, without None and "auto"."""
    choices = {annotation, *typing.get_args(annotation)}
    return {kind for kind in choices if kind in (bool, int, float, str)}


@pytest.mark.parametrize("block", MODELS)
def test_nested_keys_and_types(block: str) -> None:
    theirs = dict(names_of(MODELS[block], block))
    ours = dict(names_of(section_of(block), block))
    assert set(ours) <= set(theirs), "keys that DeepSpeed would refuse"
    refused = {name for name in theirs if any(name == u or name.startswith(u + ".") for u in UNSUPPORTED)}
    assert set(theirs) - set(ours) == refused, "keys of DeepSpeed that we neither accept nor refuse"
    for name, expected in ours.items():
        for kind in kinds_of(expected):
            choices = {theirs[name], *typing.get_args(theirs[name])}
            assert kind in choices or (kind is str and "Path" in str(choices)), name


@pytest.mark.parametrize("block", MODELS)
def test_defaults_equal_deepspeeds(block: str) -> None:
    """The typed value of a missing key equals DeepSpeed's default."""

    def compare(ours: type[BaseModel], theirs: type[BaseModel], path: str) -> None:
        fields = {field.alias or name: field for name, field in theirs.model_fields.items()}
        for name, field in ours.model_fields.items():
            mine = field.default
            default = fields[name].get_default(call_default_factory=True)
            if isinstance(mine, BaseModel):
                if isinstance(default, BaseModel):
                    compare(type(mine), type(default), f"{path}.{name}")
            elif not isinstance(default, list | dict):
                assert mine == getattr(default, "value", default), f"{path}.{name}"

    compare(section_of(block), MODELS[block], block)


def test_blocks_without_models() -> None:
    assert set(section_of("aio").model_fields) == set(AIO_DEFAULT_DICT)
    seen: set[str] = set()
    DeepSpeedFlopsProfilerConfig({"flops_profiler": Recorder({}, seen=seen)})
    assert set(section_of("flops_profiler").model_fields) == seen
    for block in ("torch_autocast", "data_types", "checkpoint"):
        seen = set()
        content = (
            {"writer": None}
            if block == "checkpoint"
            else {"dtype": "bf16", "lower_precision_safe_modules": []}
        )
        content = content if block != "data_types" else {}
        DeepSpeedConfig({"train_batch_size": 1, block: Recorder(content, seen=seen)})
        assert set(section_of(block).model_fields) == seen


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_deepspeed_accepts_resolved_recipes(recipe: Path) -> None:
    run = resolve(
        load_run(recipe), world_size=1, train_images=100_000, classes=Classes.numbered(80, 54), has_gpu=False
    )
    config = DeepSpeedConfig(run.deepspeed_json())
    assert config.train_batch_size == run.deepspeed["train_batch_size"]
    assert config.gradient_clipping == run.deepspeed["gradient_clipping"]
    assert config.zero_optimization_stage == run.deepspeed["zero_optimization"]["stage"]


def test_auto_blocks_drop_auto() -> None:
    blocks = [name for name, field in Ours.model_fields.items() if isinstance(field.default, AutoSection)]
    assert len(blocks) == 9
    for block in blocks:
        fields = section_of(block).model_fields
        auto = {key: "auto" for key, field in fields.items() if not isinstance(field.default, Section)}
        assert MODELS[block](**auto) == MODELS[block]()
        assert section_of(block).model_validate(auto) == section_of(block)()
