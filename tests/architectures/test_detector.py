"""The whole detector, small: the same modules and shapes whatever images contain, and finite gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import MODEL, MODELS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_flatten
from torchvision.ops import box_iou

from giantdet.architectures import build_model, total_loss
from giantdet.architectures.mask_rcnn import Predictions, mask_rcnn_losses, sample_counts
from giantdet.config.architectures import SECTIONS
from giantdet.config.architectures.common import NormConfig
from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig
from giantdet.config.conventions import CONVENTIONS
from giantdet.config.types import DataConfig
from giantdet.data.coco import CocoDataset
from giantdet.data.coco_panoptic import CocoPanopticDataset
from giantdet.data.demo import make_demo
from giantdet.data.loader import train_loader
from giantdet.data.streams import BOXES_AND_MASKS
from giantdet.ops import shapes
from giantdet.structures import IGNORE, Batch, Detections

CANVAS = (64, 64)
SLOTS = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    folder = tmp_path_factory.mktemp("demo")
    make_demo(folder, train_images=8, val_images=1, size=64)
    return CocoDataset(folder / "train.json", folder / "train")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> CocoPanopticDataset:
    """A data set with everything that any architecture needs."""
    folder = tmp_path_factory.mktemp("scenes")
    make_demo(folder, train_images=8, val_images=1, size=64)
    return CocoPanopticDataset(folder / "panoptic_train.json", folder / "train", folder / "panoptic_train")


def load(dataset: CocoDataset, slots: int = SLOTS, images: int = 2) -> Batch:
    """A batch by the real loader."""
    return next(loader_of(dataset, slots, images))


def loader_of(dataset: CocoDataset, slots: int, images: int) -> Any:
    config = DataConfig(
        size=CANVAS, short_side=64, max_objects=slots, mask_frame=66, workers=0, augment={"flip": 0.0}
    )
    targets = BOXES_AND_MASKS | ({"semantic"} if dataset.classes.semantic else set())
    return train_loader(dataset, config, batch=images, seed=3, targets=targets)


def emptied(batch: Batch, *which: int) -> Batch:
    """Return the batch without the objects and labelled pixels of images `which`."""
    keep_B = torch.tensor([b not in which for b in range(len(batch.images_B3HW))])
    fields = batch.targets._asdict()
    zeroed = {n: v * keep_B.view(-1, *[1] * (v.ndim - 1)).to(v.dtype) for n, v in fields.items()}
    zeroed["semantic_BHW"] = torch.where(keep_B[:, None, None], batch.targets.semantic_BHW, IGNORE)
    return batch._replace(targets=batch.targets._replace(**zeroed))


def build(seed: int = 0, norm: str = "local", kind: str = "mask_rcnn", **changes: Any) -> Any:
    """Return the small model of architecture `kind` with changes to its section."""
    torch.manual_seed(seed)
    raw = {**MODELS[kind], **dict.fromkeys(SECTIONS[kind].CLASS_KEYS, 4)}
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    config = SECTIONS[kind].model_validate(raw)
    return build_model(config, CANVAS, NormConfig.model_validate({"type": norm}))


def step(detector: Any, batch: Batch) -> dict[str, Tensor]:
    """Return the losses of a training step and leave the gradients in the detector."""
    detector.train().zero_grad()
    losses: dict[str, Tensor] = detector.losses(detector(batch), batch)
    sum(losses.values(), torch.zeros(())).backward()
    return losses


def trace(detector: Any, batch: Batch) -> list[tuple[str, tuple[Any, ...]]]:
    """Return the modules in the order of their calls, with shapes and dtypes of all outputs."""
    calls: list[tuple[str, tuple[Any, ...]]] = []

    def hook(name: str) -> Any:
        def record(module: Any, inputs: Any, output: Any) -> None:
            leaves = (leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor))
            calls.append((name, tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)))

        return record

    handles = [m.register_forward_hook(hook(name)) for name, m in detector.named_modules()]
    step(detector, batch)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("kind", MODELS)
def test_modules_and_shapes_do_not_depend_on_the_images(
    scenes: CocoPanopticDataset, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "ENABLED", False)  # as on a GPU
    detector = build(kind=kind)
    full = load(scenes, images=3)
    assert full.targets.valid_BM[0].any()
    half = full._replace(sizes_B2=torch.tensor([[64.0, 64.0], [33.0, 40.0], [1.0, 1.0]]))
    expected = trace(detector, full)
    assert len(expected) > 30
    for batch in (emptied(full, 0), emptied(full, 0, 1, 2), emptied(half, 1, 2)):
        assert trace(detector, batch) == expected


@pytest.mark.parametrize("conventions", ["detectron2", "torchvision"])
@pytest.mark.parametrize("gone", [(), (0,), (0, 1)])
def test_every_parameter_gets_a_finite_gradient(
    dataset: CocoDataset, gone: tuple[int, ...], conventions: str
) -> None:
    detector = build()
    batch = emptied(load(dataset), *gone)
    detector.train()
    predictions: Predictions = detector(batch)
    losses = mask_rcnn_losses(predictions, CONVENTIONS[conventions])
    sum(losses.values(), torch.zeros(())).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    counts = sample_counts(predictions)
    positive = [losses["loss_rpn_loc"], losses["loss_box_reg"], losses["loss_mask"]]
    if len(gone) == 2:
        assert not any(counts.values()) and not any(positive)
        assert losses["loss_rpn_cls"] > 0 and losses["loss_cls"] > 0
    else:
        assert all(counts.values()) and all(positive)
        assert predictions.mask is not None
        for b in gone:
            assert not predictions.box.positive_BR[b].any() and not predictions.mask.valid_BP[b].any()


def test_an_image_without_objects_does_not_affect_the_others(dataset: CocoDataset) -> None:
    """Predictions and targets of image 1 are the same whether image 0 has objects or not."""
    detector, batch = build(norm="frozen").train(), load(dataset)
    full, half = detector(batch), detector(emptied(batch, 0))
    leaves = [[leaf for leaf in tree_flatten(found)[0] if leaf is not None] for found in (full, half)]
    assert len(leaves[0]) > 10
    for a, b in zip(*leaves, strict=True):
        assert torch.equal(a[1], b[1])


def test_more_objects_than_slots(dataset: CocoDataset) -> None:
    everything, loader = load(dataset, 30, 4), loader_of(dataset, 2, 4)
    few = next(loader)
    objects_B = everything.targets.valid_BM.sum(1)
    assert objects_B.max() > 2
    assert few.targets.valid_BM.sum(1).tolist() == objects_B.clamp_max(2).tolist()
    assert loader.counters["dropped_objects"] == int((objects_B - 2).clamp_min(0).sum())
    for b in range(4):
        boxes_N4 = everything.targets.boxes_BM4[b][everything.targets.valid_BM[b]]
        kept_N4 = few.targets.boxes_BM4[b][few.targets.valid_BM[b]]
        area = lambda boxes: (boxes[:, 2:] - boxes[:, :2]).prod(1)  # noqa: E731
        largest = area(boxes_N4).sort(descending=True).values[: len(kept_N4)]
        torch.testing.assert_close(area(kept_N4).sort(descending=True).values, largest)
    losses = step(build(), few)
    assert all(loss.isfinite() for loss in losses.values())


def test_faster_rcnn(dataset: CocoDataset) -> None:
    detector, batch = build(mask_head={"enabled": False}), load(dataset)
    no_masks = batch.targets._replace(masks_BMSS=torch.zeros(2, SLOTS, 0, 0, dtype=torch.uint8))
    losses = step(detector, batch._replace(targets=no_masks))  # the loader's batch with masks=False
    assert losses.keys() == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
    assert not any("mask" in name for name in detector.state_dict())
    with torch.no_grad():
        found: Detections = detector.eval()(batch).detections
    assert found.masks_BDSS is None and found.valid_BD.any()


@pytest.mark.parametrize("norm", ["frozen", "local"])
@pytest.mark.parametrize("heads", ["none", "batch", "layer"])
def test_bfloat16(dataset: CocoDataset, norm: str, heads: str) -> None:
    sections: dict[str, Any] = {name: {"norm": heads} for name in ("fpn", "mask_head")}
    detector = build(norm=norm, box_head={"norm": heads, "convs": 1, "fcs": 1}, **sections)
    in_float32 = {k: float(v) for k, v in step(detector, load(dataset)).items()}
    detector.bfloat16()
    losses = step(detector, load(dataset))
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert float(loss) == pytest.approx(in_float32[name], rel=0.25, abs=0.05), name
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    with torch.no_grad():
        found: Detections = detector.eval()(load(dataset)).detections
    assert found.boxes_BD4.dtype == found.scores_BD.dtype == torch.float32
    assert all(t.isfinite().all() for t in tree_flatten(found)[0])


@pytest.mark.parametrize("kind", ["frozen", "local"])
def test_norm_type_reaches_pyramid_and_heads(kind: str) -> None:
    """A stock BatchNorm2d anywhere would raise in bf16; a new frozen norm would do nothing."""
    sections: dict[str, Any] = {name: {"norm": "batch"} for name in ("fpn", "mask_head", "box_head")}
    sections["box_head"] |= {"convs": 1, "fcs": 1}
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for name, module in build(norm=kind, **sections).named_modules():
        if "BatchNorm" in type(module).__name__:
            found[name.startswith("backbone.")].add(type(module).__name__)
    frozen = {"frozen": "FrozenBatchNorm2d", "local": "CrossGpuBatchNorm"}
    assert found == {True: {frozen[kind]}, False: {"CrossGpuBatchNorm"}}


@torch.no_grad()
def test_batch_equals_single_images(dataset: CocoDataset) -> None:
    detector, batch = build().eval(), load(dataset, images=4)
    batch = batch._replace(sizes_B2=torch.tensor([[64.0, 64.0], [40.0, 64.0], [64.0, 50.0], [32.0, 32.0]]))
    together = tree_flatten(detector(batch).detections)[0]
    for b in range(4):
        one = batch._replace(images_B3HW=batch.images_B3HW[b : b + 1], sizes_B2=batch.sizes_B2[b : b + 1])
        for mine, all_of_them in zip(tree_flatten(detector(one).detections)[0], together, strict=True):
            torch.testing.assert_close(mine[0], all_of_them[b], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_padding_has_no_influence(dataset: CocoDataset) -> None:
    """Pixels in the padding are not read, and nothing is proposed or found outside the image.

    A larger canvas still changes features near the image's border, because a layer's zeros around the canvas
    differ from what earlier layers compute from zero pixels (the same in detectron2 and torchvision).
    """
    detector, batch = build().eval(), load(dataset)
    batch = batch._replace(sizes_B2=torch.tensor([[40.0, 64.0], [33.0, 21.0]]))
    dirty = batch.images_B3HW.clone()
    dirty[0, :, 40:] = 255
    dirty[1, :, 33:] = dirty[1, :, :, 21:] = 255
    expected: Detections = detector(batch).detections
    for a, b in zip(
        tree_flatten(expected)[0],
        tree_flatten(detector(batch._replace(images_B3HW=dirty)).detections)[0],
        strict=True,
    ):
        assert torch.equal(a, b)
    limits_B14 = batch.sizes_B2.flip(1).repeat(1, 2)[:, None]
    assert expected.valid_BD.any(1).all()
    assert (expected.boxes_BD4 >= 0).all() and (expected.boxes_BD4 <= limits_B14).all()
    levels = detector.fpn(detector.backbone(detector.normalise(batch.images_B3HW, batch.sizes_B2)))
    proposals, _ = detector.rpn(levels, batch.sizes_B2, None, batch.seeds_B)
    sides = proposals.boxes_BN4[..., 2:] - proposals.boxes_BN4[..., :2]
    assert (sides[proposals.valid_BN] > 0).all()
    assert not proposals.boxes_BN4[~proposals.valid_BN].any()


def test_object_whose_best_anchor_is_in_the_padding_trains(dataset: CocoDataset) -> None:
    """At the border the best anchor's centre may be in the padding; the best one inside is used then."""
    detector, batch = (
        build(rpn={"batch_per_image": 4096, "positive_fraction": 1.0}).train(),
        load(dataset, 1, 1),
    )
    batch = batch._replace(
        sizes_B2=torch.tensor([[64.0, 33.0]]),
        targets=batch.targets._replace(boxes_BM4=torch.tensor([[[29.0, 24.0, 33.0, 40.0]]])),
    )
    assert detector(batch).rpn.positive_BR.any()


def test_overfits_a_batch(dataset: CocoDataset) -> None:
    """After 120 steps on two images their objects are found: targets, losses and decoding agree on boxes."""
    detector = build(
        rpn={"post_nms_train": 50, "post_nms_test": 50, "batch_per_image": 128},
        fpn={"channels": 32},
        box_head={"width": 64, "batch_per_image": 64, "score_threshold": 0.3},
        mask_head={"slots": 16, "width": 32},
    )
    batch = load(dataset)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=4e-3, weight_decay=0.0)
    for _ in range(120):
        step(detector, batch)
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
    with torch.no_grad():
        found: Detections = detector.eval()(batch).detections
    assert found.masks_BDSS is not None
    hits, total = 0, 0
    for b in range(2):
        valid_M, valid_D = batch.targets.valid_BM[b], found.valid_BD[b]
        iou = box_iou(batch.targets.boxes_BM4[b][valid_M], found.boxes_BD4[b][valid_D])
        same = batch.targets.labels_BM[b][valid_M][:, None] == found.labels_BD[b][valid_D]
        hits += int(((iou > 0.6) & same).any(1).sum())
        total += int(valid_M.sum())
    assert total >= 4 and hits >= 0.8 * total, f"{hits} of {total}"


@pytest.mark.parametrize(
    ("kind", "conventions"),
    [("mask_rcnn", "torchvision"), ("mask_rcnn", "mmdetection"), ("retinanet", "mmdetection")],
)
def test_compiles_to_one_graph(dataset: CocoDataset, kind: str, conventions: str) -> None:
    """Forward and losses compile without a graph break, NMS included, which is an operator in the graph.

    The same graph handles images without objects. tests/engine/test_faster.py covers detectron2 conventions.
    """
    torch._dynamo.reset()
    detector = build(norm="frozen", kind=kind, conventions=conventions).train()
    counter = CompileCounterWithBackend("eager")

    def losses_of(batch: Batch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = detector.losses(detector(batch), batch)
        return found

    compiled = torch.compile(losses_of, backend=counter, fullgraph=True, dynamic=False)
    batch = load(dataset)
    for given in (batch, emptied(batch, 0, 1)):
        detector.zero_grad()
        mine, expected = compiled(given), losses_of(given)
        for name, loss in expected.items():
            torch.testing.assert_close(mine[name], loss, atol=1e-5, rtol=1e-5)
        sum(mine.values(), torch.zeros(())).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_recomputed_heads_save_memory_and_change_no_gradient(dataset: CocoDataset) -> None:
    batch, kept, gradients = load(dataset), [], []
    for recomputed in (False, True):
        torch.manual_seed(0)
        config = MaskRcnnConfig.model_validate({**MODEL, "num_classes": 4, "checkpoint_heads": recomputed})
        model = build_model(config, CANVAS, NormConfig.model_validate({"type": "local"})).train()
        held = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal held
            held += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = total_loss(mask_rcnn_losses(model(batch), CONVENTIONS["detectron2"]))
        kept.append(held)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert kept[1] < 0.95 * kept[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
