"""A distribution of its own, installed by pip into a temporary place, is found, built and checked by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent / "third_party" / "acme-retention"


def pip_install(project: Path, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    done = subprocess.run([*command, str(target), str(project)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def zoo(*arguments: str, site: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "zoo", *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip_install(PROJECT, target)
    return target


def test_the_registry_finds_the_third_party_mixer_by_name(site: Path) -> None:
    listed = zoo("list", site=site)
    assert listed.returncode == 0, listed.stderr
    assert "retention" in listed.stdout


def test_the_third_party_mixer_passes_the_conformance_suite(site: Path) -> None:
    checked = zoo("check", "retention", site=site)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_third_party_mixer_builds_and_runs_by_name(site: Path) -> None:
    explained = zoo("explain", "retention", "--d-model", "64", "--length", "33", site=site)
    assert explained.returncode == 0, explained.stderr
    assert "linear_attention: chunked" in explained.stdout


def test_a_distribution_made_by_zoo_new_passes_the_conformance_suite(tmp_path: Path) -> None:
    made = zoo("new", "moving_average", "--into", str(tmp_path), site=tmp_path)
    assert made.returncode == 0, made.stderr
    target = tmp_path / "site"
    pip_install(tmp_path / "zoo-moving-average", target)
    checked = zoo("check", "moving_average", site=target)
    assert checked.returncode == 0, checked.stdout + checked.stderr
