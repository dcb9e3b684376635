"""Parameter groups: every trainable parameter once, in the right group, with a name."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from tiny import MODEL
from torch import nn

from giantdet.architectures import build_model
from giantdet.config.architectures.common import NormConfig
from giantdet.config.architectures.mask_rcnn import MaskRcnnConfig
from giantdet.optim.param_groups import group_table, parameter_groups


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.table = nn.Parameter(torch.zeros(3, 4))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)

    def no_weight_decay(self) -> set[str]:
        return {"table"}


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(Part())
        self.two = nn.Linear(4, 2, bias=False)


def test_decay_by_dimension_and_by_timms_list() -> None:
    model = Whole()
    groups = {group["name"]: group for group in parameter_groups(model, 0.1, 0.01)}
    part = model.one[0]
    same = lambda found, wanted: [id(p) for p in found] == [id(p) for p in wanted]  # noqa: E731
    assert set(groups) == {"one", "one/no_decay", "two"}, "a module without biases has no empty group"
    assert same(groups["one"]["params"], [part.linear.weight])
    exempt = [part.table, part.linear.bias, part.norm.weight, part.norm.bias]
    assert same(groups["one/no_decay"]["params"], exempt)
    assert [groups[n]["weight_decay"] for n in ("one", "one/no_decay", "two")] == [0.1, 0.0, 0.1]
    assert all(group["lr"] == 0.01 for group in groups.values())
    assert all("lr" not in group for group in parameter_groups(model, 0.1))


def test_decay_of_everything() -> None:
    groups = parameter_groups(Whole(), 0.1, decay_all=True)
    assert {group["name"]: group["weight_decay"] for group in groups} == {"one": 0.1, "two": 0.1}
    trainable = [p for p in Whole().parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trainable)


def test_detector_has_each_trainable_parameter_once() -> None:
    config = {**MODEL, "num_classes": 4, "backbone": {"name": "test_resnet", "frozen_stages": 2}}
    model = build_model(MaskRcnnConfig.model_validate(config), (64, 64), NormConfig(type="local"))
    groups = parameter_groups(model, 0.05, 0.1)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len(ids) < len(list(model.parameters())), "the frozen stages are left out"
    modules = {group["name"].removesuffix("/no_decay") for group in groups}
    assert modules == {"backbone", "fpn", "rpn", "box_head", "mask_head"}
    torch.optim.AdamW(groups)  # accepts the groups as they are


def test_position_embeddings_of_a_vit_are_not_decayed() -> None:
    config = {**MODEL, "num_classes": 4, "backbone": {"name": "test_vit", "window": 2}}
    model = build_model(MaskRcnnConfig.model_validate(config), (64, 64), NormConfig(type="local"))
    groups = {group["name"]: group for group in parameter_groups(model, 0.05)}
    named = {id(p): name for name, p in model.named_parameters()}
    undecayed = [named[id(p)] for p in groups["backbone/no_decay"]["params"]]
    assert any("pos_embed" in name for name in undecayed)
    assert not any("pos_embed" in named[id(p)] for p in groups["backbone"]["params"])


def test_table_counts_parameters_partitioned_by_zero3() -> None:
    groups = parameter_groups(Whole(), 0.1, 0.01)
    lines = group_table(groups).splitlines()
    assert [line.split()[0] for line in lines] == ["group", "one/no_decay", "one", "two"]
    assert lines[3].split()[1:] == ["1", "8", "0.1", "0.01", "-"]
    empty = nn.Parameter(torch.zeros(0))
    empty.ds_shape = torch.Size((1000, 1000))  # as DeepSpeed leaves a partitioned parameter
    table = group_table([{"params": [empty], "name": "giant", "weight_decay": 0.0}])
    assert "1,000,000" in table


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "test_resnet"]
)
def test_layer_decay_is_timms_shifted_by_one_layer(name: str) -> None:
    """timm scales the top layer of a model without classifier by 1, ViTDet by one decay."""
    with torch.device("meta"):
        body = timm.create_model(name, num_classes=0)
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"body": body}), "head": Part()})
    named = {id(p): n for n, p in model.named_parameters()}
    mine = {named[id(p)]: g["lr"] for g in parameter_groups(model, 0.1, 2.0, None, 0.7) for p in g["params"]}
    theirs = {}
    for group in param_groups_layer_decay(body, 0.1, layer_decay=0.7):
        theirs |= {named[id(p)]: 2.0 * 0.7 * group["lr_scale"] for p in group["params"]}
    assert len(set(theirs.values())) > 4
    assert mine == pytest.approx(theirs | {n: 2.0 for n in mine if n.startswith("head")})


def test_layer_decay_of_vitdet() -> None:
    """`get_vit_lr_decay_rate` of detectron2: rate ** (layers + 1 - id); id 0: embeddings, i + 1: block i."""
    config = {**MODEL, "num_classes": 4, "backbone": {"name": "test_vit", "window": 2}}
    model = build_model(MaskRcnnConfig.model_validate(config), (64, 64), NormConfig(type="local"))
    named = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.05, 1.0, None, 0.5, {"rpn": 10.0})
    found = {named[id(p)]: group["lr"] for group in groups for p in group["params"]}
    depth = len(model.backbone.body.blocks)
    for name, lr in found.items():
        wanted = 10.0 if name.startswith("rpn") else 1.0
        if name.startswith("backbone"):
            number = 0
            if ".blocks." in name:
                number = int(name.split(".blocks.")[1].split(".")[0]) + 1
            elif not any(word in name for word in ("pos_embed", "patch_embed")):
                continue  # the final norm, which ViTDet does not have
            wanted = 0.5 ** (depth + 1 - number)
        assert lr == wanted, name


def test_unknown_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="no module neck with trainable parameters; there are one, two"):
        parameter_groups(Whole(), 0.1, 0.01, None, None, {"neck": 2.0})
    with pytest.raises(ValueError, match="no part of the model knows its layers"):
        parameter_groups(Whole(), 0.1, 0.01, None, 0.9)
