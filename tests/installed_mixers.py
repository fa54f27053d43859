"""Small mixers in the registry, in this process and in those it starts, as an installed distribution brings them."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from zoo.registry import registry

import bench_mixers
import small_mixers


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`small_decay` and `small_mean` are registered."""
    yield from installed(small_mixers, tmp_path / "installed", monkeypatch)


@pytest.fixture
def only_bench_mixers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The mixers of `bench_mixers` are registered, and no other."""
    monkeypatch.setenv("ZOO_DISABLE_PLUGINS", "mixer-zoo")
    yield from installed(bench_mixers, tmp_path / "installed", monkeypatch)


def installed(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Write the metadata of a distribution that brings the `NAMES` of `module`, and put it on the import path."""
    distribution = module.__name__.replace("_", "-")
    about = folder / f"{module.__name__}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    entries = "".join(f"{name} = {module.__name__}\n" for name in module.NAMES)
    (about / "entry_points.txt").write_text(
        f"[zoo.mixers]\n{entries}\n[zoo.contract]\n{distribution} = sequence_mixer:v1_0\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    home = str(Path(str(module.__file__)).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), home]))
    registry.reload()
    yield
    monkeypatch.undo()
    registry.reload()
