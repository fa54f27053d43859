"""Files that are whole or absent, whatever interrupts the writing: temporary name, fsync, atomic rename."""

from __future__ import annotations

import os
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Replace `path` by `content`; after a crash it holds the old content or the new."""
    temporary = path.with_name(f".{path.name}.writing")
    write_synced(temporary, content)
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk (where the system can open a folder)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
