"""Images/s of Mask R-CNN R50 in bf16, in training: eager, compiled, as a CUDA graph; and torchvision's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from bench_scene import CLASSES, make_scene, torchvision_inputs
from qualify.common import Row, Setting, freed, loss_of, model_and_batch, peak_gib, profiled, seconds
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import maskrcnn_resnet50_fpn

from giantdet.architectures import Architecture
from giantdet.engine.faster import capture_training, compile_training
from giantdet.structures import Batch

REPEATS = 12
FEW = 2
"""Images of a small micro-batch, as in the recipes of one node."""


@dataclass
class Inputs:
    """A model, a batch and a compiled copy of the model, all on the device."""

    model: Architecture
    compiled: Architecture
    batch: Batch
    flops: float
    """FLOPs of the forward and backward pass of one image."""


def prepare(setting: Setting) -> None:
    """Create the inputs and compile, while the correctness checks run."""
    global INPUTS
    INPUTS = inputs(setting)


def inputs(setting: Setting, frozen: tuple[str, ...] = ()) -> Inputs:
    """Return the inputs; backbone parameters whose names begin with `frozen` are not trained."""
    size, images = canvas(setting)
    head = {"batch_per_image": setting.pick(512, 32)}
    backbone = setting.pick("resnet50", "resnet18")
    model, batch = model_and_batch(setting, size, images, backbone, box_head=head)
    for name, parameter in model.backbone.body.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    counted = flops(model, batch)
    model = model.to(setting.device, setting.pick(torch.bfloat16, torch.float32))
    batch = batch.to(setting.device)
    compiled = deepcopy(model)
    if setting.device.type == "cuda":
        compile_training(compiled)
        loss_of(compiled, batch).backward()
    return Inputs(model, compiled, batch, counted)


def canvas(setting: Setting) -> tuple[tuple[int, int], int]:
    return setting.pick((800, 1344), (64, 128)), setting.pick(16, 2)


def flops(model: Architecture, batch: Batch) -> float:
    """Return the FLOPs of forward and backward of one image."""
    model, batch = deepcopy(model).to("meta"), tree_map_only(Tensor, lambda t: t[:1], batch)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = model.to_empty(device="cpu")
        batch = tree_map_only(Tensor, mode.from_tensor, batch)
        with FlopCounterMode(display=False) as counter:
            loss_of(model, batch).backward()
    return float(counter.get_total_flops())


def checks(setting: Setting) -> Iterator[Row]:
    torch.backends.cudnn.benchmark = True
    device, all_images = setting.device, INPUTS.batch
    batches = [all_images]
    if len(all_images.images_B3HW) > FEW:
        batches.append(tree_map_only(Tensor, lambda t: t[:FEW], all_images))
    rate = matmul_rate(setting)
    yield Row("matrix product, bf16", None, f"{rate / 1e12:.0f} TFLOP/s on random data")
    yield Row("copy on the device", None, f"{copy_rate(setting) / 1e12:.2f} TB/s, read and written")
    for batch in batches:
        images = len(batch.images_B3HW)
        with freed(device):
            reference = timed(setting, torchvision_step(setting, images))
            yield row("torchvision", images, reference, rate)
        with freed(device):
            each = timed(setting, training_step(INPUTS.model, batch))
            yield row("eager", images, each, rate, reference)
        if device.type == "cuda":
            yield from faster(setting, INPUTS, batch, rate, reference)


def faster(
    setting: Setting, given: Inputs, batch: Batch, rate: float, reference: float | None, name: str = ""
) -> Iterator[Row]:
    """Measure a large batch compiled and as a graph, and a small batch as a graph."""
    images = len(batch.images_B3HW)
    ways = ("CUDA graph",) if images == FEW else ("compiled", "compiled, CUDA graph")
    for way in ways:
        model = given.compiled if "compiled" in way else deepcopy(given.model)
        with freed(setting.device):
            if "graph" in way:
                capture_training(model, batch, accumulates=False)
            step = training_step(model, batch)
            yield row(name + way, images, timed(setting, step), rate, reference, given.flops)
            if way == ways[-1] and images > FEW:
                yield from profiled(setting, f"Mask R-CNN, {name}{way}", step)


def row(
    name: str, images: int, each: float, rate: float, reference: float | None = None, flops: float = 0.0
) -> Row:
    """Return the row for a step of `each` seconds; `reference` is torchvision's time."""
    beside = f", {reference / each:.2f} times torchvision" if reference else ""
    share = (flops or INPUTS.flops) * images / each / rate
    return Row(
        f"Mask R-CNN R50, {name}, {images} images",
        None,
        f"{images / each:.1f} images/s ({1e3 * each:.1f} ms), {100 * share:.0f}% of the matrix rate, "
        f"{peak_gib(torch.device('cuda' if torch.cuda.is_available() else 'cpu')):.1f} GiB{beside}",
    )


def timed(setting: Setting, step: Callable[[], None]) -> float:
    return seconds(step, setting.device, setting.pick(REPEATS, 1), warm=setting.pick(3, 1))


def training_step(model: Architecture, batch: Batch) -> Callable[[], None]:
    return step_of(model, lambda: loss_of(model, batch))


def step_of(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Return a step of SGD with momentum; the LR is so low that all steps do the same work."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-5, momentum=0.9, foreach=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def torchvision_step(setting: Setting, count: int) -> Callable[[], None]:
    """Return torchvision's step under autocast, on the same pixels, boxes and masks."""
    size, device = canvas(setting)[0], setting.device
    few = {"rpn_pre_nms_top_n_train": 50, "rpn_post_nms_top_n_train": 50, "box_batch_size_per_image": 32}
    model = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES + 1,
        trainable_backbone_layers=5,
        min_size=min(size),
        max_size=max(size),
        **setting.pick({}, few),
    )
    for name, module in model.named_modules():
        if name.endswith("bn3"):
            module.weight.data.fill_(0.2)
    model = model.to(device).train()
    images, targets = torchvision_inputs(make_scene(size, count, 8))
    images = [image.to(device) for image in images]
    targets = [{k: v.to(device) for k, v in target.items()} for target in targets]

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=not setting.toy):
            return torch.stack([value.float() for value in model(images, targets).values()]).sum()

    return step_of(model, loss)


def matmul_rate(setting: Setting) -> float:
    """Return FLOP/s of a large bf16 matrix product on random data."""
    side = setting.pick(8192, 256)
    a, b = (torch.randn(side, side, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, setting.device, 20, warm=5)


def copy_rate(setting: Setting) -> float:
    """Return bytes/s of a copy on the device, read and written."""
    size = setting.pick(2**31, 2**20)
    source = torch.empty(size, dtype=torch.uint8, device=setting.device).random_()
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), setting.device, 10)
