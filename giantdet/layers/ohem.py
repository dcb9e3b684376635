"""Online hard example mining: RoIs are chosen by their losses (Shrivastava et al. 2016).

Shapes: B images · N candidates per image · R RoIs per image.
All candidates pass through the head once without a graph; their losses are the keys of a `topk`. The chosen
RoIs pass a second time, in as many slots as with random sampling. References: Megvii's light_head_rcnn
(`sum_ohem_loss`) and mmdetection's `OHEMSampler`. In the former all candidates have a graph, and the losses
of the chosen ones are summed; the gradients are the same, in less memory here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from giantdet.config.architectures.common import BaseBoxHeadConfig
from giantdet.layers.box_head import BoxPredictions, SampledRois, roi_losses, sample_rois


@contextmanager
def without_graph(head: nn.Module) -> Iterator[None]:
    """A pass through the head in its training mode that leaves no graph and no trace in its buffers.

    Batch norms normalise by the candidates, as in training, but their running statistics follow the chosen
    RoIs alone.
    """
    before = [(buffer, buffer.clone()) for buffer in head.buffers()]
    with torch.no_grad():
        yield
        for buffer, value in before:
            buffer.copy_(value)


def hard_rois(
    candidates: SampledRois,
    predictions: BoxPredictions,
    config: BaseBoxHeadConfig,
    smooth_l1_beta: float,
    num_classes: int,
) -> SampledRois:
    """Choose the RoIs with the largest losses among the candidates.

    Over the batch (Megvii): the B x R candidates of the largest classification + box loss, whatever their
    image and label. Over each image (mmdetection): the positives and the negatives of the largest
    classification loss, in the numbers of random sampling.
    """
    entropy_BN, distance_BN = roi_losses(predictions, smooth_l1_beta, config.loss)
    if config.sampling.over == "image":
        return sample_rois(candidates, entropy_BN, config, num_classes)
    return _hardest(candidates, entropy_BN + distance_BN, config.batch_per_image)


def _hardest(candidates: SampledRois, loss_BN: Tensor, num: int) -> SampledRois:
    """Return the candidates of the largest losses in slots `[B, R]`, hardest first, R = min(num, N).

    Slots are filled column by column, positives first: each row begins with its share of the positives,
    which have the first slots for the mask head too.
    """
    images, count = loss_BN.shape
    slots = min(num, count)
    key_BN = loss_BN.masked_fill(~candidates.valid_BR, -1.0)  # no loss is below 0
    key_K, index_K = key_BN.flatten().topk(images * slots)
    positive_K = candidates.positive_BR.flatten()[index_K]
    order_K = (~positive_K).to(torch.int8).argsort(stable=True)
    index_BR = index_K[order_K].reshape(slots, images).T
    chosen = SampledRois._make(field.flatten(0, 1)[index_BR] for field in candidates)
    valid_BR = (key_K[order_K] >= 0).reshape(slots, images).T
    return chosen._replace(valid_BR=valid_BR)
