"""The tiny mixers in the registry, in this process and in those that it starts."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from zoo.registry import registry

import small_mixers


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`small_decay` and `small_mean` are registered."""
    folder = tmp_path / "installed"
    small_mixers.install(folder)
    home = str(Path(small_mixers.__file__).parent)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), home]))
    registry.reload()
    yield
    monkeypatch.undo()
    registry.reload()
