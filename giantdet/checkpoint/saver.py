"""Save and resume a run, at every ZeRO stage, on any number of ranks.

Each rank writes its own file into `step_N.partial`; when all are on the disk, the main rank adds the manifest
and renames the folder (`files.py` has the layout, `state.py` the content). A run that is killed at any moment
leaves only complete checkpoints, and perhaps a `.partial` folder that the next save removes.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from giantdet.checkpoint.files import (
    MANIFEST,
    PARTIAL,
    STATE,
    SavedTensors,
    damage,
    describe_file,
    manifest_text,
    scan,
    sync,
    write_tensors,
    write_text,
)
from giantdet.checkpoint.state import check_fit, describe_state, load_counters, load_tensors, local_tensors
from giantdet.config.types import TrainConfig
from giantdet.distributed import comm
from giantdet.distributed.engine import Engine
from giantdet.errors import DivergedError, InputError
from giantdet.optim.agvm import Agvm
from giantdet.optim.ema import WeightEma

logger = logging.getLogger("giantdet")


class _Pending(NamedTuple):
    """A save whose files are being written."""

    step: int
    folder: Path
    about: dict[str, Any]  # for the manifest
    files: Future[dict[str, Any]]


class Checkpoints:
    """The checkpoints of a run. All ranks call each method together.

    `identity` is that of the run (`config/identity.py`). Raises ValueError if a checkpoint does not fit it.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        config: TrainConfig,
        agvm: Agvm | None = None,
        ema: WeightEma | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.identity = identity or {}
        self.engine, self.folder, self.config, self.agvm, self.ema = engine, folder, config, agvm, ema
        self.failed = 0  # number of failed saves
        self.best: float | None = None
        self._error: OSError | None = None  # of the last save
        self._pending: _Pending | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoint")

    # Saving

    def save(self, step: int, score: float | None = None) -> None:
        """Write `step_N`; `score` is that of the latest evaluation. A failure is a warning, see `close`.

        With `train.async_save` this returns as soon as the state is copied to the CPU's memory.
        """
        self.finish()
        partial = self.folder / f"step_{step}{PARTIAL}"
        if not self._succeeds(lambda: self._make_room(partial)):
            return
        tensors, firsts = local_tensors(self.engine, self.ema, copy=self.config.async_save)
        self._require_finite(step, tensors)
        state = (
            json.dumps(describe_state(self.engine, step, self.agvm, self.ema, self.identity), indent=1) + "\n"
        )
        about = {"step": step, "images": self.engine.global_samples, "score": score}
        files = self._writer.submit(_write, partial, tensors, firsts, state)
        self._pending = _Pending(step, partial, about, files)
        if not self.config.async_save:
            self.finish()

    def _require_finite(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Raise DivergedError instead of saving a state from which no run can continue."""
        not_finite = [key for key, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
        if comm.any_rank(bool(not_finite)):
            names = comm.gather_objects(not_finite[:1])
            first = comm.broadcast_object(next((name for found in names for name in found), ""))
            raise DivergedError(
                f"after step {step} the {first.replace('/', ' of ', 1)} is not finite: no checkpoint is "
                "written; lower the learning rate, and resume from an earlier checkpoint"
            )

    def finish(self, wait: bool = True) -> None:
        """Complete the pending save, if there is one; then a resumed run can use it."""
        pending = self._pending
        if pending is None or (not wait and comm.any_rank(not pending.files.done())):
            return
        self._pending = None
        try:
            entries, failure = pending.files.result(), None
        except OSError as error:
            entries, failure = {}, error
        gathered = comm.gather_objects((entries, failure))

        def commit() -> None:
            files: dict[str, Any] = {}
            for written, failed in gathered:
                if failed is not None:
                    raise failed
                files |= written
            self._commit(pending, files)

        if self._succeeds(commit):
            score = pending.about["score"]
            self.best = score if self.best is None else max(self.best, score or self.best)
            if comm.is_main():
                self._remove_old(self.folder / f"step_{pending.step}", pending.about["images"])
        elif comm.is_main():
            shutil.rmtree(pending.folder, ignore_errors=True)

    def close(self) -> None:
        """End the run's saving. Raises OSError if the last save failed."""
        self.finish()
        self._writer.shutdown()
        if self._error is not None:
            raise self._error

    def is_best(self, score: float | None) -> bool:
        """Return whether an evaluation's score is the best so far, and its checkpoint is kept."""
        return self.config.keep_best and score is not None and (self.best is None or score > self.best)

    def counters(self) -> dict[str, int]:
        """Return the counts for the log."""
        return {"failed_saves": self.failed} if self.failed else {}

    def _succeeds(self, action: Callable[[], None]) -> bool:
        """Run `action` on the main rank, warn if it fails; return on all ranks whether it succeeded."""
        failure = None
        if comm.is_main():
            try:
                action()
            except OSError as error:
                failure = error
        self._error = comm.broadcast_object(failure)
        if self._error is not None:
            self.failed += 1
            if comm.is_main():
                where, why = self._error.filename or self.folder, self._error.strerror
                logger.warning("%s: %s: this checkpoint is not saved; the run continues", where, why)
        return self._error is None

    def _make_room(self, partial: Path) -> None:
        """Make the new folder, and remove those that a killed run has left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(left)
        partial.mkdir()

    def _commit(self, pending: _Pending, files: dict[str, Any]) -> None:
        """Write the manifest and rename the folder."""
        write_text(pending.folder / MANIFEST, manifest_text(pending.about | {"files": files}))
        sync(pending.folder)
        target = self.folder / f"step_{pending.step}"
        if (
            target.exists()
        ):  # of another batch, or damaged; under the other name it still counts as a checkpoint
            aside = target.with_name(f"{target.name}.replaced")
            shutil.rmtree(aside, ignore_errors=True)
            target.rename(aside)
        pending.folder.rename(target)
        sync(self.folder)

    def _remove_old(self, newest: Path, images: int) -> None:
        """Remove all but the newest `train.keep` and the best of those that were evaluated.

        A checkpoint that has seen more images than the newest is damaged, or from before a start with
        `train.resume=false`: it is removed, too.
        """
        found = scan(self.folder)
        valid = [
            (path, about) for path, about in found if about and (about["images"] < images or path == newest)
        ]
        kept = {path for path, _ in valid[-self.config.keep :]}
        scored = [(about["score"], path) for path, about in valid if about["score"] is not None]
        if self.config.keep_best and scored:
            kept.add(max(scored)[1])
        for path, _ in found:
            if path not in kept:
                try:  # first renamed to one that does not count: a removal may be interrupted, too
                    path.rename(gone := path.with_name(f"{path.name}{PARTIAL}"))
                    shutil.rmtree(gone)
                except OSError as error:
                    logger.warning("%s cannot be removed: %s", path, error.strerror)

    # Resuming

    def resume(self) -> int:
        """Load the newest complete checkpoint; return the number of steps done, 0 without a checkpoint.

        With another global batch that is the number of steps with as many images. LR, schedule and weight
        decay come from the run's JSON, not from the checkpoint.
        """
        path = self._newest()
        if path is None:
            return 0
        saved = SavedTensors(path)
        check_fit(self.engine, saved, self.identity)
        load_tensors(self.engine, saved, self.ema)
        if self.agvm is not None and saved.state["agvm"] is not None:
            self.agvm.load_state_dict(saved.state["agvm"])
        before = [m for _, m in scan(self.folder) if m and m["images"] <= saved.state["images"]]
        scores = [manifest["score"] for manifest in before if manifest["score"] is not None]
        self.best = comm.broadcast_object(max(scores, default=None))
        return load_counters(self.engine, saved)

    def _newest(self) -> Path | None:
        found = comm.broadcast_object([path for path, _ in scan(self.folder)])
        for path in reversed(found):
            parts = comm.gather_objects(damage(path, comm.rank(), comm.world_size()))
            problems = comm.broadcast_object([problem for part in parts for problem in part])
            if not problems:
                return Path(path)
            if comm.is_main():
                logger.warning("%s is skipped: %s", path, "; ".join(problems))
        if found:
            raise InputError(
                f"{self.folder}: none of its {len(found)} checkpoints is complete; restore one, or start "
                "from the beginning with train.resume=false"
            )
        return None


def _write(folder: Path, tensors: dict[str, Tensor], firsts: dict[str, int], state: str) -> dict[str, Any]:
    """Write and sync this rank's files; return their entries in the manifest. Raises OSError."""
    paths = [folder / f"rank_{comm.rank():05d}.safetensors"]
    write_tensors(paths[0], tensors, firsts)
    if comm.is_main():
        paths.append(folder / STATE)
        write_text(paths[1], state)
    return {path.name: describe_file(path) for path in paths}
