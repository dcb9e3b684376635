"""Checkpoints on disk: all damage is found and named, and the last intact one is used."""

from __future__ import annotations

import logging
import resource
import shutil
from pathlib import Path

import pytest
import torch
from tiny import mounted

from giantdet.checkpoint.files import (
    MANIFEST,
    STATE,
    SavedTensors,
    damage,
    describe_file,
    manifest_text,
    newest,
    scan,
    write_tensors,
    write_text,
)
from giantdet.checkpoint.saver import Checkpoints
from giantdet.config.types import TrainConfig

RANKS = [f"rank_{rank:05d}.safetensors" for rank in range(3)]
FILES = [*RANKS, STATE, MANIFEST]
VALUES = torch.arange(10.0)


def _write(folder: Path, step: int) -> Path:
    """Write a checkpoint of three ranks: `w` of 10 elements in 4, 4 and 2, `v` only on the first rank."""
    path = folder / f"step_{step}"
    path.mkdir(parents=True)
    for name, first in zip(RANKS, (0, 4, 8), strict=True):
        tensors, firsts = {"weight/w": VALUES[first : first + 4] + step}, {"weight/w": first}
        if first == 0:
            tensors, firsts = tensors | {"weight/v": VALUES[:3]}, firsts | {"weight/v": 0}
        write_tensors(path / name, tensors, firsts)
    write_text(path / STATE, '{"format": 1}\n')
    files = {name: describe_file(path / name) for name in (*RANKS, STATE)}
    about = {"step": step, "images": 8 * step, "score": None, "files": files}
    write_text(path / MANIFEST, manifest_text(about))
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    for step in (9, 10, 11):  # sorted by name, 9 would be last
        _write(folder, step)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "checkpoints")


def test_an_intact_checkpoint_has_no_damage(folder: Path) -> None:
    assert [path.name for path, _ in scan(folder)] == ["step_9", "step_10", "step_11"]
    assert damage(folder / "step_11") == []
    assert newest(folder).name == "step_11"
    (folder / "step_12.partial").mkdir()
    assert newest(folder).name == "step_11", "unfinished checkpoints do not count"
    (folder / "step_11").rename(folder / "step_11.replaced")
    assert newest(folder).name == "step_11.replaced", "killed while it was being replaced by another step_11"


@pytest.mark.parametrize("name", FILES)
def test_a_file_truncated_at_any_byte_is_found_and_named(folder: Path, name: str) -> None:
    path = folder / "step_11" / name
    content = path.read_bytes()
    assert len(content) > 10
    for length in range(len(content)):
        path.write_bytes(content[:length])
        problems = damage(folder / "step_11")
        assert len(problems) == 1 and problems[0].startswith(name), length
        if name != MANIFEST:
            assert problems == [f"{name} has {length} bytes of {len(content)}"]
    path.write_bytes(content + b" ")
    assert len(damage(folder / "step_11")) == 1
    assert newest(folder).name == "step_10"


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found_and_named(folder: Path, name: str) -> None:
    """Flip one bit and all bits of each byte of each file."""
    path = folder / "step_11" / name
    content = path.read_bytes()
    for position in range(len(content)):
        for bits in (1, 255):
            changed = bytearray(content)
            changed[position] ^= bits
            path.write_bytes(bytes(changed))
            problems = damage(folder / "step_11")
            assert len(problems) == 1 and problems[0].startswith(name), position
    assert newest(folder).name == "step_10"
    path.write_bytes(content)
    assert newest(folder).name == "step_11"


@pytest.mark.parametrize("name", FILES)
def test_a_removed_file_is_found_and_named(folder: Path, name: str) -> None:
    (folder / "step_11" / name).unlink()
    assert damage(folder / "step_11") == [f"{name} is missing"]
    assert newest(folder).name == "step_10"


def test_ranks_share_the_verification(folder: Path) -> None:
    for name in RANKS:
        (folder / "step_11" / name).unlink()
    shares = [damage(folder / "step_11", part, 3) for part in range(3)]
    assert shares == [[f"{name} is missing"] for name in RANKS]
    (folder / "step_11" / MANIFEST).unlink()
    assert [damage(folder / "step_11", part, 3) for part in range(3)] == [[f"{MANIFEST} is missing"], [], []]


def test_without_an_intact_checkpoint_all_damage_is_named(folder: Path, tmp_path: Path) -> None:
    for step in (9, 10, 11):
        (folder / f"step_{step}" / RANKS[1]).write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"no complete checkpoint.*step_11: rank_00001.* has 0 bytes.*step_9: r"
    ):
        newest(folder)
    with pytest.raises(ValueError, match="no step_N folder"):
        newest(tmp_path / "nothing")


def test_deepspeeds_own_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "step_4").mkdir()
    (tmp_path / "step_4/mp_rank_00_model_states.pt").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"step_4: saved by an earlier giantdet.*which giantdet [0-9.]+ does not"
    ):
        newest(tmp_path)


def test_slices_across_the_files_of_ranks(folder: Path) -> None:
    saved = SavedTensors(folder / "step_10")
    for first in range(11):
        for last in range(first, 11):
            assert torch.equal(saved.read("weight", "w", first, last), VALUES[first:last] + 10)
    assert torch.equal(saved.read("weight", "v", 1, 3), VALUES[1:3])
    with pytest.raises(ValueError, match="elements 10 to 11 of the weight of w are missing"):
        saved.read("weight", "w", 0, 11)
    with pytest.raises(ValueError, match="elements 0 to 2 of the exp_avg of w are missing"):
        saved.read("exp_avg", "w", 0, 2)
    (folder / "step_10" / STATE).write_text('{"format": 2}')
    with pytest.raises(ValueError, match=r"has format 2; giantdet .* reads only 1"):
        SavedTensors(folder / "step_10")


def test_a_full_disk_raises_an_oserror_that_names_the_file(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=64k"):
        path = tmp_path / "small" / RANKS[0]
        with pytest.raises(OSError, match="No space left on device") as error:
            write_tensors(path, {"weight/w": torch.zeros(100_000)}, {})
        assert error.value.filename == str(path)


def test_a_file_size_limit_raises_an_oserror_that_names_the_file(tmp_path: Path) -> None:
    """Like an exceeded quota, but needs no permission to mount."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write_tensors(tmp_path / RANKS[0], {"weight/w": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename == str(tmp_path / RANKS[0])


def _fails_to_save(folder: Path, why: str, caplog: pytest.LogCaptureFixture) -> None:
    """Saving fails before the engine is used: there is no place to write to."""
    checkpoints = Checkpoints(None, folder, TrainConfig())
    with caplog.at_level(logging.WARNING, "giantdet"):
        checkpoints.save(1)
        checkpoints.save(2)
    assert checkpoints.counters() == {"failed_saves": 2}
    assert len(caplog.messages) == 2 and why in caplog.messages[0], "one line each"
    with pytest.raises(OSError, match=why):
        checkpoints.close()


def test_a_file_in_place_of_the_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "checkpoints").write_text("")
    _fails_to_save(tmp_path / "checkpoints", "File exists", caplog)


def test_no_permission_to_write(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A read-only file system, because root may write whatever a folder's mode is."""
    with mounted(tmp_path / "read_only", "ro"):
        _fails_to_save(tmp_path / "read_only" / "checkpoints", "Read-only file system", caplog)
