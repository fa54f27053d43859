"""What every test stands on: one checkout, deterministic seeds, few threads."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    import zoo

    import sequence_mixer
    import zoo_ssd

    homes = {
        name: Path(str(module.__file__)).resolve()
        for name, module in {"zoo": zoo, "sequence_mixer": sequence_mixer, "zoo_ssd": zoo_ssd}.items()
    }
    strays = {name: str(path) for name, path in homes.items() if ROOT not in path.parents}
    if strays:
        raise pytest.UsageError(f"tests run against an editable install of {ROOT}; these come from elsewhere: {strays}")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _a_broken_gpu_context_ends_the_process() -> Iterator[None]:
    """An illegal access makes every later CUDA call fail; pytest-xdist then names the test and starts a new process."""
    yield
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"the CUDA context is lost: {error}", file=sys.stderr, flush=True)
            os._exit(1)
