"""The wheel: only our import packages in it, and it works from an empty directory without the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_no_generic_name_lands_in_site_packages(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    packages = {top for top in tops if not top.endswith(".dist-info")}
    plugins = {path.name for path in (ROOT / "plugins").iterdir() if path.is_dir()}
    assert packages == {"zoo", "sequence_mixer", *plugins}


def test_every_import_package_is_typed(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert [top for top in sorted(tops) if f"{top}/py.typed" not in names] == []


def test_the_installed_wheel_works_from_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    # the editable install of the checkout stays out: its finder comes after PYTHONPATH
    code = (
        "import zoo, sequence_mixer, torch; print(zoo.__file__, sequence_mixer.__file__);"
        "m = zoo.create(zoo.names()[0], d_model=64); print(m(torch.randn(1, 5, 64)).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path / "empty", check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout
    assert "[1, 5, 64]" in done.stdout
