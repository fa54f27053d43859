"""Layers of state-spaces/s4 as our configs and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sequence_mixer.errors import ReferenceMismatch, unknown_name
from sequence_mixer.peer_options import PeerOptions, config_of, expect_weights
from zoo_s4.config import DIAGONALS, MEASURES, S4Config, S4dConfig

DPLR, DIAGONAL, MINIMAL = "S4Block(mode='dplr')", "S4Block(mode='diag')", "S4D"
NO_DROPOUT = "a mixer holds no dropout; put it in the block around it"
LINEAR = ("id", "identity", "linear")
ACTIVATIONS = {None: "none", "gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}
ACTIVATIONS |= dict.fromkeys(LINEAR, "none")
TRANSFORMS = ("exp", "softplus", "relu", "sigmoid", "none")
DRAWS = (  # arguments of the initial values, which the weights replace
    "real_random", "real_scale", "imag_random", "imag_scale", "B_random", "B_init", "B_scale", "P_scale", "normalize",
    "deterministic",
)  # fmt: skip
SEVERAL = {
    "hippo": ["legs", "fourier"],
    "diag": ["diag-inv", "diag-lin"],
    "all": ["legs", "fourier", "diag-inv", "diag-lin"],
}
OTHER_NAMES = {
    "linear": "lin", "inverse": "inv", "inverse2": "inv2", "quadratic": "quad", "random": "rand", "hippo": "legs",
    "fourier": "fout", "fourier_diag": "foud",
}  # fmt: skip
UNTIED = {  # what the peer's transition() makes and its own S4Block cannot be built from either
    "random": "a dense normal matrix, which no correction of low rank makes diagonal; 'diag-random' is another",
    "diagonal": "N unlike real modes, which N/2 conjugate pairs cannot hold; s4d with real=True has such",
}
Converted = tuple[Any, dict[str, Tensor]]


def convert_s4(peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Converted:
    """Config and state dict of `s4` for "S4Block(mode='dplr')".

    config: the arguments of S4Block, flat as the class takes them, or sorted under "block", "layer" and "kernel". `B`,
        `T` and `first_length`, the sizes of a recorded call, are not looked at.
    state_dict: its weights. `l_kernel`, the length that its C is scaled for, becomes `kernel_length`; where it is 0
        (the module never ran), C is scaled here.
    `l_max` becomes `max_length`: beyond it the peer cuts its kernel off.
    Raises ReferenceMismatch.
    """
    if peer != DPLR:
        raise ReferenceMismatch(unknown_name("reference module of s4", peer, (DPLR,)))
    options = _flat(peer, config)
    fields = _block(options, "dplr", "s4", "nplr", default="dplr")
    options.expect("is_real", False, False, why="S4's modes are complex")
    options.expect("bandlimit", None, None, why="C stands for a scaled readout, which a mask would spoil")
    options.ignore("disc")
    fields["rank"] = options.take("rank", 1)
    init, fields["init"] = fields["init"], _init(peer, fields["init"])
    if "diag" in str(init) or init == "all":  # the peer gives its diagonals no P
        fields["p_scale"] = 0.0 if set(fields["init"].split("+")) & set(DIAGONALS) else 1.0
    options.done()
    swaps = fields.pop("swap_channels")
    ours = config_of(peer, S4Config, **fields)
    weights = _weights(peer, state_dict, ours.output != "none", ["A_imag", "P", "B", "l_kernel"])
    length = int(weights.pop("l_kernel"))
    ours = ours.model_copy(update={"kernel_length": length or ours.max_length or ours.kernel_length})
    if swaps and "output_linear.weight" in weights:
        weights["output_linear.weight"] = _readouts_first(weights["output_linear.weight"], ours.channels)
    if length == 0:
        weights["C"] = _scaled(ours, weights)
    return ours, weights


def convert_s4d(peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Converted:
    """Config and state dict of `s4d` for "S4Block(mode='diag')" or "S4D" (models/s4/s4d.py); see `convert_s4`."""
    if peer == MINIMAL:
        return _convert_minimal(peer, config, state_dict)
    if peer != DIAGONAL:
        raise ReferenceMismatch(unknown_name("reference module of s4d", peer, (DIAGONAL, MINIMAL)))
    options = _flat(peer, config)
    fields = _block(options, "diag", "s4d", default="dplr")
    fields["disc"] = options.expect("disc", "zoh", "zoh", "bilinear", why="'dss' is another parametrisation")
    fields["bandlimit"] = options.take("bandlimit", None)
    real = fields["real"] = options.take("is_real", False)
    if real:
        fields["imag_transform"], fields["bandlimit"] = "none", None
    fields["init"] = "real" if real else _init(peer, fields["init"])
    options.ignore("rank")
    options.done()
    swaps = fields.pop("swap_channels")
    ours = config_of(peer, S4dConfig, **fields)
    weights = _weights(peer, state_dict, ours.output != "none", ["B"] if real else ["A_imag", "B"])
    if swaps and "output_linear.weight" in weights:
        weights["output_linear.weight"] = _readouts_first(weights["output_linear.weight"], ours.channels)
    return ours, weights


def _flat(peer: str, config: Mapping[str, Any]) -> PeerOptions:
    """The arguments in one mapping, whether or not they came sorted by the class that takes them."""
    flat = {name: value for name, value in config.items() if name not in ("block", "layer")}
    if isinstance(flat.get("kernel"), Mapping):
        flat.pop("kernel")
    for part in ("block", "layer", "kernel"):
        inner = config.get(part)
        for name, value in inner.items() if isinstance(inner, Mapping) else ():
            if name != "transposed" and name in flat and flat[name] != value:
                raise ReferenceMismatch(f"{peer}: {name} is {flat[name]!r}, and {value!r} under {part!r}; give one")
            flat[name] = value
    options = PeerOptions(peer, flat)
    options.ignore("B", "T", "first_length")
    return options


def _block(options: PeerOptions, *modes: str, default: str) -> dict[str, Any]:
    """What both modes of S4Block, FFTConv and the kernel classes share, and `swap_channels`."""
    mode, kernel = options.take("mode", default), options.take("kernel", None)
    if (mode or kernel) not in modes or (mode is not None and kernel is not None):
        raise ReferenceMismatch(f"{options.peer}: mode={mode!r} and kernel={kernel!r}, wanted mode={modes[0]!r}")
    for name in ("bottleneck", "gate"):
        options.expect(name, None, None, why="it belongs to a gated block around the layer")
    options.expect("mult_act", None, None, *LINEAR, why="it belongs to a gated block around the layer")
    options.expect("weight_norm", False, False, why="the output map is a plain linear map")
    for name in ("dropout", "drop_kernel"):
        options.expect(name, 0.0, 0.0, 0, why=NO_DROPOUT)
    options.expect("dt_fast", False, False, why="time steps have the transforms of dt_transform")
    options.ignore("gate_act", "initializer", "tie_dropout", "transposed", "lr", "wd", "verbose", "backend", *DRAWS)
    measure, init = options.take("measure", None), options.take("init", "legs")
    final, post = options.take("final_act", "glu"), options.take("postact", None)
    final = post if post is not None else final
    if final not in (None, "glu", *LINEAR):
        raise ReferenceMismatch(f"{options.peer}: final_act={final!r} is not reproduced; wanted 'glu', 'id' or None")
    activation = options.expect("activation", "gelu", *ACTIVATIONS, why="it is not among our activations")
    return {
        "d_model": options.take("d_model"),
        "d_state": options.take("d_state", 64),
        "channels": options.take("channels", 1),
        "n_ssm": options.take("n_ssm", None),
        "causal": not options.take("bidirectional", False),
        "max_length": options.take("l_max", None) or None,
        "swap_channels": options.take("swap_channels", False),
        "init": init if measure is None else measure,
        "dt_min": options.take("dt_min", 0.001),
        "dt_max": options.take("dt_max", 0.1),
        "tie_dt": options.take("dt_tie", True),
        "dt_transform": options.expect("dt_transform", "exp", *TRANSFORMS, why="it is no transform of the peer"),
        "real_transform": options.expect("real_transform", "exp", *TRANSFORMS, why="it is no transform of the peer"),
        "imag_transform": options.expect("imag_transform", "none", *TRANSFORMS, why="it is no transform of the peer"),
        "activation": ACTIVATIONS[activation],
        "output": "glu" if final == "glu" else "none" if final is None else "linear",
    }


def _init(peer: str, init: Any) -> str:
    """Our name of the peer's initial systems, one name or several in a list. Raises ReferenceMismatch where the peer's
    name is unknown, or that of a system that diag(a) - P P^* cannot hold."""
    names = SEVERAL.get(init, [init]) if isinstance(init, str) else list(init)
    return "+".join(_init_of_one(peer, str(name)) for name in names)


def _init_of_one(peer: str, init: str) -> str:
    if init in UNTIED:
        raise ReferenceMismatch(f"{peer}: init={init!r} is not reproduced: {UNTIED[init]}")
    name = "hippo" if init in ("diag", "dplr") else init.removeprefix("diag-").removeprefix("dplr-")
    name = OTHER_NAMES.get(name, name)
    if name not in (*MEASURES, *DIAGONALS):
        known = (*MEASURES, *DIAGONALS, *OTHER_NAMES)
        raise ReferenceMismatch(f"{peer}: {unknown_name('initial system', init, known)}")
    return name


def _weights(peer: str, state_dict: Mapping[str, Tensor], has_output: bool, more: list[str]) -> dict[str, Tensor]:
    """The weights of an S4Block under our names."""
    names = {"D": "layer.D"} | {name: f"layer.kernel.{name}" for name in ("inv_dt", "A_real", "C", *more)}
    if has_output:
        names |= {f"output_linear.{kind}": f"output_linear.0.{kind}" for kind in ("weight", "bias")}
    return dict(zip(names, expect_weights(peer, state_dict, list(names.values())), strict=True))


def _readouts_first(weight: Tensor, channels: int) -> Tensor:
    """Columns of an output map that lie channel by channel, as columns readout by readout."""
    columns: Tensor = weight.unflatten(1, (-1, channels))
    return columns.transpose(1, 2).flatten(1)


def _scaled(config: S4Config, weights: Mapping[str, Tensor]) -> Tensor:
    """C as the peer scales it in its first call, C (I - A'^kernel_length)."""
    from zoo_s4.s4 import S4Mixer

    mixer = S4Mixer(config).double()
    mixer.load_state_dict(dict(weights))
    with torch.no_grad():
        return mixer.scaled_readout().to(weights["C"].dtype)


def _convert_minimal(peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Converted:
    options = PeerOptions(peer, config)
    options.ignore("B", "T", "transposed", "lr")
    options.expect("dropout", 0.0, 0.0, 0, why=NO_DROPOUT)
    fields = {
        "d_model": options.take("d_model"),
        "d_state": options.take("d_state", 64),
        "dt_min": options.take("dt_min", 0.001),
        "dt_max": options.take("dt_max", 0.1),
    }
    options.done()
    names = ["D", "kernel.C", "kernel.log_dt", "kernel.log_A_real", "kernel.A_imag"]
    names += ["output_linear.0.weight", "output_linear.0.bias"]
    D, C, dt, real, imag, weight, bias = expect_weights(peer, state_dict, names)
    return config_of(peer, S4dConfig, **fields, init="lin", use_b=False), {
        "D": D.unsqueeze(0),
        "inv_dt": dt.unsqueeze(1),
        "A_real": real,
        "A_imag": imag,  # the peer's A is the conjugate of ours, and so then is its C
        "C": (C * C.new_tensor([1.0, -1.0])).unsqueeze(0),
        "output_linear.weight": weight.squeeze(2),
        "output_linear.bias": bias,
    }
