"""The whole detector against torchvision's Mask R-CNN: same weights, pixels, boxes, masks and losses.

No trained detector is available, so the weights are random, with batch norms calibrated on the images and
predictors scaled until scores and deltas spread: thousands of proposals, a hundred detections per image.

detectron2's conventions (our defaults) differ on purpose; the last two tests measure by how much: unrounded
anchors and strides, no anchor centred in the padding, RoIAlign's half pixel. The losses (L1 instead of smooth
L1, normalisers) are tested in both conventions in `tests/architectures/test_losses.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from pasting import paste_masks
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d

from giantdet.architectures import build_model
from giantdet.architectures.foreign.torchvision import TORCHVISION, from_torchvision
from giantdet.architectures.mask_rcnn import MaskRcnn, mask_rcnn_losses
from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig
from giantdet.config.conventions import CONVENTIONS
from giantdet.config.types import DataConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.samples import collate, make_sample
from giantdet.data.streams import BOXES_AND_MASKS
from giantdet.data.transforms import Geometry
from giantdet.layers.roi_pool import RoiMaps
from giantdet.layers.weights import load_strictly
from giantdet.structures import Batch, Detections

# Not multiples of 64: P6 has 6 columns, of 58 pixels for torchvision and of 64 for detectron2.
HEIGHT, WIDTH = 288, 352
CLASSES = 90
SLOTS = 24
NAMES = {
    "loss_rpn_cls": "loss_objectness",
    "loss_rpn_loc": "loss_rpn_box_reg",
    "loss_cls": "loss_classifier",
    "loss_box_reg": "loss_box_reg",
    "loss_mask": "loss_mask",
}


class Scene(NamedTuple):
    """Two crops at scale 1 that fill the canvas, and their objects' full bitmaps."""

    batch: Batch
    bitmaps: list[Tensor]


@pytest.fixture(scope="module")
def scene(shared: Path) -> Scene:
    data = shared / "data" / "coco_panoptic200"
    dataset = CocoDataset(data / "annotations" / "instances_val.json", data / "images")
    config = DataConfig(size=(HEIGHT, WIDTH), max_objects=SLOTS, mask_frame=WIDTH + 2)
    samples, bitmaps = [], []
    for i in range(len(dataset)):
        height, width = map(int, dataset.sizes_hw[i])
        if height < HEIGHT + 40 or width < WIDTH + 40:
            continue
        geometry = Geometry((height, width), (height, width), (40, 40), (HEIGHT, WIDTH), flip=False)
        sample = make_sample(dataset, i, i, config, geometry, targets=BOXES_AND_MASKS)
        if not 3 <= len(sample.boxes_N4) <= SLOTS:
            continue
        full = dataset.objects(i).masks()[:, 40 : 40 + HEIGHT, 40 : 40 + WIDTH]
        boxes = dataset.objects(i).boxes_N4 - np.float32(40)
        boxes = boxes.clip(0, np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], np.float32))
        inside = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
        assert np.array_equal(boxes[inside], sample.boxes_N4.astype(np.float32))
        samples.append(sample)
        bitmaps.append(torch.from_numpy(full[inside].astype(np.uint8)))
        if len(samples) == 2:
            break
    return Scene(collate(samples, SLOTS, config.mask_frame), bitmaps)


def without_objects(scene: Scene, b: int) -> Scene:
    """The same scene without the objects of image `b`."""
    keep_B = torch.arange(len(scene.bitmaps)) != b
    targets = scene.batch.targets._replace(
        **{
            name: value * keep_B.view(-1, *[1] * (value.ndim - 1)).to(value.dtype)
            for name, value in scene.batch.targets._asdict().items()
        }
    )
    bitmaps = [m if i != b else m[:0] for i, m in enumerate(scene.bitmaps)]
    return Scene(scene.batch._replace(targets=targets), bitmaps)


def pixels_of(batch: Batch) -> Tensor:
    """Return the images with torchvision's own normalisation."""
    transform = GeneralizedRCNNTransform(HEIGHT, WIDTH, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return torch.stack([transform.normalize(image / 255) for image in batch.images_B3HW])


def calibrate(model: MaskRCNN, pixels: Tensor) -> None:
    """Set random weights that give reasonable activations and spread predictions."""
    for name, norm in model.backbone.named_modules():
        if isinstance(norm, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            # Small residual branches, as in trained networks: large random ones amplify rounding so much that
            # torchvision's own scores change by 2e-4 when its pixels change by a relative 3e-7.
            low, high = (0.1, 0.3) if name.endswith("bn3") else (0.5, 1.5)
            nn.init.uniform_(norm.weight, low, high)
            nn.init.normal_(norm.bias, std=0.2 * high)

    def statistics(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        norm.running_var.copy_(inputs[0].var((0, 2, 3)))

    def spread(std: float) -> Any:
        def hook(layer: Any, inputs: Any, output: Tensor) -> None:
            if not hasattr(layer, "spread") and len(output) > 0:
                layer.spread = True
                channels = output.movedim(1, -1).flatten(
                    0, -2
                )  # each is centred and scaled, otherwise a few would dominate
                scale = std / channels.std(0)
                layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
                layer.bias.copy_(-channels.mean(0) * scale)

        return hook

    norms = [m for m in model.backbone.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))]
    handles = [norm.register_forward_pre_hook(statistics) for norm in norms]
    predictor, mask_predictor = model.roi_heads.box_predictor, model.roi_heads.mask_predictor
    for layer, std in (
        (model.rpn.head.cls_logits, 1.5),
        (model.rpn.head.bbox_pred, 0.15),
        (predictor.cls_score, 1.7),
        (predictor.bbox_pred, 1.0),
        (mask_predictor.mask_fcn_logits, 2.0),
    ):
        handles.append(layer.register_forward_hook(spread(std)))
    model.eval()
    with torch.no_grad():
        for _ in range(2):  # before the scores spread there are no detections and no masks
            run_torchvision(model, pixels)
    for handle in handles:
        handle.remove()


def run_torchvision(
    model: MaskRCNN, pixels: Tensor, targets: Any = None
) -> tuple[list[Tensor], list[dict[str, Tensor]], dict[str, Tensor]]:
    """Return proposals, detections and losses of the parts, on normalised pixels."""
    images = ImageList(pixels, [(HEIGHT, WIDTH)] * len(pixels))
    features = model.backbone(pixels)
    proposals, rpn_losses = model.rpn(images, features, targets)
    detections, losses = model.roi_heads(features, proposals, images.image_sizes, targets)
    return proposals, detections, rpn_losses | losses


def model_config(**changes: Any) -> MaskRcnnConfig:
    sections: dict[str, dict[str, Any]] = {
        "rpn": {"pre_nms_train": 2000, "pre_nms_test": 1000, "post_nms_train": 2000, "post_nms_test": 1000},
        "mask_head": {},
        "box_head": {},
    }
    conventions = changes.pop("conventions", "torchvision")
    for path, value in changes.items():
        section, _, key = path.partition("__")
        sections[section][key] = value
    return MaskRcnnConfig(num_classes=CLASSES, conventions=conventions, **sections)


def converted(model: MaskRCNN, **changes: Any) -> MaskRcnn:
    detector = build_model(model_config(**changes), (HEIGHT, WIDTH))
    assert TORCHVISION.recognises(model.state_dict())
    load_strictly(detector, from_torchvision(model.state_dict()), "torchvision's weights")
    return detector.eval()


@pytest.fixture(scope="module")
def reference(scene: Scene) -> MaskRCNN:
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    calibrate(model, pixels_of(scene.batch))
    return model


def assert_same_boxes(ours_N4: Tensor, theirs_N4: Tensor) -> Tensor:
    """Assert that the boxes are the same up to swaps of neighbours; return the ranks of ours.

    Equal scores may swap: torchvision ranks proposals by the sigmoid, whose float32 has ties, unlike
    logits.
    """
    assert len(ours_N4) == len(theirs_N4)
    nearest_N, rank_N = torch.cdist(theirs_N4, ours_N4, p=torch.inf).min(1)
    assert (nearest_N < 1e-2).all(), f"{(nearest_N >= 1e-2).sum()} boxes differ"
    assert len(rank_N.unique()) == len(rank_N)
    moved_N = (rank_N - torch.arange(len(rank_N))).abs()
    assert moved_N.max() <= 3 and (moved_N > 0).float().mean() < 0.05
    return rank_N


def test_pixels(scene: Scene, reference: MaskRCNN) -> None:
    ours = converted(reference).normalise(scene.batch.images_B3HW, scene.batch.sizes_B2)
    torch.testing.assert_close(ours, pixels_of(scene.batch), atol=1e-5, rtol=0)


@torch.no_grad()
def test_proposals(scene: Scene, reference: MaskRCNN) -> None:
    detector = converted(reference)
    batch = scene.batch
    levels = detector.fpn(detector.backbone(pixels_of(batch)))
    for ours, theirs in zip(levels, reference.backbone(pixels_of(batch)).values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    for training, at_least in ((False, 800), (True, 1000)):
        detector.rpn.training = reference.rpn.training = training
        proposals, _ = detector.rpn(levels, batch.sizes_B2, None, batch.seeds_B)
        images = ImageList(pixels_of(batch), [(HEIGHT, WIDTH)] * 2)
        reference.rpn.training = False  # training mode needs targets; only the numbers of boxes differ
        reference.rpn._pre_nms_top_n["testing"] = 2000 if training else 1000
        reference.rpn._post_nms_top_n["testing"] = 2000 if training else 1000
        expected, _ = reference.rpn(images, reference.backbone(pixels_of(batch)))
        for b, boxes_N4 in enumerate(expected):
            ours_N4 = proposals.boxes_BN4[b][proposals.valid_BN[b]]
            assert len(ours_N4) == len(boxes_N4) > at_least
            assert_same_boxes(ours_N4, boxes_N4)
    reference.rpn._pre_nms_top_n["testing"] = reference.rpn._post_nms_top_n["testing"] = 1000


@torch.no_grad()
def test_detections_and_masks(scene: Scene, reference: MaskRCNN) -> None:
    detector, batch = converted(reference), scene.batch
    reference.eval()
    found: Detections = detector(batch).detections
    _, expected, _ = run_torchvision(reference, pixels_of(batch))
    assert found.masks_BDSS is not None
    for b, theirs in enumerate(expected):
        count = len(theirs["boxes"])
        assert count == int(found.valid_BD[b].sum()) >= 50
        assert len(theirs["labels"].unique()) > 5
        torch.testing.assert_close(found.scores_BD[b, :count], theirs["scores"], atol=1e-4, rtol=0)
        # The label distinguishes equal boxes of two classes.
        rank_D = assert_same_boxes(
            found.boxes_BD4[b, :count] + 1e4 * (found.labels_BD[b, :count, None] + 1),
            theirs["boxes"] + 1e4 * theirs["labels"][:, None],
        )
        found = found._replace(boxes_BD4=found.boxes_BD4[:, rank_D], masks_BDSS=found.masks_BDSS[:, rank_D])
        soft = paste_masks_in_image(theirs["masks"], theirs["boxes"], (HEIGHT, WIDTH))[:, 0]
        pasted = paste_masks(
            found.masks_BDSS[b, :count], found.boxes_BD4[b, :count], HEIGHT, WIDTH, at_pixel_centres=False
        )
        assert 0.01 < (soft > 0.5).float().mean() < 0.9  # masks are neither empty nor full
        differs = (pasted != (soft > 0.5)).sum() / (soft > 0.5).sum()
        assert differs < 1e-4, f"{differs:.2e} of the masks' pixels"


def torchvision_targets(scene: Scene) -> list[dict[str, Tensor]]:
    targets = scene.batch.targets
    return [
        {
            "boxes": targets.boxes_BM4[b][targets.valid_BM[b]],
            "labels": targets.labels_BM[b][targets.valid_BM[b]] + 1,
            "masks": scene.bitmaps[b],
        }
        for b in range(len(scene.bitmaps))
    ]


def exhaustive(reference: MaskRCNN, slots: int, **changes: Any) -> MaskRcnn:
    """A model that samples all anchors and RoIs: all positives, and all remaining negatives."""
    everything: dict[str, Any] = {
        "rpn__batch_per_image": 10**6,
        "rpn__positive_fraction": 1.0,
        "box_head__batch_per_image": 10**4,
        "box_head__positive_fraction": 1.0,
        "mask_head__slots": slots,
    }
    for sampler in (reference.rpn.fg_bg_sampler, reference.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image, sampler.positive_fraction = 10**6, 1.0
    detector = converted(reference, **(everything | changes))
    detector.train()
    reference.train()
    reference.backbone.eval()  # its norms are BatchNorm2d, ours are frozen
    return detector


@pytest.mark.parametrize("empty", [None, 1])
@torch.no_grad()
def test_losses(scene: Scene, reference: MaskRCNN, empty: int | None) -> None:
    slots = 64
    detector = exhaustive(reference, slots)
    if empty is not None:
        scene = without_objects(scene, empty)
    predictions = detector(scene.batch)
    _, _, expected = run_torchvision(reference, pixels_of(scene.batch), torchvision_targets(scene))
    positives_B = predictions.box.positive_BR.sum(1)
    objects_B = scene.batch.targets.valid_BM.sum(1)
    assert positives_B.max() <= slots and positives_B.sum() > objects_B.sum() >= 3, positives_B
    assert empty is None or positives_B[empty] == 0
    losses = mask_rcnn_losses(predictions, CONVENTIONS["torchvision"])
    assert losses.keys() == NAMES.keys()
    for name, theirs in NAMES.items():
        assert expected[theirs] > 1e-4  # small if the divisor is the number of anchors
        torch.testing.assert_close(losses[name], expected[theirs], atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_backbone_of_published_weights(scene: Scene) -> None:
    """torchvision's COCO weights have frozen norms with epsilon 0, which matters if a variance is small."""
    torch.manual_seed(1)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=lambda c: FrozenBatchNorm2d(c, eps=0.0)
    )
    model = MaskRCNN(backbone, 91)
    pixels = pixels_of(scene.batch)
    calibrate(model, pixels)
    for name, value in model.backbone.state_dict().items():
        if name.endswith("bn1.running_var"):
            value[::2] = 3e-5
        if name.endswith("bn1.weight"):
            value[::2] *= 3e-3
    expected = model.backbone(pixels).values()
    errors = []
    for norm_eps in (None, 1e-5):
        detector = build_model(model_config(), (HEIGHT, WIDTH)).eval()
        load_strictly(detector, from_torchvision(model.state_dict(), norm_eps), "torchvision's weights")
        levels = detector.fpn(detector.backbone(pixels))
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in zip(levels, expected, strict=True)))
    assert errors[0] < 1e-5 and errors[1] > 1e-3, errors


@torch.no_grad()
def test_detectron2_conventions_differ(reference: MaskRCNN) -> None:
    """torchvision rounds anchors, uses image // grid as the stride, and keeps anchors in the padding."""
    detector, theirs = converted(reference, conventions="detectron2"), converted(reference)
    anchors = [torch.cat(d.rpn.anchors(_grids())) for d in (detector, theirs)]
    moved = (anchors[0] - anchors[1]).abs().max(1).values
    assert 0.3 < moved[:-90].max() < 0.5  # rounded corners
    assert 25 < moved[-90:].max() < 70  # P6, with a stride of 58 or 57 instead of 64
    half = torch.tensor([[HEIGHT, WIDTH / 2]])
    for rpn, share in ((detector.rpn, 0.5), (theirs.rpn, 0.0)):
        outside = torch.cat([rpn._outside(a, half) for a in rpn.anchors(_grids())], 1)
        assert float(outside.float().mean()) == pytest.approx(share, abs=0.01)


@torch.no_grad()
def test_roi_align_conventions_differ(scene: Scene, reference: MaskRCNN) -> None:
    """Features of the annotated objects change by the half pixel (0.23 of their norm), and by one sampling
    point per cell (adaptive, detectron2's own default) instead of two per bin (0.07).
    """
    batch, theirs = scene.batch, converted(reference)
    maps = RoiMaps(theirs.fpn(theirs.backbone(pixels_of(batch))))
    boxes_BM4 = batch.targets.boxes_BM4
    valid_K = batch.targets.valid_BM.flatten()
    ours = converted(reference, conventions="detectron2")
    expected = theirs.pool(maps, boxes_BM4, 7, 2)[valid_K]
    relative = lambda x, y: float((x[valid_K] - y).norm() / y.norm())  # noqa: E731
    aligned = ours.pool(maps, boxes_BM4, 7, 2)
    measured = relative(aligned, expected), relative(ours.pool(maps, boxes_BM4, 7, 0), aligned[valid_K])
    assert 0.01 < measured[0] < 0.6 and 0.001 < measured[1] < 0.3, measured


def _grids() -> list[Tensor]:
    return [torch.empty(1, 1, HEIGHT // s, WIDTH // s) for s in (4, 8, 16, 32)] + [torch.empty(1, 1, 5, 6)]
