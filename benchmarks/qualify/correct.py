"""Check the GPU against the CPU: operators, batch norms, losses, a step without synchronisation."""

from __future__ import annotations

import copy
import platform
from collections.abc import Iterator
from importlib import metadata

import torch
import torch.distributed as dist
from qualify.common import Row, Setting, difference, loss_of, model_and_batch, synchronise
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from giantdet.architectures import Architecture
from giantdet.distributed import comm
from giantdet.engine.faster import capture_training
from giantdet.layers.cgbn import CrossGpuBatchNorm
from giantdet.ops.nms import class_nms_mask, nms_mask
from giantdet.ops.roi_align import roi_align_pyramid
from giantdet.ops.sampling import sample, uniform_noise
from giantdet.structures import Batch


def prepare(setting: Setting) -> None:
    """Do nothing: there is nothing to prepare."""


def checks(setting: Setting) -> Iterator[Row]:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    yield versions(setting)
    for check in (boxes, roi_align, batch_norms, first_step, evaluation, no_synchronisation, graph, losses):
        try:
            yield from check(setting)
        except Exception as error:
            yield Row(check.__name__, False, " ".join(f"{type(error).__name__}: {error}".split())[:600])
            if "CUDA error" in str(error):
                raise  # no later check can work in this process


def versions(setting: Setting) -> Row:
    names = ("torch", "torchvision", "timm", "deepspeed", "triton", "pycocotools", "numpy")
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} missing")
    device = "CPU"
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        device = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}"
    return Row("versions", None, f"{device}; Python {platform.python_version()}, {', '.join(found)}")


def clustered_boxes(setting: Setting, groups: int, boxes: int, side: float) -> tuple[Tensor, Tensor]:
    """Return boxes `[groups, boxes, 4]` around a few objects, as proposals are, and scores with ties."""
    generator = torch.Generator().manual_seed(1)
    objects = torch.rand(groups, 8, 2, generator=generator) * side
    which = torch.randint(8, (groups, boxes), generator=generator)
    centre = objects.gather(1, which[..., None].expand(-1, -1, 2))
    centre = centre + torch.randn(groups, boxes, 2, generator=generator) * side / 60
    half = side / 40 * (1 + torch.rand(groups, boxes, 2, generator=generator) * 4)
    scores = torch.randint(0, 500, (groups, boxes), generator=generator) / 500
    return torch.cat([centre - half, centre + half], -1).clamp(0, side), scores


def boxes(setting: Setting) -> Iterator[Row]:
    """Check that NMS and sampling choose the CPU's boxes."""
    device = setting.device
    count = setting.pick(2000, 200)
    found, scores = clustered_boxes(setting, 10, count, 1000.0)
    valid = torch.rand(scores.shape, generator=torch.Generator().manual_seed(2)) > 0.1
    kept = nms_mask(found, scores, valid, 0.7)
    on_device = nms_mask(found.to(device), scores.to(device), valid.to(device), 0.7).cpu()
    wrong = int((kept != on_device).sum())
    yield Row("NMS", wrong == 0, f"{int(kept.sum())} of {kept.numel()} boxes kept, {wrong} differ")

    labels = torch.randint(80, scores.shape, generator=torch.Generator().manual_seed(3))
    extent = torch.full((10,), 1000.0)
    arguments = (found, scores, labels, valid)
    ours = class_nms_mask(*(t.to(device) for t in arguments), 80, extent.to(device), 0.5).cpu()
    wrong = int((ours != class_nms_mask(*arguments, 80, extent, 0.5)).sum())
    yield Row("NMS by class", wrong == 0, f"{wrong} boxes differ")

    seeds = torch.arange(7) * 12345678901
    noise, noise_there = uniform_noise(seeds, 5000, 1), uniform_noise(seeds.to(device), 5000, 1).cpu()
    label = torch.randint(-1, 2, (7, 5000), generator=torch.Generator().manual_seed(4)).to(torch.int8)
    here = sample(label, noise, 512, 0.25)
    there = sample(label.to(device), noise.to(device), 512, 0.25)
    same = torch.equal(noise, noise_there) and all(
        torch.equal(a, b.cpu()) for a, b in zip(here[1:], there[1:], strict=True)
    )
    yield Row("sampling", same, "noise, positives and valid slots are equal" if same else "differs")


def roi_align(setting: Setting) -> Iterator[Row]:
    """Compare pooled features and their gradients with the CPU's in float32."""
    generator = torch.Generator().manual_seed(0)
    sides = setting.pick((200, 100, 50, 25), (32, 16, 8, 4))
    levels = [torch.randn(2, 64, side, side, generator=generator) for side in sides]
    rois, _ = clustered_boxes(setting, 2, setting.pick(512, 50), 4.0 * sides[0])
    strides = (4, 8, 16, 32)

    def pool(device: torch.device, dtype: torch.dtype, points: int) -> list[Tensor]:
        inputs = [level.detach().to(device, dtype).requires_grad_() for level in levels]
        pooled = roi_align_pyramid(inputs, rois.to(device), strides, 7, points, True)
        weight = torch.linspace(-1, 1, pooled.numel(), device=device).view(pooled.shape)
        (pooled.float() * weight).sum().backward()
        return [pooled, *(level.grad for level in inputs if level.grad is not None)]

    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for points in (2, 0):
            reference = pool(torch.device("cpu"), torch.float32, points)
            found = pool(setting.device, dtype, points)
            errors = [difference(a, b) for a, b in zip(found, reference, strict=True)]
            name = f"RoIAlign, {str(dtype).removeprefix('torch.')}, {points or 'adaptive'} points"
            text = f"output {errors[0]:.1e}, gradients {max(errors[1:]):.1e} (limit {limit:.0e})"
            yield Row(name, max(errors) < limit, text)


def batch_norms(setting: Setting) -> Iterator[Row]:
    """Compare CGBN on a group of one rank, through its collectives, with BatchNorm in float64 on the CPU."""
    comm.start()
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(0)
            x = (3 + 2 * torch.randn(4, 64, 30, 50)).to(dtype)
            dy = torch.randn(x.shape).to(dtype)
            stock = nn.BatchNorm2d(64).double()
            nn.init.uniform_(stock.weight)
            ours = CrossGpuBatchNorm.from_batchnorm(copy.deepcopy(stock).float(), dist.group.WORLD)
            ours = ours.to(setting.device)
            if dtype == torch.bfloat16:
                ours = ours.bfloat16()
            there = x.to(setting.device).contiguous(memory_format=layout).detach().requires_grad_()
            y = ours(there)
            y.backward(dy.to(setting.device))
            here = x.double().detach().requires_grad_()
            expected = stock(here)
            expected.backward(dy.double())
            pairs = [
                (y, expected),
                (there.grad, here.grad),
                (ours.weight.grad, stock.weight.grad),
                (ours.bias.grad, stock.bias.grad),
                (ours.running_mean, stock.running_mean),
                (ours.running_var, stock.running_var),
            ]
            error = max(difference(a, b) for a, b in pairs)
            layout_name = str(layout).removeprefix("torch.")
            name = f"CGBN, {str(dtype).removeprefix('torch.')}, {layout_name}"
            yield Row(name, error < limit, f"outputs, gradients, statistics {error:.1e} (limit {limit:.0e})")


def small(setting: Setting) -> tuple[Architecture, Batch]:
    size = setting.pick((512, 512), (128, 128))
    return model_and_batch(setting, size, 2, setting.pick("resnet50", "resnet18"))


def first_step(setting: Setting) -> Iterator[Row]:
    """Compare losses and gradients of one step in float32 with the CPU's."""
    model, batch = small(setting)
    there = copy.deepcopy(model).to(setting.device)
    on_device = batch.to(setting.device)
    predictions, predictions_there = model(batch), there(on_device)
    losses, losses_there = model.losses(predictions, batch), there.losses(predictions_there, on_device)
    errors = {k: difference(losses_there[k], losses[k]) for k in losses}
    worst = max(errors, key=lambda k: errors[k])
    yield Row(
        "losses, float32",
        errors[worst] < 1e-3,
        f"largest difference {errors[worst]:.1e} ({worst}; limit 1e-3)",
    )
    torch.stack(list(losses.values())).sum().backward()
    torch.stack(list(losses_there.values())).sum().backward()
    pairs = zip(model.named_parameters(), there.parameters(), strict=True)
    gradients = {
        name: difference(b.grad, a.grad)
        for (name, a), b in pairs
        if a.grad is not None and b.grad is not None
    }
    worst = max(gradients, key=lambda k: gradients[k])
    yield Row(
        "gradients, float32",
        gradients[worst] < 1e-2,
        f"largest difference {gradients[worst]:.1e} ({worst}; limit 1e-2)",
    )


def evaluation(setting: Setting) -> Iterator[Row]:
    """Compare detections of an untrained model in float32, by image and rank of score."""
    model, batch = small(setting)
    there = copy.deepcopy(model).to(setting.device)
    with torch.no_grad():
        found = model.eval()(batch).detections
        other = there.eval()(batch.to(setting.device)).detections
    assert found is not None and other is not None
    same = (found.labels_BD == other.labels_BD.cpu()) & (found.valid_BD == other.valid_BD.cpu())
    moved = float((found.boxes_BD4 - other.boxes_BD4.cpu()).abs().amax(-1)[same].max())
    share = float(same.float().mean())
    yield Row(
        "detections, float32",
        share > 0.9,
        f"{100 * share:.1f}% in the same order; those differ by at most {moved:.2g} pixels",
    )


def no_synchronisation(setting: Setting) -> Iterator[Row]:
    """Check that forward, losses and backward in bf16 never synchronise with the host."""
    model, batch = small(setting)
    model = model.to(setting.device, torch.bfloat16)
    batch = batch.to(setting.device)
    loss_of(model, batch).backward()
    if setting.device.type == "cuda":
        synchronise(setting.device)
        torch.cuda.set_sync_debug_mode("error")
    try:
        loss = loss_of(model, batch)
        loss.backward()
    finally:
        if setting.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    finite = bool(loss.isfinite())
    yield Row("a step without synchronisation", finite, f"loss {float(loss.detach()):.4f}")


def graph(setting: Setting) -> Iterator[Row]:
    """Compare forward and backward, captured as a CUDA graph and replayed on another batch, with eager."""
    if setting.device.type != "cuda":
        yield Row("CUDA graph", None, "needs a GPU")
        return
    model, batch = small(setting)
    model = model.to(setting.device, torch.bfloat16)
    batch = batch.to(setting.device)
    other = tree_map_only(Tensor, lambda t: t.flip(0), batch)
    graphed = copy.deepcopy(model)
    capture_training(graphed, batch, accumulates=True)
    loss = loss_of(graphed, other)
    loss.backward()
    eager = loss_of(model, other)
    eager.backward()
    pairs = zip(graphed.parameters(), model.parameters(), strict=True)
    errors = [difference(a.grad, b.grad) for a, b in pairs if a.grad is not None and b.grad is not None]
    text = (
        f"loss {float(loss.detach()):.5f}, eager {float(eager.detach()):.5f}; largest gradient difference "
        f"{max(errors):.1e}"
    )
    yield Row("CUDA graph", difference(loss, eager) < 1e-2, text)


def losses(setting: Setting) -> Iterator[Row]:
    """Compare the losses of 20 steps of SGD in float32 on two images with the CPU's."""
    steps = setting.pick(20, 5)
    size = setting.pick((256, 256), (64, 64))
    rois = {"batch_per_image": setting.pick(256, 32)}
    model, batch = model_and_batch(setting, size, 2, "resnet18", box_head=rois)

    def train(device: torch.device) -> Tensor:
        mine = copy.deepcopy(model).to(device)
        optimizer = torch.optim.SGD(mine.parameters(), lr=0.005, momentum=0.9)
        there, found = batch.to(device), []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_of(mine, there)
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found).cpu()

    here, there = train(torch.device("cpu")), train(setting.device)
    relative = ((there - here) / here).abs()
    text = (
        f"step 1 {relative[0]:.1e}, 5 {relative[4]:.1e}, {steps} {relative[-1]:.1e} apart; "
        f"the loss falls from {here[0]:.3f} to {here[-1]:.3f}, there to {there[-1]:.3f}"
    )
    yield Row(f"losses of {steps} steps", bool(relative[0] < 1e-3 and relative.max() < 0.1), text)
