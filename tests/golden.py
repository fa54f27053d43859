"""Recorded outputs of reference implementations, loaded for comparison.

A case is `<name>.json` (config, notes, tolerances) beside `<name>.safetensors` (float32 inputs, float64 results). The
folder is `$ZOO_GOLDEN`, or `shared/golden` beside the checkout; a machine without it skips the tests that ask.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class GoldenCase:
    """One recorded case.

    config: constructor arguments of the reference module or call options of the reference function.
    tensors: every tensor by its recorded name; floating ones as float64 (inputs are exact float32 values).
    notes: conventions and oddities, in words.  tolerance: measured errors of the reference's own paths.
    sidecar: the whole json.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: Any
    tolerance: dict[str, Any]
    sidecar: dict[str, Any] = field(repr=False)

    def parameters(self) -> dict[str, Tensor]:
        """Tensors named `param.<name>`, by <name>."""
        return {key.removeprefix("param."): value for key, value in self.tensors.items() if key.startswith("param.")}


def golden_folder() -> Path:
    """Where the cases live on this machine; the folder may be absent."""
    return Path(os.environ.get("ZOO_GOLDEN") or ROOT.parent / "shared" / "golden")


def load_case(name: str) -> GoldenCase:
    """Load the case `name`; skips the calling test, with the reason, where it is not on this machine."""
    folder = golden_folder()
    sidecar_file, tensor_file = folder / f"{name}.json", folder / f"{name}.safetensors"
    for file in (sidecar_file, tensor_file):
        if not file.is_file():
            pytest.skip(f"golden case {name!r} is not here: no {file}; set ZOO_GOLDEN to the folder that has it")
    sidecar = json.loads(sidecar_file.read_text(encoding="utf-8"))
    tensors = {k: v.double() if v.is_floating_point() else v for k, v in load_file(tensor_file).items()}
    return GoldenCase(
        name=name,
        config=dict(sidecar.get("config") or {}),
        tensors=tensors,
        notes=sidecar.get("notes"),
        tolerance=dict(sidecar.get("tolerance") or {}),
        sidecar=sidecar,
    )
