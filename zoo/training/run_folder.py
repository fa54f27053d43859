"""The folder of a training run: its config, metrics, checkpoints, result, and the rules of using it again.

run.json       config and corpus fingerprint; another config is refused
metrics.jsonl  one line per step    checkpoints/    result.json    curve.png
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from zoo.durable import hold_lock, sync_folder, write_file
from zoo.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoint_steps,
    clean_folder,
    load_newest,
    save_checkpoint,
)

RUN, METRICS, RESULT, CURVE, CHECKPOINTS, LOCK = (
    "run.json", "metrics.jsonl", "result.json", "curve.png", "checkpoints", "run.lock",
)  # fmt: skip


class RunFolder:
    """A run's folder. `open` checks everything and changes nothing; `start` begins to write.

    path: the folder; need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None
        self._metrics: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def open(self, config: dict[str, Any], corpus: str, *, resume: bool | None) -> Checkpoint | None:
        """The checkpoint to go on from, or None to begin.

        config: the run's, as plain data. corpus: fingerprint.
        resume: None goes on if there is something to go on from; True wants that; False begins anew.
        Raises CheckpointError if the folder belongs to another config or corpus, or its newest checkpoint is corrupt.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{self.path} is a file; --out takes a folder")
        if resume is False:
            return None
        run = self._read_run()
        if run is not None:
            self._refuse_other(run["config"], run["corpus"], config, corpus)
        checkpoint = load_newest(self.checkpoints)
        if run is None and checkpoint is None:
            self._refuse_foreign_files()
        if checkpoint is not None:
            self._refuse_other(checkpoint.config, checkpoint.corpus, config, corpus)
        elif resume:
            raise CheckpointError(f"--resume: {self.path} has no checkpoint to go on from; leave --resume out to begin")
        return checkpoint

    def start(self, config: dict[str, Any], corpus: str, step: int, *, fresh: bool) -> list[dict[str, Any]]:
        """Take the folder for this run, set an older run aside if `fresh`, and cut the metrics back to `step`.

        Returns the metrics of steps 1..step. Raises CheckpointError if another process is at work in the folder, or
        the metrics are damaged.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if fresh:
            self._set_aside()
        newest = checkpoint_steps(self.checkpoints)[-1:]
        if newest != ([step] if step else []):
            raise CheckpointError(f"the checkpoints in {self.path} changed while this run was starting; start it again")
        records = self._read_metrics(step)
        clean_folder(self.checkpoints)
        if not (self.path / RUN).exists():
            self.write_json(RUN, {"config": config, "corpus": corpus})
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_file(self.path / METRICS, lines.encode())
        self._metrics = open(self.path / METRICS, "a", encoding="utf-8")  # noqa: SIM115 closed in close()
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Add a line to the metrics; it survives the death of the process."""
        assert self._metrics is not None
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, after the metrics up to it are on the disk."""
        assert self._metrics is not None
        os.fsync(self._metrics.fileno())
        save_checkpoint(self.checkpoints, checkpoint)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Replace a JSON file of the folder, atomically."""
        write_file(self.path / name, (json.dumps(content, indent=1) + "\n").encode())

    def close(self) -> None:
        """Let go of the folder."""
        for handle in (self._metrics, self._lock):
            if handle is not None:
                handle.close()
        self._metrics = self._lock = None

    def _read_run(self) -> dict[str, Any] | None:
        path = self.path / RUN
        if not path.exists():
            return None
        try:
            run = json.loads(path.read_bytes())
            return {"config": dict(run["config"]), "corpus": str(run["corpus"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; move it away, or take another --out") from None

    def _refuse_other(self, theirs: dict[str, Any], their_corpus: str, ours: dict[str, Any], our_corpus: str) -> None:
        changes = _differences(theirs, ours)
        if changes:
            shown = "; ".join(changes[:5]) + (f"; and {len(changes) - 5} more" if len(changes) > 5 else "")
            raise CheckpointError(
                f"{self.path} holds a run with another config: {shown}. Take another --out, or --fresh to begin anew"
            )
        if their_corpus != our_corpus:
            raise CheckpointError(
                f"{self.path} holds a run on another corpus: the files' names or contents have changed. "
                "Take another --out, or --fresh to begin anew"
            )

    def _refuse_foreign_files(self) -> None:
        for name in (METRICS, RESULT, CURVE):
            if (self.path / name).exists():
                raise CheckpointError(
                    f"{self.path / name} would be overwritten, and without {RUN} it is not known to be of this run; "
                    "move it away, or take another --out"
                )

    def _take_lock(self) -> None:
        try:
            self._lock = hold_lock(self.path / LOCK)
        except BlockingIOError:
            raise CheckpointError(f"another process is training in {self.path}; wait, or take another --out") from None

    def _set_aside(self) -> None:
        """Move the files of an older run into previous-1, previous-2, ..."""
        old = [name for name in (RUN, METRICS, RESULT, CURVE, CHECKPOINTS) if (self.path / name).exists()]
        if not old:
            return
        number = 1
        while (self.path / f"previous-{number}").exists():
            number += 1
        target = self.path / f"previous-{number}"
        target.mkdir()
        for name in old:
            os.rename(self.path / name, target / name)
        sync_folder(self.path)

    def _read_metrics(self, step: int) -> list[dict[str, Any]]:
        """Records of steps 1..step; later lines, and a last one cut short, are left out."""
        path = self.path / METRICS
        records: list[dict[str, Any]] = []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        for number, line in enumerate(lines, start=1):
            if len(records) == step:
                break
            try:
                record = json.loads(line)
                found = record["step"]
            except (ValueError, KeyError, TypeError):
                found = None
            if found != len(records) + 1:
                raise CheckpointError(f"{path}, line {number} is damaged: wanted the record of step {len(records) + 1}")
            records.append(record)
        if len(records) < step:
            raise CheckpointError(
                f"{path} has {len(records)} steps, the checkpoint has {step}; put the file back, or begin with --fresh"
            )
        return records


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Where two configs differ, as `context: 128 there, 256 here`."""
    if isinstance(old, dict) and isinstance(new, dict):
        told = []
        for key in dict.fromkeys([*old, *new]):
            told += _differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
        return told
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new)) for line in _differences(*pair, f"{where}[{i}]")]
    if isinstance(old, list) and isinstance(new, list):
        return [f"{where}: {len(old)} entries there, {len(new)} here"]
    return [] if old == new else [f"{where}: {old!r} there, {new!r} here"]
