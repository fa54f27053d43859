"""The result file of a run: written after every measurement, picked up by the next run of the same command."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from sequence_mixer.errors import ConfigError

FORMAT = 1


class Results:
    """Rows by case key, with what they were measured on; saved atomically after each row."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.about = about
        self.rows: dict[str, dict[str, Any]] = {}

    @classmethod
    def open(cls, path: Path, about: dict[str, Any], fresh: bool) -> tuple[Results, str]:
        """The results at `path` to go on with, and a word on what was done with an earlier file.

        An earlier file is continued if it was measured on the same machine, versions, commit and sizes; one that
        was not is kept beside the new one. Raises ConfigError if the file is not one of ours.
        """
        results = cls(path, about)
        if not path.exists():
            return results, ""
        try:
            stored = json.loads(path.read_text())
            version, before, rows = stored["format"], stored["about"], stored["rows"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} is no result file of zoo bench; move it away or name another --out") from None
        if version != FORMAT:
            raise ConfigError(f"{path} has format {version}, this version writes {FORMAT}; name another --out")
        if not fresh and before == json.loads(json.dumps(about)):
            results.rows = rows
            return results, f"going on with {len(rows)} measurements in {path}"
        kept = path.with_name(f"{path.stem}.before.json")
        os.replace(path, kept)
        why = "--fresh" if fresh else "machine, versions, commit or sizes differ"
        return results, f"starting anew ({why}); the earlier results are in {kept}"

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Store one row and save."""
        self.rows[key] = row
        self.save()

    def save(self) -> None:
        """Write the file under a temporary name, then put it in place."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, "about": self.about, "rows": self.rows}, indent=1)
        handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, self.path)
