"""Images/s of Mask R-CNN R50 in bf16, in training, beside torchvision's; eager, as a CUDA graph, compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from bench_scene import CLASSES, make_scene, torchvision_inputs
from qualify.common import (
    Row,
    Setting,
    freed,
    loss_of,
    model_and_batch,
    peak_gib,
    seconds,
    synchronise,
)
from qualify.correct import captured
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import maskrcnn_resnet50_fpn

REPEATS = 15


def prepare(setting: Setting) -> None:
    """Make the inputs, while other groups use the GPU."""
    global MODEL, BATCH, SCENE, FLOPS
    size, images = canvas(setting)
    head = {"batch_per_image": setting.pick(512, 32)}
    MODEL, BATCH = model_and_batch(setting, size, images, setting.pick("resnet50", "resnet18"), box_head=head)
    SCENE = make_scene(size, images, 8)
    FLOPS = flops(setting)


def canvas(setting: Setting) -> tuple[tuple[int, int], int]:
    return setting.pick((800, 1344), (64, 128)), setting.pick(16, 2)


def flops(setting: Setting) -> float:
    """Return the FLOPs of forward and backward of one image."""
    size, _ = canvas(setting)
    model, batch = model_and_batch(setting, size, 1, setting.pick("resnet50", "resnet18"))
    model = deepcopy(model).to("meta")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = model.to_empty(device="cpu")
        batch = tree_map_only(Tensor, mode.from_tensor, batch)
        with FlopCounterMode(display=False) as counter:
            loss_of(model, batch).backward()
    return float(counter.get_total_flops())


def checks(setting: Setting) -> Iterator[Row]:
    torch.backends.cudnn.benchmark = True
    device = setting.device
    rate = matmul_rate(setting)
    yield Row("matrix product, bf16", None, f"{rate / 1e12:.0f} TFLOP/s on random data")
    yield Row("copy on the device", None, f"{copy_rate(setting) / 1e12:.2f} TB/s, read and written")

    images = canvas(setting)[1]
    results: dict[str, float] = {}

    def row(name: str, each: float) -> Row:
        results[name] = images / each
        share = FLOPS * images / each / rate
        beside = ""
        if "torchvision" in results and name != "torchvision":
            beside = f", {results[name] / results['torchvision']:.2f} times torchvision"
        return Row(
            f"Mask R-CNN R50, {name}",
            None,
            f"{images / each:.1f} images/s ({1e3 * each:.0f} ms for {images}), "
            f"{100 * share:.0f}% of the matrix rate, {peak_gib(device):.1f} GiB{beside}",
        )

    with freed(device):
        yield row("torchvision", seconds(torchvision_step(setting), device, setting.pick(8, 1)))
    model = MODEL.to(device, torch.bfloat16)
    batch = BATCH.to(device)
    with freed(device):
        step = training_step(model, lambda: loss_of(model, batch))
        yield row("giantdet, eager", seconds(step, device, setting.pick(REPEATS, 1)))
        yield from parts(setting, model, batch)
    if device.type == "cuda":
        with freed(device):
            replay = captured(model, batch)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9, foreach=True)

            def step_of_graph() -> None:
                replay()
                optimizer.step()

            yield row("giantdet, CUDA graph", seconds(step_of_graph, device, REPEATS))
            del replay
        with freed(device):
            compiled = torch.compile(model)
            step = training_step(model, lambda: loss_of(compiled, batch))
            yield row("giantdet, compiled", seconds(step, device, REPEATS))


def training_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Return a step of SGD with momentum; the rate is so low that all steps do the same work."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9, foreach=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def torchvision_step(setting: Setting) -> Callable[[], None]:
    """Return torchvision's step under autocast, on the same pixels, boxes and masks."""
    size, _ = canvas(setting)
    device = setting.device
    model = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES + 1,
        trainable_backbone_layers=5,
        min_size=min(size),
        max_size=max(size),
    )
    for name, module in model.named_modules():
        if name.endswith("bn3"):
            module.weight.data.fill_(0.2)
    model = model.to(device).train()
    images, targets = torchvision_inputs(SCENE)
    images = [image.to(device) for image in images]
    targets = [{k: v.to(device) for k, v in target.items()} for target in targets]

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return torch.stack([value.float() for value in model(images, targets).values()]).sum()

    return training_step(model, loss)


def parts(setting: Setting, model: torch.nn.Module, batch: object) -> Iterator[Row]:
    """Profile three steps; the operators and kernels go to files, the shares of groups of kernels to a row."""
    if setting.device.type != "cuda":
        return
    from torch.profiler import ProfilerActivity, profile

    def step() -> None:
        with torch.profiler.record_function("forward"):
            loss = loss_of(model, batch)  # type: ignore[arg-type]
        with torch.profiler.record_function("backward"):
            loss.backward()

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as profiler:
        for _ in range(3):
            step()
        synchronise(setting.device)
    averages = profiler.key_averages()
    (setting.output / "kernels.txt").write_text(
        averages.table(sort_by="self_device_time_total", row_limit=70, max_name_column_width=110)
    )
    by_shape = profiler.key_averages(group_by_input_shape=True)
    (setting.output / "operators.txt").write_text(
        by_shape.table(sort_by="device_time_total", row_limit=90, max_name_column_width=60)
    )
    total = sum(e.self_device_time_total for e in averages if e.device_type.name == "CUDA")
    yield Row(
        "kernels of a step",
        None,
        f"{total / 3e3:.1f} ms on the GPU, {sum(e.count for e in averages if e.device_type.name == 'CUDA') // 3} "
        "kernels, see kernels.txt",
    )


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
