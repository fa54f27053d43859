"""Checkpoints: one folder per step, complete or absent, checked against their hashes when read.

checkpoints/step-00000100/model.safetensors      parameters and buffers, each once
                          optimiser.safetensors  AdamW's moments, `<key>/<parameter>`
                          meta.json              step, config, corpus fingerprint, hashes of the two files
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sequence_mixer.errors import MixerError
from zoo.durable import sync_folder, write_synced

FORMAT = 1
KEPT = 2
MODEL, OPTIMISER, META = "model.safetensors", "optimiser.safetensors", "meta.json"
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointError(MixerError, RuntimeError):
    """A checkpoint or run folder is corrupt, does not fit, or cannot be written."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    step: optimiser steps done. config: the run's, as plain data. corpus: fingerprint.
    model: parameters and buffers by name. optimiser: moments by `<key>/<parameter>`.
    """

    step: int
    config: dict[str, Any]
    corpus: str
    model: dict[str, Tensor]
    optimiser: dict[str, Tensor]


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [_STEP.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir()]
    return sorted(int(match[1]) for match in found if match)


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return folder / f"step-{step:08d}"


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint under a temporary name, move it into place, and remove all but the last KEPT.

    Raises CheckpointError if there is one of that step already, OSError if the disk refuses.
    """
    target = step_folder(folder, checkpoint.step)
    if target.exists():
        raise CheckpointError(f"there is a checkpoint {target} already; it is not overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".writing-{checkpoint.step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    files = {}
    for name, tensors in ((MODEL, checkpoint.model), (OPTIMISER, checkpoint.optimiser)):
        content = safetensors.torch.save(tensors)
        write_synced(temporary / name, content)
        files[name] = hashlib.sha256(content).hexdigest()
    body = {
        "format": FORMAT,
        "step": checkpoint.step,
        "config": checkpoint.config,
        "corpus": checkpoint.corpus,
        "files": files,
        "torch": torch.__version__,
    }
    write_synced(temporary / META, json.dumps({**body, "sha256": _hash_of(body)}, indent=1).encode())
    sync_folder(temporary)
    os.rename(temporary, target)
    sync_folder(folder)
    for step in checkpoint_steps(folder)[:-KEPT]:
        _remove(step_folder(folder, step))
    return target


def clean_folder(folder: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.name.startswith((".writing-", ".removing-")):
                shutil.rmtree(entry, ignore_errors=True)


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, or None if there is none. Nothing is changed on the disk.

    Raises CheckpointError that names the file if the newest is corrupt, and says from which step the run would go
    on if it were moved away.
    """
    steps = checkpoint_steps(folder)
    if not steps:
        return None
    try:
        return load_checkpoint(step_folder(folder, steps[-1]))
    except CheckpointError as error:
        earlier = _newest_good(folder, steps[:-1])
        back = f"step {earlier}" if earlier is not None else "the beginning: no older checkpoint is whole"
        raise CheckpointError(
            f"{error}; nothing was changed. Move the folder {step_folder(folder, steps[-1])} away to go on from {back}"
        ) from None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint folder. Raises CheckpointError that names the file at fault."""
    meta_path = path / META
    try:
        meta = json.loads(_read(meta_path))
        body = {key: value for key, value in meta.items() if key != "sha256"}
        if meta.get("format") != FORMAT and "sha256" in meta and _hash_of(body) == meta["sha256"]:
            raise CheckpointError(f"checkpoint {meta_path} has format {meta.get('format')!r}, this is {FORMAT}")
        if _hash_of(body) != meta["sha256"]:
            raise ValueError("its hash does not match")
        tensors = {}
        for name in (MODEL, OPTIMISER):
            tensors[name] = _load_tensors(path / name, meta["files"][name])
        return Checkpoint(int(meta["step"]), meta["config"], meta["corpus"], tensors[MODEL], tensors[OPTIMISER])
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"checkpoint {meta_path} is corrupt: {error}") from None


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their first name; a shared tensor stands once.

    Raises CheckpointError if a module keeps extra state that is no tensor.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name} of the model is a {type(value).__name__}; only tensors can be saved")
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found


def snapshot(model: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies on the CPU of what a checkpoint holds: model tensors, optimiser moments."""
    weights = {name: _copied(value) for name, value in model_tensors(model).items()}
    moments = {}
    for name, parameter in model.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            moments[f"{key}/{name}"] = _copied(value)
    return weights, moments


def restore(checkpoint: Checkpoint, model: nn.Module, optimiser: torch.optim.Optimizer | None = None) -> None:
    """Put a checkpoint's numbers into a model and its optimiser.

    Raises CheckpointError if names, shapes or dtypes are not those of the model.
    """
    own = model_tensors(model)
    _expect_same_names("model", set(own), set(checkpoint.model))
    with torch.no_grad():
        for name, value in checkpoint.model.items():
            target = own[name]
            if target.shape != value.shape or target.dtype != value.dtype:
                raise CheckpointError(
                    f"{name} is {value.dtype} {list(value.shape)} in the checkpoint of step {checkpoint.step}, "
                    f"{target.dtype} {list(target.shape)} in the model"
                )
            target.copy_(value)
    if optimiser is not None:
        _restore_moments(checkpoint, model, optimiser)


def _restore_moments(checkpoint: Checkpoint, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    for full_name, value in checkpoint.optimiser.items():
        key, _, name = full_name.partition("/")
        parameter = parameters.get(name)
        if parameter is None:
            raise CheckpointError(f"the checkpoint of step {checkpoint.step} has a moment for {name!r}, unknown here")
        if value.dim():
            value = value.to(parameter.device)
        optimiser.state[parameter][key] = value


def _expect_same_names(what: str, wanted: set[str], came: set[str]) -> None:
    if wanted != came:
        lacking, extra = sorted(wanted - came)[:3], sorted(came - wanted)[:3]
        raise CheckpointError(f"the checkpoint does not fit the {what}: it lacks {lacking}, and has {extra} besides")


def _load_tensors(path: Path, expected_hash: str) -> dict[str, Tensor]:
    content = _read(path)
    if hashlib.sha256(content).hexdigest() != expected_hash:
        raise CheckpointError(f"checkpoint file {path} is corrupt: {len(content)} bytes whose hash does not match")
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"checkpoint file {path} is corrupt: {error}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint file {path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint file {path}: {error.strerror}") from None


def _newest_good(folder: Path, steps: list[int]) -> int | None:
    for step in reversed(steps):
        try:
            load_checkpoint(step_folder(folder, step))
        except CheckpointError:
            continue
        return step
    return None


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill in between leaves no half of it under its name."""
    doomed = path.with_name(f".removing-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _copied(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def _hash_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
