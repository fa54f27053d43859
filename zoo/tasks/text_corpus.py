"""Bytes of real text, split by file into a training part and a held-out part.

The default corpus is the source of the running Python's standard library, so that a training run needs no download.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sequence_mixer.errors import MixerError

SEPARATOR = b"\0"  # between files
MAX_BYTES = 4 * 1024**3
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
_SKIPPED_IN_LIBRARY = {"test", "tests", "idle_test", "ensurepip", "lib2to3"}


class CorpusError(MixerError, ValueError):
    """A corpus is missing, unreadable, empty, or too small for what is asked of it."""


@dataclass(frozen=True)
class Corpus:
    """Text as bytes.

    source: the folder or file, for messages. train, held_out: uint8 [bytes].
    train_files, held_out_files: number of files behind each. fingerprint: SHA-256 of names, split and contents.
    """

    source: str
    train: Tensor
    held_out: Tensor
    train_files: int
    held_out_files: int
    fingerprint: str

    def train_batch(self, batch_size: int, context: int, generator: torch.Generator) -> Tensor:
        """Windows at random places of the training part, int64 [B, context + 1] on the CPU."""
        starts = torch.randint(self.train.numel() - context, (batch_size,), generator=generator)
        return _windows(self.train, starts, context + 1)

    def held_out_windows(self, count: int, context: int) -> Tensor:
        """Always the same windows, spread evenly over the held-out part and not overlapping.

        Returns int64 [count or as many as fit, context + 1] on the CPU.
        """
        last = self.held_out.numel() - (context + 1)
        count = min(count, self.held_out.numel() // (context + 1))
        starts = torch.tensor([index * last // max(1, count - 1) for index in range(count)])
        return _windows(self.held_out, starts, context + 1)

    def require(self, context: int) -> None:
        """Raise CorpusError if either part is shorter than one window of `context` + 1 bytes."""
        for part, data, files in (
            ("training", self.train, self.train_files),
            ("held-out", self.held_out, self.held_out_files),
        ):
            if data.numel() < context + 1:
                raise CorpusError(
                    f"the corpus {self.source} is too small: its {part} part has {data.numel()} bytes ({files} files), "
                    f"a context of {context} needs {context + 1}; give more text or lower context"
                )


def load_corpus(path: str | os.PathLike[str] | None = None, *, held_out: float = 0.1, files: str = "") -> Corpus:
    """Read a corpus.

    path: a folder (all files below it, hidden ones left out), one file (its end is held out), or None for the
        standard library of the running Python without its tests and site-packages.
    held_out: share in (0, 1) of files held out, chosen by a hash of the relative path, so that other files coming
        or going move none from one part to the other.
    files: pattern of the file names taken from a folder, such as "*.md"; "" for "*", or "*.py" in the library.
    Raises CorpusError if there is nothing there, nothing readable, or nothing in it.
    """
    if not 0 < held_out < 1:
        raise CorpusError(f"held_out={held_out}: wanted a share between 0 and 1")
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        return _load_folder(root, files or "*.py", held_out, _SKIPPED_FOLDERS | _SKIPPED_IN_LIBRARY)
    root = Path(path).expanduser()
    if not root.exists():
        raise CorpusError(f"no corpus at {root}; give a folder or a file, or leave it out for the standard library")
    if root.is_dir():
        return _load_folder(root, files or "*", held_out, _SKIPPED_FOLDERS)
    return _load_file(root, held_out)


def _load_file(path: Path, held_out: float) -> Corpus:
    if not path.is_file():
        raise CorpusError(f"the corpus {path} is neither a folder nor a regular file")
    content = _read(path)
    if not content:
        raise CorpusError(f"the corpus {path} is empty")
    cut = len(content) - max(1, int(len(content) * held_out))
    digest = hashlib.sha256(b"file %d\n" % cut + content)
    return Corpus(str(path), _tensor(content[:cut]), _tensor(content[cut:]), 1, 1, digest.hexdigest())


def _load_folder(root: Path, pattern: str, held_out: float, skipped: set[str]) -> Corpus:
    names = _list_files(root, pattern, skipped)
    total = sum((root / name).stat().st_size for name in names)
    if total > MAX_BYTES:
        raise CorpusError(f"the corpus {root} has {total / 2**30:.1f} GiB, the most is {MAX_BYTES >> 30}; take a part")
    contents = {name: content for name in names if (content := _read(root / name))}
    if not contents:
        raise CorpusError(f"the corpus {root} has no text: {len(names)} files match {pattern!r}, all of them empty")
    held = _held_out_names(list(contents), held_out)
    digest = hashlib.sha256()
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for name, content in contents.items():
        head = f"{'held-out' if name in held else 'train'} {name} {len(content)}\n"
        digest.update(head.encode("utf-8", "surrogateescape") + content)
        parts[name in held].append(content)
    return Corpus(
        str(root),
        _tensor(SEPARATOR.join(parts[False])),
        _tensor(SEPARATOR.join(parts[True])),
        len(parts[False]),
        len(parts[True]),
        digest.hexdigest(),
    )


def _list_files(root: Path, pattern: str, skipped: set[str]) -> list[str]:
    """Relative paths with '/', sorted, of the regular files below `root` whose name matches."""

    def refuse(error: OSError) -> None:
        raise CorpusError(f"cannot read {error.filename} of the corpus: {error.strerror}")

    found = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        for name in names:
            path = Path(folder, name)
            if fnmatch.fnmatch(name, pattern) and not name.startswith(".") and path.is_file():
                found.append(path.relative_to(root).as_posix())
    if not found:
        raise CorpusError(f"the corpus {root} is empty: no file matches {pattern!r}")
    return sorted(found)


def _held_out_names(names: list[str], share: float) -> set[str]:
    """The names whose hash lies in the lowest `share`; with two files or more, neither side is empty."""

    def place(name: str) -> int:
        return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")

    held = {name for name in names if place(name) < share * 2**64}
    ordered = sorted(names, key=place)
    if len(names) > 1:
        held |= {ordered[0]}
        held -= {ordered[-1]}
    return held


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"cannot read {path} of the corpus: {error.strerror}") from None


def _tensor(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())


def _windows(data: Tensor, starts: Tensor, length: int) -> Tensor:
    return data[starts[:, None] + torch.arange(length)].long()
