"""Trackers (TensorBoard, W&B, Comet, CSV): what DeepSpeed's monitors, which write only scalars, do not do.

DeepSpeed creates a monitor on the main rank for each block of the JSON that is enabled. Their x is the number
of images that the run has trained on, for pictures too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from giantdet.architectures import Architecture
from giantdet.config.classes import Classes
from giantdet.config.resolve import describe
from giantdet.config.resolved import ResolvedRun
from giantdet.data.dataset import Dataset
from giantdet.data.records import logger
from giantdet.distributed import comm
from giantdet.engine.draw import draw
from giantdet.engine.found import Found
from giantdet.engine.predict import Predictor
from giantdet.errors import ConfigError, DataError
from giantdet.evaluation.semantic import SemanticMaps
from giantdet.export import export_config
from giantdet.structures import Batch, Outputs

PICTURES = 4
"""Number of validation images that are shown."""
THRESHOLD = 0.5
"""Lowest score of the detections in them, the default of `giantdet predict`."""
_SIDE = 1024  # pixels of the longer side, at most

Show = Callable[[Any, str, Image.Image, int], None]
"""From a monitor of DeepSpeed, a name, a picture and its x."""
Configure = Callable[[Any, dict[str, Any]], None]
"""From a monitor of DeepSpeed and the resolved JSON."""


def _to_tensorboard(monitor: Any, name: str, picture: Image.Image, x: int) -> None:
    monitor.summary_writer.add_image(name, np.asarray(picture), x, dataformats="HWC")
    monitor.flush()


def _to_wandb(monitor: Any, name: str, picture: Image.Image, x: int) -> None:
    import wandb

    monitor.log({name: wandb.Image(picture)}, step=x)


def _to_comet(monitor: Any, name: str, picture: Image.Image, x: int) -> None:
    monitor.experiment.log_image(picture, name=name, step=x)


def _tensorboard_config(monitor: Any, config: dict[str, Any]) -> None:
    lines = json.dumps(config, indent=2).splitlines()
    monitor.summary_writer.add_text("giantdet/config", "\n".join(f"    {line}" for line in lines))  # Markdown


def _wandb_config(monitor: Any, config: dict[str, Any]) -> None:
    import wandb

    wandb.config.update(config, allow_val_change=True)  # a W&B run that is continued has them already


def _comet_config(monitor: Any, config: dict[str, Any]) -> None:
    monitor.experiment.log_parameters(config)


class Tracker(NamedTuple):
    """A monitor of DeepSpeed."""

    attribute: str
    """Its name in `MonitorMaster`."""
    package: str | None = None
    """The package that it needs."""
    show: Show | None = None
    """How it takes a picture; None: it shows none."""
    configure: Configure | None = None
    """How it takes the settings of the run."""
    folder: str | None = None
    """The environment variable with the folder of its files; None: DeepSpeed's JSON names it."""


TRACKERS = {
    "tensorboard": Tracker("tb_monitor", "tensorboard", _to_tensorboard, _tensorboard_config),
    "wandb": Tracker("wandb_monitor", "wandb", _to_wandb, _wandb_config, "WANDB_DIR"),
    "comet": Tracker("comet_monitor", "comet_ml", _to_comet, _comet_config, "COMET_OFFLINE_DIRECTORY"),
    "csv_monitor": Tracker("csv_monitor"),
}
"""By the name of their block in the JSON."""


def prepare_trackers(run: ResolvedRun) -> None:
    """Let the trackers of a run write to its folder, unless their environment variables name another.

    Raises ConfigError if the package of one is missing.
    """
    for name in run.monitors:
        tracker = TRACKERS[name]
        if tracker.package is not None and find_spec(tracker.package) is None:
            raise ConfigError(
                f"{name}.enabled needs the package {tracker.package}: pip install {tracker.package}"
            )
        if tracker.folder is not None:
            os.environ.setdefault(tracker.folder, run.giantdet.train.output)


def write_config(run: ResolvedRun, monitor: Any) -> None:
    """Give the trackers the resolved JSON, without Comet's block, which may have a key. Main rank only."""
    config = json.loads(describe(run))
    config.pop("comet", None)
    for name in run.monitors:
        tracker = TRACKERS[name]
        if tracker.configure is not None:
            tracker.configure(getattr(monitor, tracker.attribute), config)


class ValidationPictures:
    """The same few images at each evaluation, with what the model finds in them.

    They are drawn from the outputs that the evaluation scores: at ZeRO-3 another forward pass would need all
    ranks.
    """

    def __init__(self, run: ResolvedRun, monitor: Any, dataset: Dataset, predictor: Predictor) -> None:
        self.shown = [
            (getattr(monitor, TRACKERS[name].attribute), TRACKERS[name].show) for name in run.monitors
        ]
        self.dataset, self.predictor = dataset, predictor
        chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), PICTURES)).astype(int).tolist()
        self.index = {int(dataset.image_ids[i]): i for i in chosen}
        self.names = {
            int(dataset.image_ids[i]): f"giantdet/val/{number}_{Path(dataset.path(i)).stem}"
            for number, i in enumerate(chosen, 1)
        }
        self.maps = SemanticMaps()
        self.found: dict[int, Found] = {}

    def add(self, outputs: Outputs, batch: Batch) -> None:
        """Keep what was found in those images of a batch that are shown."""
        if not self.index.keys().isdisjoint(batch.image_ids_B.tolist()):
            self.found |= dict(self.predictor.found_in(outputs, batch, self.maps, THRESHOLD))

    def merge(self) -> None:
        """Collect the images of all ranks on the main rank. All ranks call it."""
        parts = comm.gather_objects({i: found for i, found in self.found.items() if i in self.index})
        self.found = {i: found for part in parts for i, found in part.items()}

    def write(self, images_seen: int) -> None:
        """Draw the images and hand them to the trackers. Main rank only."""
        for image_id, found in sorted(self.found.items()):
            index = self.index[image_id]
            try:
                picture = draw(self.dataset.read_image(index), found)
            except DataError as error:
                logger.warning("no picture for the trackers: %s", error)
                continue
            picture.thumbnail((_SIDE, _SIDE))
            for monitor, show in self.shown:
                if show is not None:
                    show(monitor, self.names[image_id], picture, images_seen)
        self.found = {}


def validation_pictures(
    run: ResolvedRun, monitor: Any, dataset: Dataset | None, model: Architecture
) -> ValidationPictures | None:
    """Return the validation pictures of a run, or None if none of its trackers shows any."""
    if dataset is None or not any(TRACKERS[name].show for name in run.monitors):
        return None
    predictor = Predictor(model, export_config(run, run.giantdet.data.classes or Classes()))
    return ValidationPictures(run, monitor, dataset, predictor)
