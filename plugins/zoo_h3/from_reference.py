"""The H3 layer of HazyResearch/H3, as our config and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sequence_mixer.errors import ReferenceMismatch, unknown_name
from sequence_mixer.peer_options import PeerOptions, config_of, expect_weights
from zoo_h3.config import INITS as OURS
from zoo_h3.config import H3Config

PEERS = ("H3",)
INITS = {"linear": "lin", "inverse": "inv", "inverse2": "inv2", "quadratic": "quad", "hippo": "legs", "random": "rand"}
NAMES = {  # theirs -> ours, where only the name differs
    "ssm_k_D": "shift_D",
    "ssm_k_kernel.kernel.B": "shift_B",
    "kernel.kernel.log_dt": "log_dt",
    "kernel.kernel.inv_A_real": "A_real",
    "kernel.kernel.A_imag": "A_imag",
    "kernel.kernel.B": "B",
    "D": "D",
    "output_linear.bias": "out_proj.bias",
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def from_reference(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[H3Config, dict[str, Tensor]]:
    """Our config and state dict for the reference layer.

    peer: "H3" (src/models/ssm/h3.py). config: its constructor arguments, those of its SSKernel among them or in a
        mapping under "kernel"; `B` and `T`, the sizes of a recorded call, are not looked at.
    state_dict: its weights, under its own names.
    Its output heads come in (channel, head) order from its PyTorch path and in (head, channel) order, which is ours,
    from its CUDA kernel (`use_fast_fftconv`): for the first the columns of the output projection are reordered. `l_max`
    becomes `max_length`: beyond it the reference cuts its kernel off. What only sets initial values (`measure` and
    its arguments, `deterministic`) is read where we have it and has no effect on these weights.
    Raises ReferenceMismatch, in words, for an unknown peer or argument and for a value that we do not reproduce.
    """
    if peer not in PEERS:
        raise ReferenceMismatch(unknown_name("reference module of h3", peer, list(PEERS)))
    given = dict(config)
    kernel = given.pop("kernel", None)
    options = PeerOptions(peer, given)
    if kernel is not None:
        options = PeerOptions(peer, {**_kernel_arguments(peer, kernel), **given})
    options.ignore("B", "T", "dropout", "layer_idx", "device", "dtype")
    if kernel is not None:
        options.ignore("N", "L", "H")
    d_model, head_dim = options.take("d_model"), options.take("head_dim", 1)
    fused = options.take("use_fast_fftconv", False)
    fields = {
        "d_model": d_model,
        "head_dim": head_dim,
        "d_state": options.take("d_state", 64),
        "max_length": options.take("l_max", None),
    } | _kernel_fields(options)
    options.done()
    made = config_of(peer, H3Config, **fields)
    return made, _weights(peer, made, state_dict, by_channel=not fused)


def _kernel_arguments(peer: str, kernel: Any) -> dict[str, Any]:
    """Arguments of SSKernel, given apart. Its N, L and H are the layer's."""
    if not isinstance(kernel, Mapping):
        raise ReferenceMismatch(f"{peer}: 'kernel' is {type(kernel).__name__}, wanted a mapping of arguments")
    return dict(kernel)


def _kernel_fields(options: PeerOptions) -> dict[str, Any]:
    """Fields of ours from the arguments of SSKernel and SSKernelDiag."""
    options.expect("mode", "diag", "diag", why="the second SSM is diagonal")
    options.expect("channels", 1, 1, why="H3 has one output per head")
    options.expect("bandlimit", None, None, why="no mode is left out for its frequency")
    options.expect("force_real", False, False, why="modes keep their frequencies")
    options.ignore("rank", "verbose", "deterministic", "measure_args", "lr")
    disc = options.expect("disc", "bilinear", "bilinear", "zoh", why="these are the discretisations we have")
    return {
        "disc": disc,
        "real_transform": options.take("real_type", "exp"),
        "init": _init(options.take("measure", "diag-lin")),
        "n_ssm": options.take("n_ssm", None),
        "dt_min": options.take("dt_min", 0.001),
        "dt_max": options.take("dt_max", 0.1),
    }


def _init(measure: Any) -> str:
    """Our name of the initial modes; "lin" where we have none, since the weights replace them."""
    if measure == "diag":
        return "inv+lin"
    name = str(measure).removeprefix("diag-")
    name = INITS.get(name, name)
    return name if str(measure).startswith("diag-") and name in OURS else "lin"


def _weights(peer: str, config: H3Config, state_dict: Mapping[str, Tensor], by_channel: bool) -> dict[str, Tensor]:
    """Our state dict. by_channel: the output projection reads heads in (channel, head) order."""
    projections = [f"{part}.{kind}" for kind in ("weight", "bias") for part in PROJECTIONS]
    others = ["ssm_k_kernel.kernel.C", "kernel.kernel.C", "output_linear.weight"]
    names = [*NAMES, *projections, *others]
    given = dict(zip(names, expect_weights(peer, state_dict, names), strict=True))
    weights = {ours: given[theirs] for theirs, ours in NAMES.items()}
    for kind in ("weight", "bias"):
        weights[f"in_proj.{kind}"] = torch.cat([given[f"{part}.{kind}"] for part in PROJECTIONS])
    weights["shift_C"], weights["C"] = given["ssm_k_kernel.kernel.C"][0], given["kernel.kernel.C"][0]
    out = given["output_linear.weight"]
    weights["out_proj.weight"] = out[:, head_order(config)] if by_channel else out
    return weights


def head_order(config: H3Config) -> Tensor:
    """Position in (channel, head) order of each channel in (head, channel) order, int64 [D]."""
    return torch.arange(config.d_model).view(config.head_dim, config.heads).T.flatten()
