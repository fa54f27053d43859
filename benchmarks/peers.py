"""Peers that can be timed beside ours, as far as they import: fla's and mamba_ssm's Triton kernels.

Each function takes the inputs of a row (benchmarks.operator_rows) and returns a call without arguments; it raises
ImportError where the peer is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]


def mamba_ssd(given: Inputs) -> Callable[[], Any]:
    """mamba_ssm's chunked SSD, chunk 256."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # type: ignore[import-not-found]

    def call() -> Any:
        return mamba_chunk_scan_combined(
            given["x"], given["dt"], given["A"], given["B"], given["C"], 256,
            D=given["D"], dt_bias=given["dt_bias"], dt_softplus=True,
        )  # fmt: skip

    return call


def mamba_step(given: Inputs) -> Callable[[], Any]:
    """mamba_ssm's one-token state update."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update  # type: ignore[import-not-found]

    state, (batch, heads, width, modes) = given["state"].clone(), given["state"].shape
    dt = given["dt"][:, 0, :, None].expand(batch, heads, width)
    A = given["A"][:, None, None].expand(heads, width, modes)
    D, bias = (given[name][:, None].expand(heads, width) for name in ("D", "dt_bias"))

    def call() -> Any:
        return selective_state_update(
            state, given["x"][:, 0], dt, A, given["B"][:, 0], given["C"][:, 0], D=D, dt_bias=bias, dt_softplus=True
        )

    return call


def mamba_norm(given: Inputs) -> Callable[[], Any]:
    """mamba_ssm's gated RMS norm, gate first."""
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn  # type: ignore[import-not-found]

    return lambda: rmsnorm_fn(given["x"], given["weight"], None, z=given["z"], eps=1e-5, norm_before_gate=False)


def fla_linear(given: Inputs) -> Callable[[], Any]:
    """fla's chunked linear attention."""
    return _fla_linear(given, normalize=False)


def fla_linear_normalised(given: Inputs) -> Callable[[], Any]:
    """The same with its normaliser."""
    return _fla_linear(given, normalize=True)


def _fla_linear(given: Inputs, normalize: bool) -> Callable[[], Any]:
    from fla.ops.linear_attn import chunk_linear_attn  # type: ignore[import-not-found]

    return lambda: chunk_linear_attn(given["q"], given["k"], given["v"], scale=1.0, normalize=normalize)[0]


def sdpa_cudnn(given: Inputs) -> Callable[[], Any]:
    """PyTorch's softmax attention on cuDNN."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call() -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            q, k, v = (given[name].transpose(1, 2) for name in "qkv")
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return call
