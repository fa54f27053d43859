"""Files that are whole or absent, whatever interrupts the writing: temporary name, fsync, atomic rename; and locks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO


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


def hold_lock(path: Path) -> IO[str] | None:
    """The lock file `path`, locked until it is closed or the process ends; None where the system has no such locks.

    Raises BlockingIOError if another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    file = open(path, "w", encoding="utf-8")  # noqa: SIM115 the caller closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise BlockingIOError(f"{path} is locked by another process") from None
    return file
