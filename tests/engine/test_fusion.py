"""Fusion of boxes against reference implementations of the papers' equations."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import batched_nms, box_iou

from giantdet.engine.fusion import fuse


def random_boxes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes around a few centres, in three classes, with distinct scores."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(count // 4, 2, generator=generator) * 60
    corner = centres.repeat(4, 1) + torch.randn(count, 2, generator=generator) * 1.5
    sides = 14 + torch.randn(count, 2, generator=generator) * 2
    scores = torch.rand(count, generator=generator) * 0.9 + 0.05
    labels = torch.randint(3, (count // 4,), generator=generator).repeat(4)
    return torch.cat([corner, corner + sides], 1).double(), scores.double(), labels


def overlap(a: list[float], b: list[float]) -> float:
    return float(box_iou(torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)))


def wbf_by_hand(boxes, scores, labels, threshold, members):
    """Section 3 of the paper, steps 1 to 7, with Python lists and nothing updated in place."""

    def mean(cluster):
        total = sum(scores[n] for n in cluster)
        return [sum(scores[n] * boxes[n][i] for n in cluster) / total for i in range(4)]

    fused = []
    for label in set(labels):
        clusters: list[list[int]] = []
        numbers = [n for n in range(len(boxes)) if labels[n] == label]
        for n in sorted(numbers, key=lambda n: -scores[n]):
            overlaps = [overlap(boxes[n], mean(cluster)) for cluster in clusters]
            if overlaps and max(overlaps) > threshold:
                clusters[overlaps.index(max(overlaps))].append(n)
            else:
                clusters.append([n])
        for cluster in clusters:
            score = sum(scores[n] for n in cluster) / len(cluster)
            score *= min(len(cluster), members) / members
            fused.append((score, label, mean(cluster), cluster))
    return sorted(fused, key=lambda entry: -entry[0])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("members", [1, 3, 5])
def test_weighted_boxes_equal_the_paper(seed: int, members: int) -> None:
    boxes, scores, labels = random_boxes(48, seed)
    found = fuse("wbf", boxes, scores, labels, 0.55, members)
    expected = wbf_by_hand(boxes.tolist(), scores.tolist(), labels.tolist(), 0.55, members)
    assert found.clusters == [cluster for *_, cluster in expected]
    assert 12 < len(expected) < 40, "some boxes are fused, not all"
    torch.testing.assert_close(found.scores_D, torch.tensor([score for score, *_ in expected]))
    torch.testing.assert_close(found.boxes_D4, torch.tensor([box for _, _, box, _ in expected]))
    assert found.labels_D.tolist() == [label for _, label, *_ in expected]


def test_weighted_boxes_of_two_by_hand() -> None:
    """Scores 0.75 and 0.25: the fused box is three quarters of the way to the first one."""
    boxes = torch.tensor([[0.0, 0, 8, 8], [1, 0, 9, 8]])
    found = fuse("wbf", boxes, torch.tensor([0.75, 0.25]), torch.zeros(2, dtype=torch.int64), 0.55, 3)
    assert found.boxes_D4.tolist() == [[0.25, 0, 8.25, 8]]
    assert found.scores_D.tolist() == pytest.approx([0.5 * 2 / 3])
    (one,) = fuse("wbf", boxes[:1], torch.tensor([0.9]), torch.zeros(1, dtype=torch.int64), 0.55, 3).scores_D
    assert float(one) == pytest.approx(0.3), "only one of three members has found it"


@pytest.mark.parametrize("seed", range(3))
def test_nms_equals_torchvision(seed: int) -> None:
    boxes, scores, labels = random_boxes(48, seed)
    found = fuse("nms", boxes, scores, labels, 0.5, 3)
    kept = batched_nms(boxes, scores, labels, 0.5)
    assert [cluster[0] for cluster in found.clusters] == kept.tolist() and len(kept) < 48
    assert found.scores_D.equal(scores[kept].float()) and found.boxes_D4.equal(boxes[kept].float())
    # Every box is in one cluster, overlaps the cluster's first box and has its class.
    assert sorted(n for cluster in found.clusters for n in cluster) == list(range(48))
    for first, *others in found.clusters:
        assert all(overlap(boxes[first].tolist(), boxes[n].tolist()) > 0.5 for n in others)
        assert all(labels[n] == labels[first] for n in others)


@pytest.mark.parametrize("seed", range(3))
def test_soft_nms_equals_the_papers_pseudocode(seed: int) -> None:
    boxes, scores, labels = random_boxes(32, seed)
    found = fuse("soft_nms", boxes, scores, labels, 0.5, 3)
    rest = dict(enumerate(scores.tolist()))
    expected = []
    while rest:
        best = max(rest, key=lambda n: rest[n])
        if rest[best] < 1e-3:
            break
        expected.append((best, rest.pop(best)))
        for n in rest:
            if labels[n] == labels[best]:
                rest[n] *= math.exp(-(overlap(boxes[best].tolist(), boxes[n].tolist()) ** 2) / 0.5)
    assert [cluster[0] for cluster in found.clusters] == [n for n, _ in expected]
    torch.testing.assert_close(found.scores_D, torch.tensor([score for _, score in expected]))
    assert any(score < float(scores[n]) - 0.1 for n, score in expected)


@pytest.mark.parametrize("kind", ["nms", "soft_nms", "wbf"])
def test_no_boxes_and_boxes_without_area(kind) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert len(fuse(kind, torch.zeros(0, 4), torch.zeros(0), none, 0.5, 2).scores_D) == 0
    flat = torch.tensor([[5.0, 5, 5, 9], [5.0, 5, 5, 9]])
    found = fuse(kind, flat, torch.tensor([0.5, 0.0]), torch.zeros(2, dtype=torch.int64), 0.5, 2)
    assert found.boxes_D4.isfinite().all() and found.scores_D.isfinite().all()
