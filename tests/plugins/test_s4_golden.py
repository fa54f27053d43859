"""S4 and S4D against recorded layers and kernels of state-spaces/s4: values, gradients, states and decode steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor
from zoo.ops.lti import lti_kernel, lti_moments

from golden import GoldenCase, load_case
from layers import FLOAT64, extend_in_pieces, recorded_allowance
from sequence_mixer.conformance.budget import relative_rms
from sequence_mixer.errors import ReferenceMismatch
from zoo_s4.diagonal import discretise as discretise_diagonal
from zoo_s4.dplr import Dplr, dense, discretise, dplr_kernel, unscaled
from zoo_s4.from_reference import convert_s4, convert_s4d
from zoo_s4.layer import StateSpaceLayer
from zoo_s4.parameters import complex_of
from zoo_s4.s4 import S4State
from zoo_s4.s4d import S4dMixer, S4dState

S4 = ["s4_dplr_legs", "s4_dplr_legs_n64", "s4_dplr_fout", "s4_dplr_bidirectional"]
S4D = ["s4d_inv_zoh", "s4d_legs_bilinear", "s4d_legs_zoh", "s4d_lin_bilinear", "s4d_lin_zoh", "s4d_real_zoh"]
S4D += ["s4d_bidirectional", "s4d_n_ssm2_lmax", "s4d_minimal", "s4d_minimal_n64"]
BADLY_CONDITIONED = 1e-7  # in float64, of what the notes of a case call so
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
MINIMAL = {"inv_dt": "kernel.log_dt", "A_real": "kernel.log_A_real", "A_imag": "kernel.A_imag", "C": "kernel.C"}


def layer(case: GoldenCase, dtype: torch.dtype) -> StateSpaceLayer:
    name = "s4" if case.name in S4 else "s4d"
    weights = {key: part.to(dtype) if part.is_floating_point() else part for key, part in case.parameters().items()}
    mixer = zoo.from_reference(name, case.sidecar["peer"]["object"], case.config, weights)
    assert isinstance(mixer, StateSpaceLayer)
    return mixer


def theirs(case: GoldenCase, name: str) -> str:
    """The peer's name of our parameter."""
    if name.startswith("output_linear"):
        return name.replace("output_linear", "output_linear.0")
    if case.sidecar["peer"]["object"] == "S4D":
        return MINIMAL.get(name, name)
    return f"layer.{name}" if name == "D" else f"layer.kernel.{name}"


def allowed(case: GoldenCase, key: str, dtype: torch.dtype, backend: str) -> float:
    notes = " ".join(case.notes)
    if dtype == torch.float64 and "badly conditioned" in notes:
        # the chunks read through C_effective, which the notes name, and gradients of the system go through it
        through = backend in ("chunked", "reference") and "kernel" in key
        return BADLY_CONDITIONED if key in notes or through else FLOAT64
    return recorded_allowance(case, key, dtype)


@PRECISIONS
@pytest.mark.parametrize("backend", ["auto", "fft", "chunked", "reference"])
@pytest.mark.parametrize("name", S4 + S4D)
def test_recorded_layers_come_back(name: str, backend: str, dtype: torch.dtype) -> None:
    case = load_case(name)
    mixer = layer(case, dtype)
    mixer.backend = backend
    x = case.tensors["x"].to(dtype).requires_grad_()
    y = mixer(x)
    assert relative_rms(y, case.tensors["y"]) < allowed(case, "y", dtype, backend)
    (y * case.tensors["w"].to(dtype)).sum().backward()
    assert x.grad is not None
    assert relative_rms(x.grad, case.tensors["grad_x"]) < allowed(case, "grad_x", dtype, backend)
    recorded = {key for key in case.tensors if key.startswith("grad.")}
    assert recorded == {f"grad.{theirs(case, key)}" for key, _ in mixer.named_parameters()}
    for key, parameter in mixer.named_parameters():
        there = f"grad.{theirs(case, key)}"
        exact, gradient = case.tensors[there], parameter.grad
        assert gradient is not None
        gradient = gradient.reshape(exact.shape)
        if case.sidecar["peer"]["object"] == "S4D" and key == "C":  # ours is the conjugate
            gradient = gradient * gradient.new_tensor([1.0, -1.0])
        assert relative_rms(gradient, exact) < allowed(case, there, dtype, backend), key


@PRECISIONS
@pytest.mark.parametrize("name", S4 + S4D)
def test_recorded_kernels_come_back(name: str, dtype: torch.dtype) -> None:
    case = load_case(name)
    kernel = layer(case, dtype).kernel(case.config["T"])
    exact = case.tensors["K"]
    assert kernel.dtype == torch.float64
    assert relative_rms(kernel.reshape(exact.shape), exact) < FLOAT64


@PRECISIONS
@pytest.mark.parametrize("name", [name for name in S4 + S4D if "bidirectional" not in name and "minimal" not in name])
def test_recorded_decode_steps_and_states_come_back(name: str, dtype: torch.dtype) -> None:
    case = load_case(name)
    mixer, x = layer(case, dtype), case.tensors["x"].to(dtype)
    with torch.no_grad():
        steps, stepped = extend_in_pieces(mixer, x, [1] * x.shape[1])
        _, filled = mixer.extend(x, mixer.initial_state(x.shape[0]))
    assert relative_rms(steps, case.tensors["y_step"]) < recorded_allowance(case, "y_step", dtype)
    if "step_final_state" in case.tensors:
        for state in (stepped, filled):
            reached = as_recorded(mixer, state)
            assert relative_rms(reached, case.tensors["step_final_state"]) < recorded_allowance(
                case, "step_final_state", dtype
            )  # fmt: skip


@PRECISIONS
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["s4_dplr_legs", *S4D[:6]])
def test_recorded_outputs_from_a_state_come_back(name: str, grad: bool, dtype: torch.dtype) -> None:
    case = load_case(name)
    mixer, x = layer(case, dtype), case.tensors["x"].to(dtype)
    with torch.set_grad_enabled(grad):
        state = from_recorded(mixer, case.tensors["initial_state"].to(dtype))
        whole, after = mixer.extend(x, state)
        steps, stepped = extend_in_pieces(mixer, x, [1] * x.shape[1], state)
    for y, final in ((whole, after), (steps, stepped)):
        assert relative_rms(y, case.tensors["y_from_state"]) < recorded_allowance(case, "y_from_state", dtype)
        reached = as_recorded(mixer, final)
        assert relative_rms(reached, case.tensors["final_state"]) < recorded_allowance(case, "final_state", dtype)


def input_weight(mixer: S4dMixer) -> Tensor:
    """B' [D,N/2], complex: the peer's states hold it, ours do not."""
    dt, a = mixer._systems()
    B = complex_of(mixer.B)[0].repeat(a.shape[0] // mixer.B.shape[1], 1)
    return discretise_diagonal(dt, a, B, mixer.config.disc)[1]


def as_recorded(mixer: StateSpaceLayer, state: Any) -> Tensor:
    if isinstance(mixer, S4dMixer):
        return torch.view_as_real(input_weight(mixer) * complex_of(state.ssm))
    reached: Tensor = state.ssm
    return reached


def from_recorded(mixer: StateSpaceLayer, recorded: Tensor) -> Any:
    if isinstance(mixer, S4dMixer):
        ssm = torch.view_as_real(complex_of(recorded) / input_weight(mixer)).to(recorded.dtype)
        return S4dState(ssm.detach())
    return S4State(recorded, mixer.initial_state(recorded.shape[0]).readout)


@PRECISIONS
@pytest.mark.parametrize("kind", ["dplr", "diag"])
def test_recorded_kernel_modules_come_back(kind: str, dtype: torch.dtype) -> None:
    """SSMKernelDPLR and SSMKernelDiag by themselves: kernel, gradients, and what a state adds to the output."""
    case = load_case(f"s4_kernel_{kind}")
    t, length = case.tensors, case.config["L"]
    own = {name: t[f"param.{name}"].to(dtype).requires_grad_() for name in ("inv_dt", "A_real", "A_imag", "B", "C")}
    dt, C = own["inv_dt"].double().exp(), complex_of(own["C"])
    a = -torch.complex(own["A_real"].double().exp(), own["A_imag"].double())
    before = complex_of(t["initial_state"])  # [B,D,N/2]
    if kind == "dplr":
        own["P"] = t["param.P"].to(dtype).requires_grad_()
        system = Dplr(dt, a, complex_of(own["P"]), complex_of(own["B"])[0])
        kernel = dplr_kernel(system, C, int(t["param.l_kernel"]))[..., :length]
        A, _ = dense(discretise(system))
        read = torch.view_as_real(2.0 * unscaled(C, A, int(t["param.l_kernel"])).conj().resolve_conj()).flatten(-2)
        states, rows = torch.view_as_real(before).flatten(2).unsqueeze(-1), []
        for _ in range(length):
            states = A @ states
            rows.append((read * states.squeeze(-1).unsqueeze(1)).sum(-1))
        added = torch.stack(rows, -1)
    else:
        log_a, weight = discretise_diagonal(dt, a, complex_of(own["B"])[0], "zoh")
        kernel = lti_kernel(torch.view_as_real(log_a), torch.view_as_real(C * weight), length)
        seen = C * log_a.exp() * before.unsqueeze(1)  # [B,kernels,D,N/2]
        added = lti_kernel(torch.view_as_real(log_a), torch.view_as_real(seen[:, 0]), length).unsqueeze(1)
    assert relative_rms(kernel, t["y"]) < recorded_allowance(case, "y", torch.float64)
    assert relative_rms(added, t["y_state"]) < recorded_allowance(case, "y_state", torch.float64)
    (kernel * t["w"]).sum().backward()
    for name, leaf in own.items():
        assert leaf.grad is not None
        key = f"grad.{name}"
        assert relative_rms(leaf.grad, t[key]) < recorded_allowance(case, key, dtype), name


def test_recorded_vandermonde_products_come_back() -> None:
    case = load_case("s4_vandermonde")
    t = case.tensors
    v, log_a = t["in.v"].requires_grad_(), t["in.x"].requires_grad_()
    y = lti_kernel(log_a, v, case.config["L"])
    assert relative_rms(y, t["y"]) < FLOAT64
    moments = torch.view_as_complex(lti_moments(log_a, t["in.u"]).contiguous()) * torch.view_as_complex(v)
    assert relative_rms(torch.view_as_real(moments), t["y_transpose"]) < FLOAT64
    (y * t["w"]).sum().backward()
    for name, leaf in (("v", v), ("x", log_a)):
        assert leaf.grad is not None
        assert relative_rms(leaf.grad, t[f"grad.{name}"]) < FLOAT64


def test_an_unscaled_readout_is_scaled_on_the_way_in() -> None:
    """A module that never ran has l_kernel 0 and a plain C; its first forward scales it for l_max."""
    case = load_case("s4_dplr_legs")
    weights = case.parameters() | {"layer.kernel.l_kernel": torch.tensor(0)}
    weights["layer.kernel.C"] = case.tensors["C_initial"]
    mixer = zoo.from_reference("s4", case.sidecar["peer"]["object"], case.config, weights)
    assert mixer.config.kernel_length == 40  # type: ignore[attr-defined]
    assert relative_rms(mixer.C.detach(), case.tensors["param.layer.kernel.C"]) < 1e-6  # type: ignore[operator, union-attr]


def flat(config: dict[str, Any]) -> dict[str, Any]:
    return {**config["block"], **config["layer"], **config["kernel"]}


@pytest.mark.parametrize("name", ["s4_dplr_legs", "s4d_lin_zoh"])
def test_the_arguments_may_come_flat_as_the_class_takes_them(name: str) -> None:
    case = load_case(name)
    convert: Callable[..., Any] = convert_s4 if name in S4 else convert_s4d
    peer = case.sidecar["peer"]["object"]
    assert convert(peer, flat(case.config), case.parameters())[0] == convert(peer, case.config, case.parameters())[0]


def test_readouts_may_lie_channel_by_channel() -> None:
    """swap_channels: the same layer, with the columns of its output map in another order."""
    torch.manual_seed(0)
    given = {"d_model": 4, "d_state": 4, "channels": 2, "mode": "diag", "init": "diag-lin"}
    shapes = {"D": (2, 4), "kernel.inv_dt": (4, 1), "kernel.C": (2, 4, 2, 2), "kernel.B": (1, 4, 2, 2)}
    weights = {f"layer.{key}": torch.randn(size).double() for key, size in shapes.items()}
    weights |= {f"layer.kernel.{key}": torch.randn(4, 2).double() for key in ("A_real", "A_imag")}
    weights |= {"output_linear.0.weight": torch.randn(8, 8).double(), "output_linear.0.bias": torch.randn(8).double()}
    peer, x = "S4Block(mode='diag')", torch.randn(2, 9, 4).double()
    plain = zoo.from_reference("s4d", peer, given, weights)
    swapped = weights | {"output_linear.0.weight": weights["output_linear.0.weight"][:, [0, 4, 1, 5, 2, 6, 3, 7]]}
    turned = zoo.from_reference("s4d", peer, given | {"swap_channels": True}, swapped)
    torch.testing.assert_close(turned(x), plain(x))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dropout": 0.1}, "dropout=0.1 is not reproduced"),
        ({"drop_kernel": 0.1}, "drop_kernel=0.1"),
        ({"gate": 2}, "gate=2"),
        ({"bottleneck": 2}, "bottleneck=2"),
        ({"mult_act": "gelu"}, "mult_act='gelu'"),
        ({"final_act": "tanh"}, "final_act='tanh'"),
        ({"activation": "glu"}, "activation='glu'"),
        ({"dt_fast": True}, "dt_fast=True"),
        ({"mode": "diag"}, "mode='diag'"),
        ({"kernel": "s4"}, "kernel='s4'"),
        ({"bandlimit": 0.5}, "bandlimit=0.5"),
        ({"is_real": True}, "is_real=True"),
        ({"dt_transform": "sinh"}, "dt_transform='sinh'"),
        ({"rank": 4}, "rank"),
        ({"final_act": None, "channels": 2}, "output"),
        ({"windowed": True}, "'windowed' is not known"),
    ],
)
def test_options_that_we_lack_are_refused(changes: dict[str, Any], said: str) -> None:
    case = load_case("s4_dplr_legs")
    peer = case.sidecar["peer"]["object"]
    with pytest.raises(ReferenceMismatch, match=said):
        convert_s4(peer, flat(case.config) | changes, case.parameters())
    with pytest.raises(ReferenceMismatch, match="missing: layer"):
        convert_s4(peer, case.config, {})
    with pytest.raises(ReferenceMismatch, match="S4Block"):
        convert_s4("S4D", case.config, case.parameters())


def test_options_of_the_diagonal_layer_that_we_lack_are_refused() -> None:
    case = load_case("s4d_lin_zoh")
    peer = case.sidecar["peer"]["object"]
    for changes, said in (({"disc": "dss"}, "disc='dss'"), ({"mode": "dplr"}, "mode='dplr'")):
        with pytest.raises(ReferenceMismatch, match=said):
            convert_s4d(peer, flat(case.config) | changes, case.parameters())
    with pytest.raises(ReferenceMismatch, match="d_state is 32, and 3 under 'kernel'"):
        convert_s4d(peer, case.config | {"d_state": 32, "kernel": {"d_state": 3}}, case.parameters())
    with pytest.raises(ReferenceMismatch, match=r"dropout=0\.2"):
        convert_s4d("S4D", {"d_model": 4, "dropout": 0.2}, {})
    with pytest.raises(ReferenceMismatch, match="reference module of s4d"):
        convert_s4d("S5", {}, {})
