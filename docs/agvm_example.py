"""AGVM in a training loop that is not giantdet's: a timm backbone that learns to segment rectangles.

deepspeed --num_accelerators 2 docs/agvm_example.py
"""

import deepspeed
import timm
import torch
from torch import nn

from giantdet.config.types import AgvmConfig
from giantdet.distributed import comm
from giantdet.optim.agvm import Agvm
from giantdet.optim.param_groups import parameter_groups

MODULES = {"backbone": ("encoder.*",), "decoder": ("*",)}  # by name, the first pattern that fits
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 2},
    "gradient_clipping": 1.0,
}


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = timm.create_model("resnet10t", features_only=True, out_indices=(1, 2))
        self.decoder = nn.Conv2d(sum(self.encoder.feature_info.channels()), 1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = [nn.functional.interpolate(m, images.shape[-2:]) for m in self.encoder(images)]
        return self.decoder(torch.cat(maps, 1))


def rectangles(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    masks = torch.zeros(4, 1, 64, 64)
    for mask in masks:
        y, x = torch.randint(0, 40, (2,), generator=generator).tolist()
        mask[:, y : y + 20, x : x + 20] = 1.0
    return masks + torch.randn(4, 3, 64, 64, generator=generator), masks


torch.manual_seed(0)
comm.start()  # deepspeed.init_distributed() would do as well
model = Segmenter()
groups = parameter_groups(model, weight_decay=0.05, lr=1e-3, modules=MODULES)
engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=CONFIG)
agvm = Agvm(engine, AgvmConfig(enabled=True, interval=5, start_step=10, modules=MODULES))
for step in range(41):
    images, masks = (t.to(engine.device) for t in rectangles(step, engine.global_rank))
    loss = nn.functional.binary_cross_entropy_with_logits(engine(images), masks)
    engine.backward(loss)
    agvm.observe()
    agvm.scale()
    engine.step()
    if step % 10 == 0 and engine.global_rank == 0:
        print(f"step {step} loss {float(loss):.3f}", {k: f"{v:.3f}" for k, v in agvm.scalars().items()})
comm.stop()
