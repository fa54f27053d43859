"""`zoo explain` and `zoo matrix`: what serves a call, and what the mixing matrix looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sequence_mixer.config import MixerConfig
from sequence_mixer.errors import ConfigError, DeviceError, UnsupportedCapability
from zoo.build import create, resolve
from zoo.explanation import explain as explain_call
from zoo.matrix_picture import block_rank, block_ranks, draw_matrix
from zoo.registry import registry

console = Console(highlight=False)
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype of a command-line name. Raises ConfigError."""
    if name not in DTYPES:
        raise ConfigError(f"no dtype {name!r}; one of {', '.join(DTYPES)}")
    return DTYPES[name]


def device_named(name: str) -> torch.device:
    """The torch device of a command-line name. Raises DeviceError if it is not there."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"no device {name!r}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError("no CUDA device is visible; take --device cpu")
    return device


def explain(
    name: str,
    example: Annotated[
        str | None, typer.Option(help="Example config of the mixer; its defaults at --d-model if not given.")
    ] = None,
    d_model: Annotated[int, typer.Option(min=1)] = 256,
    length: Annotated[int, typer.Option(min=1)] = 256,
    batch: Annotated[int, typer.Option(min=1)] = 2,
    device: str = "cpu",
    dtype: str = "float32",
    backend: str = "auto",
) -> None:
    """Tell which implementation serves each operator of a mixer, and why each faster one does not."""
    where, kind = device_named(device), dtype_named(dtype)
    config = resolve(name, d_model=d_model) if example is None else _example(name, example)
    mixer = create(config, backend=backend).to(device=where, dtype=kind)
    x = torch.randn(batch, length, mixer.config.d_model, device=where, dtype=kind)
    console.print(str(explain_call(mixer, x)), markup=False)


def matrix(
    name: str,
    example: Annotated[str, typer.Option(help="Example config of the mixer.")] = "default",
    length: Annotated[int, typer.Option(min=2, max=2048)] = 64,
    head: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="PNG to write; <name>-matrix.png by default.")] = None,
    seed: int = 0,
) -> None:
    """Draw the mixing matrix of a mixer, and print its rank and those of its strictly lower blocks."""
    config = _example(name, example)
    capabilities = registry.definition(name).capabilities_of(config)
    if not capabilities.matrix_form:
        raise UnsupportedCapability(name, "matrix_form")
    path = out or Path(f"{name}-matrix.png")
    if not path.parent.is_dir():
        raise ConfigError(f"the folder {path.parent} for --out does not exist")
    torch.manual_seed(seed)
    mixer = create(config).double()
    limit = getattr(config, "max_length", None)
    tokens = length if limit is None else min(length, limit)
    form = mixer.matrix_form(torch.randn(1, tokens, config.d_model, dtype=torch.float64))
    if head >= form.n_heads:
        raise ConfigError(f"{name} has heads 0 to {form.n_heads - 1}, asked for {head}")
    picture = form.heads(slice(head, head + 1))[0, 0].detach()
    ranks = block_ranks(picture)
    table = Table("rows from", "rank of the block below", "declared")
    declared = ", ".join(str(structure) for structure in capabilities.structures)
    for index, (row, rank) in enumerate(ranks):
        table.add_row(str(row), str(rank), escape(declared) if index == 0 else "")
    console.print(table)
    console.print(f"rank of the whole matrix: {block_rank(picture)} of {tokens}")
    draw_matrix(picture, ranks, f"{name} ({example}), head {head}, T = {tokens}", path)
    console.print(f"wrote {path}", markup=False)


def _example(name: str, example: str) -> MixerConfig:
    """The example config of a registered mixer. Raises UnknownMixer, ConfigError."""
    definition = registry.definition(name)
    if example not in definition.examples:
        raise ConfigError(f"{name} has no example {example!r}; it has: {', '.join(definition.examples)}")
    return definition.example(example)
