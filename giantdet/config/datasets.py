"""The sections `data.train` and `data.val`, one type for each format of data sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field

from giantdet.config.section import PathText, PositiveFloat, Section, tagged_union


class Source(NamedTuple):
    """A file or folder that a data set is read from."""

    key: str
    path: Path
    is_folder: bool = False


class BaseDatasetConfig(Section):
    """Keys of every format."""

    format: str
    images: PathText
    """Folder of the images."""
    weight: PositiveFloat | None = None
    """In a list of `data.train`: share of the training samples from this data set, relative to the weights of
    the others. Give all of them a weight, or none: then each image is seen once per epoch."""

    def sources(self) -> Iterator[Source]:
        """Yield the files and folders that must exist."""
        raise NotImplementedError


class InstancesConfig(BaseDatasetConfig):
    """Keys of objects in COCO's instances format and those like it."""

    annotations: PathText
    """A JSON file of annotations in this format."""
    images: PathText
    """Folder that the file names in the annotations are relative to."""

    def sources(self) -> Iterator[Source]:
        """See `BaseDatasetConfig.sources`."""
        yield Source("annotations", Path(self.annotations))
        yield Source("images", Path(self.images), is_folder=True)


class CocoDatasetConfig(InstancesConfig):
    """Objects in COCO's instances format."""

    format: Literal["coco"] = "coco"


class LvisDatasetConfig(InstancesConfig):
    """Objects in LVIS's format, whose images are annotated for some of their categories only, and are scored
    by LVIS's rules. `images` is the folder that has COCO's folders train2017 and val2017."""

    format: Literal["lvis"]


class CocoPanopticDatasetConfig(BaseDatasetConfig):
    """Segments in COCO's panoptic format: objects ("things") with masks, and semantic maps of stuff."""

    format: Literal["coco_panoptic"]
    annotations: PathText
    """A JSON file of annotations in COCO's panoptic format."""
    images: PathText
    """Folder that the file names of the images are relative to."""
    segments: PathText | None = None
    """Folder of the PNG files of segments. null: the path of `annotations` without .json, as in COCO."""
    instances: PathText | None = None
    """A JSON file in COCO's instances format with the objects of the same images. Unlike segments, its masks
    may overlap. null: the objects are the segments of things."""

    @property
    def segments_folder(self) -> Path:
        """The folder of the PNG files of segments."""
        return Path(self.annotations).with_suffix("") if self.segments is None else Path(self.segments)

    def sources(self) -> Iterator[Source]:
        """See `BaseDatasetConfig.sources`."""
        yield Source("annotations", Path(self.annotations))
        yield Source("images", Path(self.images), is_folder=True)
        yield Source("segments", self.segments_folder, is_folder=True)
        if self.instances is not None:
            yield Source("instances", Path(self.instances))


class SemanticPngDatasetConfig(BaseDatasetConfig):
    """Semantic maps: a folder of images, and a folder of PNG files with the label of each pixel.

    A label is a number, in a grey or palette PNG, or a colour, in an RGB one; see `data/semantic_png.py`.
    Subfolders are searched too.
    """

    format: Literal["semantic_png"]
    images: PathText
    labels: PathText
    """Folder of the PNG files of labels."""
    classes: PathText | tuple[str, ...]
    """Names of the classes, by label from 0, or a file of them: a JSON list of names, or of objects with
    `name` and `id` (`train_id`, `trainId`) or `color`; or a text file with one name per line, with `R G B
    name` per line (CamVid), or ADE20K's objectInfo150.txt."""
    image_suffix: str = ""
    """Ending of image names before the extension that names of labels do not have: "_leftImg8bit"."""
    label_suffix: str = ""
    """The same for names of labels: "_gtFine_labelTrainIds"."""
    reduce_zero_label: bool = False
    """Label 0 means "no label", and the classes are numbered from 1 (ADE20K)."""
    ignore: tuple[int | str, ...] = (255,)
    """Labels without a class, as numbers; classes and colours that are not trained, by name. Any label that
    is neither a class nor one of these is an error."""

    def sources(self) -> Iterator[Source]:
        """See `BaseDatasetConfig.sources`."""
        yield Source("images", Path(self.images), is_folder=True)
        yield Source("labels", Path(self.labels), is_folder=True)
        if isinstance(self.classes, str):
            yield Source("classes", Path(self.classes))


FORMATS: dict[str, type[BaseDatasetConfig]] = {
    "coco": CocoDatasetConfig,
    "lvis": LvisDatasetConfig,
    "coco_panoptic": CocoPanopticDatasetConfig,
    "semantic_png": SemanticPngDatasetConfig,
}
"""The sections of data sets by the name in `format`; `data/dataset.py` has their readers."""

# A data set of any format. Type checkers see the fields that all share.
if TYPE_CHECKING:
    DatasetConfig = BaseDatasetConfig
    DatasetConfigs = BaseDatasetConfig | tuple[BaseDatasetConfig, ...]
else:
    DatasetConfig = tagged_union(FORMATS, "format", "coco")
    _List = Annotated[tuple[DatasetConfig, ...], Field(min_length=1)]
    DatasetConfigs = tagged_union(FORMATS, "format", "coco", lists=_List)
"""One data set, or a list of several that are joined (data/joined.py)."""


def sections(config: DatasetConfigs) -> list[tuple[str, BaseDatasetConfig]]:
    """Return each section of `data.train` or `data.val` with its key in a list: "" for one, ".0", ".1"."""
    if isinstance(config, BaseDatasetConfig):
        return [("", config)]
    return [(f".{n}", section) for n, section in enumerate(config)]
