"""Every file format gives the same weights, and no code in a file runs."""

from __future__ import annotations

import argparse
import collections
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from giantdet.config.architectures.common import BackboneConfig
from giantdet.layers.backbone import build_backbone
from giantdet.layers.weight_files import read_tensors
from giantdet.layers.weights import load_backbone_weights

SIZE = (64, 64)
State = dict[str, Tensor]


def weights(seed: int = 1, name: str = "test_resnet") -> State:
    torch.manual_seed(seed)
    return timm.create_model(name).state_dict()


def under(prefix: str, state: State) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def loaded(file: Path, name: str = "test_resnet") -> Any:
    config = BackboneConfig(name=name, init_weights=str(file), window=0)
    backbone = build_backbone(config, SIZE)
    load_backbone_weights(backbone, config)
    return backbone.eval()


def same(body: torch.nn.Module, state: State) -> bool:
    return all(torch.equal(tensor, state[key].to(tensor)) for key, tensor in body.state_dict().items())


class Hyperparameters(dict[str, Any]):
    """A class that the reader of the file does not have, like those of Lightning and mmengine."""


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
OTHER = weights(2)
FORMS: dict[str, Callable[[State], Any]] = {
    "state dict": lambda s: s,
    "ordered": collections.OrderedDict,
    "float16": lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    "parameters": lambda s: {k: torch.nn.Parameter(v, False) for k, v in s.items()},
    "model": lambda s: {"model": s, "__author__": "x", "matching_heuristics": True},
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": OPTIMIZER},
    "DDP": lambda s: under("module.", s),
    "compiled": lambda s: {"model": under("_orig_mod.", s)},
    "compiled in DDP": lambda s: {"model": under("module._orig_mod.", s)},
    "DDP compiled": lambda s: under("_orig_mod.module.", s),
    "compiled member": lambda s: under("model._orig_mod.", s),
    "DeepSpeed": lambda s: {"module": s, "ds_version": "0.19", "param_shapes": [{"a": torch.Size([2])}]},
    "Lightning": lambda s: {
        "state_dict": under("model.", s) | {"loss.weight": torch.ones(2)},
        "hyper_parameters": Hyperparameters(lr=0.1),
        "callbacks": {"ModelCheckpoint": {"best": torch.tensor(0.5), "dir": Path("x")}},
        "pytorch-lightning_version": "2.5",
    },
    "Lightning with DeepSpeed": lambda s: {"module": under("_forward_module.net.", s)},
    "timm training": lambda s: {
        "state_dict": OTHER,
        "state_dict_ema": s,
        "optimizer": OPTIMIZER,
        "args": argparse.Namespace(lr=0.1, output=Path("x")),
        "metric": np.float64(0.5),
        "history": np.ones(2),
    },
    "DeiT": lambda s: {"model": OTHER, "model_ema": s, "args": argparse.Namespace()},
    "EMA wrapper": lambda s: {"model": OTHER, "ema": {"module": s, "decay": 0.9}},
    "EMA member": lambda s: {"state_dict": under("net.", OTHER) | under("ema.module.", s)},
    "DINO": lambda s: {
        "student": under("module.backbone.", OTHER) | {"module.head.mlp.weight": torch.ones(2)},
        "teacher": under("backbone.", s) | {"head.mlp.weight": torch.ones(2)},
    },
    "MoCo": lambda s: {
        "state_dict": under("module.encoder_q.", s)
        | under("module.encoder_k.", OTHER)
        | {"queue": torch.ones(2)}
    },
    "MoCo v3": lambda s: {
        "state_dict": under("module.base_encoder.", s) | under("module.momentum_encoder.", OTHER)
    },
    "averages without statistics": lambda s: {
        "state_dict": s,
        "state_dict_ema": {k: v for k, v in OTHER.items() if "running" not in k},
    },
    "mmdetection": lambda s: {
        "meta": Hyperparameters(),
        "state_dict": under("backbone.", s)
        | {"neck.weight": torch.ones(2), "rpn_head.weight": torch.ones(2)},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_weights(form: str, tmp_path: Path) -> None:
    state = weights()
    torch.save(FORMS[form](state), tmp_path / "w.ckpt")
    if form == "float16":
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    backbone = loaded(tmp_path / "w.ckpt")
    assert same(backbone.body, state)
    reference = timm.create_model("test_resnet", features_only=True).eval()
    reference.load_state_dict({k: v for k, v in state.items() if k in reference.state_dict()})
    image = torch.rand(1, 3, *SIZE)
    for mine, theirs in zip(backbone(image), reference(image)[-4:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "form", ["timm training", "DeiT", "state_dict", "DDP", "DDP compiled", "compiled in DDP"]
)
def test_the_selection_equals_timms(form: str, tmp_path: Path) -> None:
    content = FORMS[form](weights())
    content.pop("metric", None)  # timm refuses to unpickle it, as it does paths
    content.pop("history", None)
    if "args" in content:
        content["args"] = argparse.Namespace(lr=0.1)
    torch.save(content, tmp_path / "w.pth")
    assert same(loaded(tmp_path / "w.pth").body, timm.models.load_state_dict(str(tmp_path / "w.pth")))


@pytest.mark.parametrize("prefix", ["module.", "teacher.backbone.", "encoder."])
def test_vits_are_found_before_their_positions_are_resampled(prefix: str, tmp_path: Path) -> None:
    state = weights(name="test_vit")
    torch.save(under(prefix, state) | {"loss.center": torch.ones(2)}, tmp_path / "w.pth")
    torch.save(state, tmp_path / "plain.pth")
    assert same(
        loaded(tmp_path / "w.pth", "test_vit").body,
        loaded(tmp_path / "plain.pth", "test_vit").body.state_dict(),
    )


def test_loaded_and_skipped_weights_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="giantdet")
    file = tmp_path / "w.pth"
    state = weights()
    number = len(state)

    def log_of(form: str) -> str:
        caplog.clear()
        torch.save(FORMS[form](state), file)
        loaded(file)
        return caplog.text

    log = log_of("timm training")
    assert "WARNING" in log and f"{file}: took the weights under 'state_dict_ema.', not 'state_dict.'" in log
    assert (
        "averages before raw weights, as timm does" in log
        and f"left out tensors of state_dict ({number})" in log
    )
    assert "without running code" not in log, "namespaces, paths and NumPy values do not cause a warning"
    assert "not 'state_dict.module.encoder_k.' (the usual choice); left out tensors of" in log_of("MoCo")
    log = log_of("mmdetection")
    assert "took the weights under 'state_dict.backbone.'; left out tensors of neck (1), rpn_head (1)" in log
    assert f"without running code: {__name__}.Hyperparameters" in log
    assert "left out tensors of nothing" in log_of("DDP")
    assert "took" not in log_of("state dict")
    log = log_of("averages without statistics")
    assert f"under 'state_dict.'; left out tensors of state_dict_ema ({number - 2 * norms_of(state)})" in log


def norms_of(state: State) -> int:
    return sum(key.endswith("running_mean") for key in state)


def test_two_sets_of_weights_of_unknown_meaning_are_refused(tmp_path: Path) -> None:
    torch.save({"generator": weights(1), "critic": weights(2)}, tmp_path / "w.pth")
    with pytest.raises(ValueError) as raised:
        loaded(tmp_path / "w.pth")
    assert str(raised.value) == (
        f"{tmp_path}/w.pth has several complete sets of weights, under 'generator.', 'critic.': save one of "
        "them to a file of its own with torch.save"
    )


def test_the_name_of_a_file_does_not_matter(tmp_path: Path) -> None:
    state = weights()
    save_file(state, tmp_path / "w.pth")
    torch.save(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    for name in ("w.pth", "w.safetensors", "old.pth.tar"):
        assert same(loaded(tmp_path / name).body, state), name


def test_folders_of_files(tmp_path: Path) -> None:
    state = weights()
    torch.save(state, tmp_path / "pytorch_model.bin")
    torch.save({"lr": 1}, tmp_path / "training_args.bin")
    assert same(loaded(tmp_path).body, state)
    save_file(weights(2), tmp_path / "model.safetensors")
    save_file(weights(3), tmp_path / "open_clip_model.safetensors")
    assert same(loaded(tmp_path).body, weights(2))
    (tmp_path / "two").mkdir()
    for name in ("a.pth", "b.pth"):
        torch.save(state, tmp_path / "two" / name)
    with pytest.raises(ValueError, match=r"two has 2 files of weights \(a.pth, b.pth\); name one of them"):
        loaded(tmp_path / "two")


def test_a_detector_of_torchvision_is_not_a_backbone(tmp_path: Path) -> None:
    torch.save(
        under("backbone.body.", weights()) | {"backbone.fpn.inner_blocks.0.0.weight": torch.ones(1)},
        tmp_path / "w.pth",
    )
    with pytest.raises(
        ValueError, match=r"is a whole detector of torchvision: name it in model\.init_weights"
    ):
        loaded(tmp_path / "w.pth")


class Runs:
    """Calls `function` when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("function", ["eval", "os.system", "Path.touch"])
@pytest.mark.parametrize("beside", [True, False], ids=["beside weights", "alone"])
def test_no_code_in_a_file_runs(function: str, beside: bool, new: bool, tmp_path: Path) -> None:
    marker, file = tmp_path / "ran", tmp_path / "w.pth"
    command = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    evil = {
        "eval": Runs(eval, command),
        "os.system": Runs(os.system, f"touch {marker}"),
        "Path.touch": Runs(Path.touch, marker),
    }[function]
    content = {"args": evil, **({"model": weights()} if beside else {})}
    torch.save(content, file, _use_new_zipfile_serialization=new)
    if beside and new and function == "eval":
        assert same(loaded(file).body, weights())
    else:
        with pytest.raises(
            ValueError, match=r"is not a plain file of tensors; other Python objects .*could run code"
        ):
            loaded(file)
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists(), "the file does not run code when unpickled normally"


def test_the_backbone_of_an_export(tiny_export: Path) -> None:
    state = read_tensors(tiny_export)
    backbone = loaded(tiny_export)
    assert same(backbone.body, {key.removeprefix("backbone.body."): tensor for key, tensor in state.items()})
