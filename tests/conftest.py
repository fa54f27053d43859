"""What every test stands on: one checkout, deterministic seeds, few threads."""

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
