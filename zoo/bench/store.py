"""The result file of a run: written after every measurement, picked up by the next run of the same command.

A row is a mapping with at least `mixer`, `kind` ("forward", "train step", "decode", "conformance", "smoke run") and
`outcome`: DONE, SKIPPED (there was no time; `reason`) or FAILED (the mixer raised; `error`, `trace`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from sequence_mixer.errors import ConfigError
from zoo.durable import hold_lock, write_file

FORMAT = 2
DONE, SKIPPED, FAILED = "done", "skipped", "failed"
RESULTS, PICTURE, LOCK = "results.json", "results.png", "run.lock"

Row = dict[str, Any]
Rows = dict[str, Row]


class Results:
    """Rows by case key, with what they were measured on; saved atomically after each row.

    folder: holds results.json and results.png; other files in it are left alone.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder = folder
        self.about = about
        self.rows: Rows = {}
        self._lock: IO[str] | None = None

    @property
    def path(self) -> Path:
        return self.folder / RESULTS

    @property
    def picture(self) -> Path:
        return self.folder / PICTURE

    @classmethod
    def open(cls, folder: Path, about: dict[str, Any], *, fresh: bool = False) -> tuple[Results, str]:
        """The results in `folder` to go on with, and a word on what was done with earlier ones.

        about: what results are measured on, as plain data. Earlier ones that were measured on the same are gone on
        with: what is done stays, what was skipped or failed is tried again. Others, or all if `fresh`, are kept
        beside the new ones under another name.
        Raises ConfigError, before anything is changed, if a file there is not ours or another process is at work.
        """
        results = cls(folder, json.loads(json.dumps(about)))
        stored = results._read()
        if stored is None and results.picture.exists():
            raise ConfigError(
                f"{results.picture} would be overwritten, and without {RESULTS} it is not known to be ours; "
                "move it away, or take another --out"
            )
        results._take_lock()
        if stored is None:
            return results, ""
        if not fresh and stored["about"] == results.about:
            results.rows = {key: row for key, row in stored["rows"].items() if row["outcome"] == DONE}
            again = len(stored["rows"]) - len(results.rows)
            more = f"; {again} that were skipped or failed are tried again" if again else ""
            return results, f"going on with {len(results.rows)} measurements in {results.path}{more}"
        why = "--fresh" if fresh else f"changed: {', '.join(_changes(stored['about'], results.about))}"
        return results, f"starting anew ({why}); the earlier results are in {results._set_aside()}"

    def done(self, key: str) -> bool:
        """True if `key` needs no more work."""
        return self.rows.get(key, {}).get("outcome") == DONE

    def add(self, key: str, row: Row) -> None:
        """Store one row and save."""
        self.rows[key] = row
        self.save()

    def save(self) -> None:
        """Write the file under a temporary name, then put it in place. One row a line."""
        rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in self.rows.items())
        about = json.dumps(self.about, indent=1)
        write_file(self.path, f'{{"format": {FORMAT},\n"about": {about},\n"rows": {{\n{rows}\n}}}}\n'.encode())

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _read(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            version = stored["format"]
            ours = isinstance(stored["about"], dict) and all(
                isinstance(row[word], str) for row in stored["rows"].values() for word in ("mixer", "kind", "outcome")
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            version, ours = None, False
        if version not in (None, FORMAT):
            raise ConfigError(f"{self.path} has format {version}, this version writes {FORMAT}; take another --out")
        if not ours:
            raise ConfigError(
                f"{self.path} is damaged or no result file of zoo bench; move it away or take another --out"
            )
        return dict(stored)

    def _take_lock(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = hold_lock(self.folder / LOCK)
        except BlockingIOError:
            raise ConfigError(f"another process is measuring in {self.folder}; wait, or take another --out") from None
        except OSError as error:
            raise ConfigError(f"cannot write in {self.folder}: {error.strerror}; take another --out") from None

    def _set_aside(self) -> Path:
        """Move the earlier results to results.before-1.json, -2, ... and the picture with them."""
        number = 1
        while (kept := self.folder / f"results.before-{number}.json").exists():
            number += 1
        os.rename(self.path, kept)
        if self.picture.exists():
            os.rename(self.picture, kept.with_suffix(".png"))
        return kept


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
