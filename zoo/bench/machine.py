"""What a result was measured on."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from zoo.registry import registry


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit, as they are stored beside every result."""
    about: dict[str, Any] = {
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "distributions": distributions(),
        "commit": commit(),
    }
    if device.type == "cuda":
        about["cuda"] = torch.version.cuda
    return about


def device_name(device: torch.device) -> str:
    """Name of the GPU or the processor."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def distributions() -> dict[str, str]:
    """Versions of the installed distributions that bring mixers."""
    return {claim.distribution: claim.version for claim in registry.claims()}


def commit() -> str:
    """Commit of the checkout this package runs from, with "+changes" if it is not clean; "" outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed package lies below some other checkout, if any
        return ""
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+changes", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
