"""The command line as users see it: help, one-line errors, every command on a tiny run."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import REPO, Ended, environment, free_port, launch, logs, run_together, set_path, tiny_run

from giantdet import cli, errors
from giantdet.commands import configs
from giantdet.config.load import load_run, parse_run
from giantdet.errors import LostContactError
from giantdet.evaluation import backends

COMMANDS = (
    "train",
    "eval",
    "predict",
    "export",
    "import-weights",
    "validate-data",
    "configs",
    "make-demo-data",
)
SCRIPT = REPO / "scripts/train.py"


def _run(*command: object) -> Ended:
    """Run a script in a fork, or a module in a new interpreter."""
    return run_together([([sys.executable, *map(str, command)], environment())], fresh=False)[0]


def _one_line(code: int, err: str, *parts: str) -> None:
    """Assert exit code 2 and one line of ours; messages of libraries during imports are ignored."""
    assert code == 2, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "giantdet: error" in line]
    assert len(lines) == 1, err
    assert all(part in lines[0] for part in parts), lines[0]


def _write(folder: Path, raw: dict[str, Any]) -> Path:
    path = folder / "run.json"
    path.write_text(json.dumps(raw))
    return path


def test_help_in_a_separate_process() -> None:
    done = _run("-m", "giantdet.cli", "--help")
    assert done.code == 0
    assert all(command in done.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: giantdet {command}")


def test_ctrl_c_ends_a_command_with_one_line(monkeypatch: Any, capsys: Any) -> None:
    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(configs, "run", interrupted)
    assert cli.main(["configs"]) == 130
    assert capsys.readouterr().err == "giantdet: stopped: Ctrl-C\n"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"train_batchsize": 8}, ["train_batchsize", "did you mean train_batch_size"]),
        ({"giantdet.train.stepz": 8}, ["giantdet.train.stepz", "steps"]),
        ({"giantdet.train.steps": "many"}, ["giantdet.train.steps"]),
        ({"giantdet.model.backbone.name": "resnet51"}, ["unknown backbone 'resnet51'", "resnet50"]),
        (
            {"giantdet.model.backbone.frozen_stages": 2, "giantdet.norm.type": "frozen"},
            [
                "giantdet.model.backbone has no weights, and model.backbone.frozen_stages and norm.type",
                "would freeze its random layers: give pretrained or init_weights, or set",
                "model.backbone.frozen_stages and norm.type to 0 and local",
            ],
        ),
        ({"giantdet.data.size": [64, 72]}, ["data.size must be multiples of 32", "[64, 72]"]),
        ({"giantdet.data.train.annotations": "nowhere.json"}, ["file nowhere.json does not exist"]),
        ({"giantdet.data.val.images": "nowhere"}, ["folder nowhere does not exist"]),
        ({"giantdet.model.num_classes": 2}, ["num_classes is 2", "4 categories"]),
        ({"giantdet.model.init_weights": "no.safetensors"}, ["no.safetensors does not exist"]),
        ({"giantdet.model.backbone.init_weights": "no.pth"}, ["no.pth does not exist"]),
        ({"train_batch_size": 3}, ["train_batch_size 3", "nearest possible"]),
        ({"giantdet.train.output": "/dev/null/run"}, ["/dev/null"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_in_a_run_give_one_line(
    change: dict[str, Any], parts: list[str], demo_data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    raw = tiny_run(demo_data, tmp_path / "out")
    for path, value in change.items():
        set_path(raw, path, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)  # also undoes what comm.start sets
        monkeypatch.setenv(name, {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "1"}.get(name, "0"))
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    code = cli.main(["train", "--deepspeed_config", str(_write(tmp_path, raw))])
    _one_line(code, capsys.readouterr().err, *parts)


def test_missing_or_broken_json_gives_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["train", "--config", str(tmp_path / "no.json")])
    _one_line(code, capsys.readouterr().err, "no.json: no such file")
    (tmp_path / "broken.json").write_text('{"a": 1,}')
    code = cli.main(["train", "--config", str(tmp_path / "broken.json")])
    _one_line(code, capsys.readouterr().err, "broken.json: line 1")


def test_a_bug_in_a_library_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: Any) -> None:
        int("not a number")
        raise AssertionError

    monkeypatch.setattr(configs, "run", broken)
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["configs"])


def test_a_bug_in_giantdet_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ValueError raised in giantdet that is not one of its own error types."""
    source = compile("a, b = [1, 2, 3]", configs.__file__, "exec")

    def broken(options: Any) -> None:
        exec(source, {"__name__": "giantdet.commands.configs"})

    monkeypatch.setattr(configs, "run", broken)
    with pytest.raises(ValueError, match="too many values to unpack"):
        cli.main(["configs"])


def test_errors_carry_their_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = {
        errors.InputError: 2,
        errors.ConfigError: 2,
        errors.DataError: 2,
        errors.DivergedError: 3,
        errors.LostContactError: 4,
        errors.StoppedError: 5,
    }
    for kind, code in codes.items():

        def raising(options: Any, kind: type[errors.GiantdetError] = kind) -> None:
            raise kind("in one line")

        monkeypatch.setattr(configs, "run", raising)
        assert cli.main(["configs"]) == code
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.endswith("in one line\n") and "Traceback" not in err


def test_script_in_one_process(demo_data: Path, tmp_path: Path) -> None:
    """An unknown backbone under python; then a run of two steps, with either spelling of the local rank."""
    run = _write(tmp_path, tiny_run(demo_data, tmp_path / "out"))
    done = _run(SCRIPT, "--deepspeed_config", run, "--local_rank=0", "model.backbone.name=resnet51")
    _one_line(done.code, done.err, "unknown backbone 'resnet51'")
    done = _run(
        SCRIPT,
        "--deepspeed",
        "--deepspeed_config",
        run,
        "--local-rank=0",
        "train.steps=1",
        "train.report=true",
    )
    assert done.code == 0, done.err
    assert (tmp_path / "out/export/model.safetensors").is_file()
    assert (tmp_path / "out/losses.png").is_file()
    assert "could not be made" not in (tmp_path / "out/report.html").read_text()
    assert str(tmp_path / "out/report.html") in done.out


def test_missing_rank_gives_one_line(demo_data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """Rank 0 of two, alone, waits as long as the JSON says: 1.2 seconds."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    run = _write(tmp_path, tiny_run(demo_data, tmp_path / "out", giantdet__train__timeout_minutes=0.02))
    assert cli.main(["train", "--config", str(run)]) == LostContactError.exit_code == 4
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "giantdet: stopped: rank 0 of 2 on " in err and "1/2 clients joined" in err


def test_port_in_use_gives_one_line(demo_data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    run = _write(tmp_path, tiny_run(demo_data, tmp_path / "out"))
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
            monkeypatch.setenv(name, {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "1"}.get(name, "0"))
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        code = cli.main(["train", "--config", str(run)])
    _one_line(code, capsys.readouterr().err, "is in use", "--master_port")


def test_late_rank_gives_one_line() -> None:
    """Rank 1 is alive but silent: the others end within the time-out, also in a group created later."""
    late = launch(REPO / "tests/distributed/worker_late.py", 2)
    assert [end.code for end in late] == [4, 0], logs(late)
    stopped = [line for line in late[0].err.splitlines() if "giantdet: stopped" in line]
    assert len(stopped) == 1 and "Traceback" not in late[0].err
    assert "rank 0 of 2 on " in stopped[0] and "Timed out waiting 3000ms" in stopped[0]


def test_deepspeed_launcher_prints_the_error_once(demo_data: Path, tmp_path: Path) -> None:
    run = _write(tmp_path, tiny_run(demo_data, tmp_path / "out", giantdet__model__num_classes=2))
    port = f"--master_port={free_port()}"
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus=2", port]
    done = _run(*launcher, SCRIPT, "--deepspeed_config", run)
    errors = [line for line in (done.err + done.out).splitlines() if "giantdet: error" in line]
    assert done.code != 0
    assert len(errors) == 1, done.err
    assert "num_classes is 2" in errors[0]
    assert "Traceback" not in done.err


def test_each_reason_is_printed_once_over_all_ranks() -> None:
    """Two ranks stop for one reason, one for another; in the second launch the main rank has no message."""
    worker = REPO / "tests/distributed/worker_words.py"
    same = launch(worker, 3, "bad key", "bad key", "disk full")
    printed = [[line for line in end.err.splitlines() if line in ("bad key", "disk full")] for end in same]
    assert printed == [["bad key"], [], ["disk full"]], logs(same)
    alone = launch(worker, 2, "-", "disk full")
    assert ["disk full" in end.err for end in alone] == [False, True], logs(alone)


def test_print_config_round_trips(demo_data: Path, tmp_path: Path, capsys: Any) -> None:
    run = _write(tmp_path, tiny_run(demo_data, tmp_path / "out"))
    assert cli.main(["train", "--config", str(run), "--print-config", "train.steps=7"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["giantdet"]["train"]["steps"] == 7
    assert printed["giantdet"]["model"]["num_classes"] == 4
    assert printed["train_batch_size"] == 2
    (tmp_path / "again.json").write_text(json.dumps(printed))
    assert cli.main(["train", "--config", str(tmp_path / "again.json"), "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out) == printed
    assert load_run(tmp_path / "again.json").giantdet == parse_run(printed).giantdet
    assert not (tmp_path / "out").exists()


def test_overrides_may_stand_before_and_after_options(
    demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _write(tmp_path, tiny_run(demo_data, tmp_path / "out"))
    options = ["train.steps=3", "--config", str(run), "train.seed=4", "--print-config", "train.steps=7"]
    assert cli.main(["train", *options, "~giantdet.data.val"]) == 0
    printed = json.loads(capsys.readouterr().out)["giantdet"]
    assert (printed["train"]["steps"], printed["train"]["seed"], printed["data"]["val"]) == (7, 4, None)
    assert cli.parse(["plan", str(run), "a=1", "--gpus", "8", "b=2"]).overrides == ["a=1", "b=2"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config", "x", "a=1", "--print-config", "nonsense"],
        ["train", "--config", "x", "--prnt-config=1"],
        ["doctor", "a=1"],
    ],
)
def test_other_arguments_that_are_left_are_errors(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        cli.parse(arguments)
    assert "unrecognized arguments: " + arguments[-1] in capsys.readouterr().err


def test_verbose_shows_the_lines_of_deepspeed(demo_data: Path, tmp_path: Path, capsys: Any) -> None:
    run = str(_write(tmp_path, tiny_run(demo_data, tmp_path / "out")))
    for options, level in ((["--verbose"], "info"), (["--verbose", "log_level=debug"], "debug"), ([], None)):
        assert cli.main(["train", "--config", run, "--print-config", *options]) == 0
        assert json.loads(capsys.readouterr().out).get("log_level") == level


def test_invalid_bn_size_is_found_before_anything_is_built(
    demo_data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = 'norm.fpn={"type": "cgbn", "bn_size": 3}'
    run = _write(tmp_path, tiny_run(demo_data, tmp_path / "out", giantdet__model__fpn__norm="batch"))
    words = "giantdet.norm.fpn: bn_size 3 does not fit 4 ranks of 2 images; sizes that fit: 2, 4, 8"
    assert cli.main(["plan", str(run), bad, "--gpus", "4"]) == 2
    assert words in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.main(["train", "--config", str(run), "--print-config", bad]) == 2
    assert words in capsys.readouterr().err


def test_configs_lists_every_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["configs", str(REPO / "ds_configs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list((REPO / "ds_configs").glob("*.json")))
    assert all(len(line.split(": ", 1)[1]) > 10 for line in lines)
    (tmp_path / "broken.json").write_text("{")
    assert cli.main(["configs", str(tmp_path)]) == 0
    assert "not a JSON object" in capsys.readouterr().out
    assert cli.main(["configs", str(tmp_path / "no")]) == 2


def test_validate_data(demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations, images = str(demo_data / "val.json"), str(demo_data / "val")
    pictures = tmp_path / "pictures"
    assert cli.main(["validate-data", annotations, images, "--pictures", str(pictures)]) == 0
    assert "objects by size" in capsys.readouterr().out
    drawn = sorted(path.name.split("_", 1)[1] for path in (pictures / "val").iterdir())
    names = [image["file_name"] for image in json.loads(Path(annotations).read_text())["images"]]
    assert drawn == sorted(Path(name).stem + ".png" for name in names)[:12]
    content = json.loads(Path(annotations).read_text())
    content["annotations"][0]["category_id"] = 99
    (tmp_path / "bad.json").write_text(json.dumps(content))
    assert cli.main(["validate-data", str(tmp_path / "bad.json"), images]) == 1
    assert "99" in capsys.readouterr().out
    assert cli.main(["validate-data", str(tmp_path / "no.json"), images]) == 2
    _one_line(2, capsys.readouterr().err, "no.json")


def test_make_demo_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--train-images", "2", "--val-images", "1", "--size", "64"]
    assert cli.main(["make-demo-data", str(tmp_path / "demo"), *arguments]) == 0
    assert len(list((tmp_path / "demo/train").iterdir())) == 2
    with pytest.raises(SystemExit) as ended:
        cli.main(["make-demo-data", str(tmp_path), "--train-images", "0"])
    assert ended.value.code == 2
    assert "must be at least 1" in capsys.readouterr().err


def test_predict(tiny_export: Path, demo_data: Path, tmp_path: Path, capsys: Any) -> None:
    image = next(iter(sorted((demo_data / "val").iterdir())))
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / image.name
    twin.write_bytes(image.read_bytes())
    output = tmp_path / "out"
    arguments = [
        "predict",
        str(tiny_export),
        str(image),
        str(twin),
        "--threshold",
        "0",
        "--output",
        str(output),
    ]
    assert cli.main(arguments) == 0
    results = json.loads((output / "results.json").read_text())
    assert {r["file_name"] for r in results} == {str(image), str(twin)}
    pictures = sorted(p.name for p in output.glob("*.png"))
    assert pictures == [f"{image.stem}.png", f"{image.stem}_2.png"], "files of the same name are both kept"
    assert all(Image.open(output / name).width >= 64 for name in pictures)
    capsys.readouterr()


def test_errors_of_predict(tiny_export: Path, demo_data: Path, tmp_path: Path, capsys: Any) -> None:
    out = ["--output", str(tmp_path / "out")]
    for arguments, part in (
        ([str(tiny_export), str(tmp_path / "no.jpg")], "no.jpg: no such image"),
        ([str(tmp_path), str(demo_data / "val")], "not a giantdet export"),
        ([str(tiny_export), str(demo_data / "val.json")], "not a readable image"),
        ([str(tiny_export), str(tmp_path)], "no image in this folder"),
    ):
        code = cli.main(["predict", *arguments, *out])
        _one_line(code, capsys.readouterr().err, part)
    source = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(source)
    before = source.read_bytes()
    code = cli.main(["predict", str(tiny_export), str(source), "--output", str(tmp_path)])
    _one_line(code, capsys.readouterr().err, "a.png: its overlay would replace it")
    assert source.read_bytes() == before


def test_eval_refuses_unknown_categories(
    tiny_export: Path, demo_data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "1"}.get(name, "0"))
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    images = ["--images", str(demo_data / "val"), "--workers", "0"]
    results = tmp_path / "new/results.json"
    code = cli.main(
        [
            "eval",
            str(tiny_export),
            "--annotations",
            str(demo_data / "val.json"),
            *images,
            "--results",
            str(results),
        ]
    )
    assert code == 0
    assert "AP50" in capsys.readouterr().out
    assert isinstance(json.loads(results.read_text()), list)
    content = json.loads((demo_data / "val.json").read_text())
    content["categories"].append({"id": 50, "name": "hexagon"})
    (tmp_path / "val.json").write_text(json.dumps(content))
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    code = cli.main(["eval", str(tiny_export), "--annotations", str(tmp_path / "val.json"), *images])
    _one_line(code, capsys.readouterr().err, "category 'hexagon' (id 50)", "export0: circle")
    monkeypatch.setattr(backends, "_hotcoco", None)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    where = ["--annotations", str(demo_data / "val.json"), *images]
    code = cli.main(["eval", str(tiny_export), *where, "--backend", "hotcoco"])
    _one_line(code, capsys.readouterr().err, "not installed", 'pip install "hotcoco>=1.3"')
