"""Training runs of tests: small configurations, comparison of two runs, interruption."""

import email
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from zoo.training import TrainConfig
from zoo.training.checkpoint import checkpoint_steps

TEXT = str(Path(email.__file__).parent)  # some twenty files that nobody edits while the tests run
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def config_of(**fields: Any) -> TrainConfig:
    fields = {**_SMALL, **fields}
    return TrainConfig.of(**fields)


_SMALL: dict[str, Any] = {
    "model": {"d_model": 32, "layers": "small_decay*2", "dropout": 0.1}, "context": 32, "batch_size": 4, "steps": 12,
    "warmup_steps": 4, "learning_rate": 1e-2, "eval_every": 5, "eval_windows": 8, "checkpoint_every": 4,
    "device": "cpu", "corpus": TEXT,
}  # fmt: skip


def parameters_of(folder: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint_steps(folder / "checkpoints")[-1]
    return load_file(folder / "checkpoints" / f"step-{newest:08d}" / "model.safetensors")


def assert_equal_runs(first: Path, second: Path) -> None:
    """Parameters and everything but times in the metrics are the same bit for bit."""
    runs = [json.loads((folder / "run.json").read_text()) for folder in (first, second)]
    assert runs[0] == runs[1]  # the same config and text, or there is nothing to compare
    ours, theirs = parameters_of(first), parameters_of(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert metrics_of(first) == metrics_of(second)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


class Stopped(Exception):
    """Raised by a test in the middle of a run."""


def stop_at(step: int) -> Any:
    def on_step(report: Any) -> None:
        if report.step == step:
            raise Stopped

    return on_step


CONFIG = """
model:
  d_model: 32
  layers: "small_decay*2"
  dropout: 0.1
  mixers: {small_decay: {redraw: true}}
context: 32
batch_size: 4
steps: 60
eval_every: 7
eval_windows: 8
checkpoint_every: 2
device: cpu
"""


def installed(folder: Path) -> list[str]:
    return [name for name in contents(folder) if name.startswith("installed/")]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def spoil(path: Path, damage: str) -> None:
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
