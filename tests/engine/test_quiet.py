"""What is kept off the screen of a run, and what never is; trackers that cannot be used."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_run

from giantdet import cli
from giantdet.config.load import parse_run
from giantdet.config.resolve import resolve
from giantdet.engine.quiet import quieten
from giantdet.engine.trackers import TRACKERS, prepare_trackers, write_config
from giantdet.errors import ConfigError

DEPRECATED = "`torch.distributed.all_gather_into_tensor` is deprecated."


def warned_by(module: str, category: type[Warning], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a warning that blames a module is shown to users, whose filters are Python's own."""
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        warnings.simplefilter("default")
        quieten()
        warnings.warn_explicit(DEPRECATED, category, "file.py", 83, module=module)
    return bool(seen)


@pytest.mark.parametrize(
    ("module", "category", "shown"),
    [
        ("torch.distributed.c10d_logger", FutureWarning, False),
        ("timm.models.layers", DeprecationWarning, False),
        ("deepspeed", FutureWarning, False),
        ("torch.distributed.c10d_logger", UserWarning, True),
        ("torch.optim.lr_scheduler", RuntimeWarning, True),
        ("giantdet.engine.train", FutureWarning, True),
        ("torchmetrics.functional", FutureWarning, True),
        ("__main__", FutureWarning, True),
    ],
)
def test_only_deprecations_of_named_libraries_are_hidden(
    module: str, category: type[Warning], shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert warned_by(module, category, monkeypatch) is shown


def test_the_users_own_filters_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", ["error"])
    with warnings.catch_warnings():
        before = list(warnings.filters)
        quieten()
        assert warnings.filters == before


def test_of_deepspeeds_messages_one_is_hidden(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    quieten()
    quieten()
    logger = logging.getLogger("DeepSpeed")
    monkeypatch.setattr(logger, "propagate", False)  # as DeepSpeed sets it
    logger.addHandler(caplog.handler)
    try:
        logger.warning("**** You are using ZeRO with an untested optimizer, proceed with caution *****")
        logger.warning("5 pytorch allocator cache flushes since last step")
        logger.error("an error")
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == ["5 pytorch allocator cache flushes since last step", "an error"]


def test_what_is_logged_begins_with_the_package(monkeypatch: Any, capsys: Any) -> None:
    def logs(options: object) -> None:
        logging.getLogger("giantdet.layers.weights").warning("ours")
        logging.getLogger("urllib3.connectionpool").warning("theirs")

    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr("giantdet.commands.configs.run", logs)
    assert cli.main(["configs"]) == 0
    assert capsys.readouterr().err == "giantdet: ours\nurllib3: theirs\n"


@pytest.mark.parametrize("name", [name for name, tracker in TRACKERS.items() if tracker.package])
def test_a_missing_package_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = TRACKERS[name].package
    run = resolve(parse_run(tiny_run(tmp_path, tmp_path, **{f"{name}__enabled": True})), 1, 10)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "giantdet.engine.trackers.find_spec", lambda wanted: None if wanted == package else find(wanted)
    )
    with pytest.raises(ConfigError) as raised:
        prepare_trackers(run)
    assert str(raised.value) == f"{name}.enabled needs the package {package}: pip install {package}"


def test_trackers_write_to_the_runs_folder_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", "")
    monkeypatch.delenv("COMET_OFFLINE_DIRECTORY")
    monkeypatch.setattr("giantdet.engine.trackers.find_spec", lambda package: package)
    output = tmp_path / "out"
    raw = tiny_run(
        tmp_path,
        output,
        tensorboard__enabled=True,
        csv_monitor={"enabled": True, "output_path": "mine", "job_name": "job"},
        wandb__enabled=True,
        comet__enabled=True,
    )
    run = resolve(parse_run(raw), 1, 10)
    prepare_trackers(run)
    assert run.monitors == ("tensorboard", "csv_monitor", "wandb", "comet")
    assert (os.environ["WANDB_DIR"], os.environ["COMET_OFFLINE_DIRECTORY"]) == ("elsewhere", str(output))
    given = run.deepspeed_json()
    assert given["tensorboard"] == {"enabled": True, "output_path": str(output), "job_name": "tensorboard"}
    assert given["csv_monitor"] == {"enabled": True, "output_path": "mine", "job_name": "job"}


def test_comet_gets_pictures_at_their_x_and_settings_without_its_key(tmp_path: Path) -> None:
    """The calls as comet_ml 3.58 declares them, with which an OfflineExperiment was tried."""
    seen: list[Any] = []

    class Experiment:
        def log_image(self, image_data: Any, name: str | None = None, step: int | None = None) -> None:
            seen.append((image_data, name, step))

        def log_parameters(self, parameters: dict[str, Any]) -> None:
            seen.append(parameters)

    monitor = SimpleNamespace(experiment=Experiment())
    show = TRACKERS["comet"].show
    assert show is not None
    show(monitor, "giantdet/val/1_cat", "picture", 32)  # type: ignore[arg-type]
    comet = {"enabled": True, "api_key": "secret"}
    run = resolve(parse_run(tiny_run(tmp_path, tmp_path, comet=comet)), 1, 10)
    write_config(run, SimpleNamespace(comet_monitor=monitor))
    assert seen[0] == ("picture", "giantdet/val/1_cat", 32)
    assert seen[1]["optimizer"]["type"] == "AdamW" and "secret" not in str(seen[1])
