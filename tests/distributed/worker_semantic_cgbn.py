"""One rank of test_semantic_cgbn.py: semantic models with CGBN against one process with the whole batch.

The whole batch is normalised by torch's own BatchNorm. Losses are divided by all pixels, so that their mean
over the ranks is the loss of the whole batch although the ranks have different numbers of labelled pixels.
Prints `PASSED name` after each model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from giantdet.architectures import Architecture, build_model, total_loss
from giantdet.config.architectures import SECTIONS
from giantdet.config.architectures.common import NormConfig
from giantdet.distributed import comm
from giantdet.layers.cgbn import CrossGpuBatchNorm, replace_batchnorm
from giantdet.structures import IGNORE, Batch, Targets

SIZE, CLASSES, IMAGES = (64, 96), 3, 2
HEAD: dict[str, Any] = {"width": 16, "norm": "batch", "dropout": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "semantic_fpn": {"fpn": {"channels": 8}, "semantic_head": {**HEAD, "loss_divisor": "all"}},
    "upernet": {"decode_head": HEAD, "auxiliary_head": HEAD, "loss_divisor": "all"},
}


def build(name: str, norm: NormConfig) -> Architecture:
    section = {"type": name, "num_classes": CLASSES, "backbone": {"name": "test_resnet"}, **MODELS[name]}
    torch.manual_seed(0)
    model = build_model(SECTIONS[name].model_validate(section), SIZE, norm, IMAGES).train()
    for module in model.modules():  # timm zeroes the last norm of each block, so it has no gradients
        if isinstance(module, CrossGpuBatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def whole_batch(world: int) -> Batch:
    """All images in rank order; those of rank 0 have no labelled pixel, the others are half labelled."""
    count, rng = IMAGES * world, torch.Generator().manual_seed(1)
    images = torch.randint(0, 255, (count, 3, *SIZE), dtype=torch.uint8, generator=rng)
    labels = torch.randint(0, CLASSES, (count, *SIZE), dtype=torch.uint8, generator=rng)
    labels[torch.rand(labels.shape, generator=rng) < 0.5] = IGNORE
    labels[:IMAGES] = IGNORE
    none = torch.zeros(count, 0)
    targets = Targets(
        none.view(count, 0, 4), none.long(), none.bool(), none.view(count, 0, 0, 0), none, labels
    )
    sizes = torch.tensor([SIZE] * count)
    return Batch(images, sizes.float(), targets, torch.arange(count), torch.arange(count), sizes)


def of_rank(batch: Batch, rank: int) -> Batch:
    """The images of one rank."""
    mine = slice(IMAGES * rank, IMAGES * (rank + 1))
    targets = batch.targets._make(target[mine] for target in batch.targets)
    others = {name: value[mine] for name, value in batch._asdict().items() if isinstance(value, Tensor)}
    return Batch(targets=targets, **others)


def stock(norm: Any) -> nn.Module:
    """torch's own BatchNorm with these weights."""
    assert isinstance(norm.act, nn.Identity)
    new = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum)
    new.load_state_dict(norm.state_dict())
    return new


def check(name: str, rank: int, world: int) -> None:
    model = build(name, NormConfig(type="cgbn", bn_size=IMAGES * world))
    norms = [m for m in model.modules() if isinstance(m, CrossGpuBatchNorm)]
    heads = [
        m for part in model.norm_parts()["heads"] for m in part.modules() if isinstance(m, CrossGpuBatchNorm)
    ]
    assert len(heads) == {"semantic_fpn": 7, "upernet": 13}[name]
    assert all(comm.group_size(norm.group) == world for norm in norms)
    batch = whole_batch(world)
    mine = of_rank(batch, rank)
    losses = model.losses(model(mine), mine)
    total_loss(losses).backward()

    reference = replace_batchnorm(build(name, NormConfig(type="local")), stock)
    assert not any(isinstance(m, CrossGpuBatchNorm) for m in reference.modules())
    expected = reference.losses(reference(batch), batch)
    total_loss(expected).backward()

    group = comm.subgroup(world)
    for key, loss in losses.items():
        mean = comm.all_reduce(loss.detach().clone(), group) / world
        torch.testing.assert_close(mean, expected[key].detach(), rtol=1e-5, atol=0, msg=key)
    for (key, ours), (other, theirs) in zip(
        model.named_parameters(), reference.named_parameters(), strict=True
    ):
        gradient = comm.all_reduce(ours.grad.clone(), group) / world
        error = (gradient - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert key == other and error < 3e-4, f"{key}: {error}"


def main() -> None:
    comm.start()
    torch.set_num_threads(1)
    for name in MODELS:
        check(name, comm.rank(), comm.world_size())
        print("PASSED", name, flush=True)
    comm.stop()


if __name__ == "__main__":
    main()
