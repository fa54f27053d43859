"""The rows of the operator benchmark: one workload each, with the least work it takes and what it is held against.

Every row is a plain function of (device) that returns a `Work`. `ROWS` names them: those with targets, variants of SSD,
the forms of lti_scan by length, SSD beside softmax attention. Peer figures were measured on one H200 (torch 2.11,
triton 3.6); `benchmarks/peers.py` measures the peers that import beside ours in the same run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import zoo
from torch import Tensor
from zoo.ops.lti.vandermonde import lti_kernel

BF16 = torch.bfloat16


@dataclass
class Work:
    """One workload on one device.

    call: backend -> the output (a tensor, or a tuple whose first entry is differentiated). inputs: tensors by name;
    those that require grad are differentiated. moved: least bytes (forward, forward + backward). flops: of the forward.
    """

    call: Callable[[str], Any]
    inputs: Mapping[str, Tensor]
    moved: tuple[float, float]
    flops: float = 0.0


@dataclass(frozen=True)
class Row:
    """make: device -> Work. backends: ours to time. target: ms asked of ours (fwd, f+b). peer: the best peer's ms.

    peers: functions of `benchmarks.peers` by name; each takes the inputs and returns a call.
    """

    make: Callable[[str], Work]
    target: tuple[float | None, float | None]
    peer: tuple[float | None, float | None] = (None, None)
    backends: tuple[str, ...] = ("triton",)
    peers: tuple[str, ...] = ()


def _normal(*shape: int, device: str, scale: float = 1.0, dtype: torch.dtype = BF16, grad: bool = True) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_(grad)


def _nbytes(*tensors: Tensor) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def ssd(B: int, T: int, H: int = 64, P: int = 64, N: int = 128, G: int = 1, packed: int = 0, state: bool = False,
        dtype: torch.dtype = BF16) -> Callable[[str], Work]:  # fmt: skip
    def make(device: str) -> Work:
        x = _normal(B, T, H, P, device=device, dtype=dtype)
        dt = _normal(B, T, H, device=device, dtype=dtype)
        Bs = _normal(B, T, G, N, device=device, scale=N**-0.5, dtype=dtype)
        C = _normal(B, T, G, N, device=device, dtype=dtype)
        A = (-torch.rand(H, device=device) * 15 - 1).requires_grad_()
        step = torch.rand(H, device=device) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)
        bias = torch.log(torch.expm1(step.exp())).requires_grad_()
        D = torch.ones(H, device=device).requires_grad_()
        inputs = {"x": x, "dt": dt, "A": A, "B": Bs, "C": C, "D": D, "dt_bias": bias}
        more: dict[str, Tensor] = {}
        if packed:
            bounds = torch.linspace(0, T, packed + 1, device=device).to(torch.int32)
            more["cu_seqlens"] = bounds
        if state:
            more["initial_state"] = inputs["initial_state"] = torch.randn(B, H, P, N, device=device).requires_grad_()
        least = _nbytes(x, dt, Bs, C)
        return Work(
            lambda backend: zoo.ops.ssd(
                x,
                dt,
                A,
                Bs,
                C,
                D=D,
                dt_bias=bias,
                dt_softplus=True,
                backend=backend,
                **more,  # type: ignore[arg-type]
            ),
            inputs,
            (least + _nbytes(x), 3 * least + 2 * _nbytes(x)),
            2.0 * B * T * H * (32 * N + 32 * P + 2 * N * P),
        )

    return make


def crossover(T: int, tokens: int = 32768) -> Callable[[str], Work]:
    """SSD of 4,096 channels, with q, k and v of the softmax attention of width 2,048 that it stands for."""

    def make(device: str) -> Work:
        work = ssd(tokens // T, T)(device)
        shape = (tokens // T, T, 16, 128)
        work.inputs = {**work.inputs, **{name: _normal(*shape, device=device) for name in "qkv"}}
        return work

    return make


def ssd_step(B: int, H: int = 64, P: int = 64, N: int = 128) -> Callable[[str], Work]:
    def make(device: str) -> Work:
        x = _normal(B, 1, H, P, device=device, grad=False)
        dt = _normal(B, 1, H, device=device, grad=False)
        Bs, C = (_normal(B, 1, 1, N, device=device, grad=False) for _ in range(2))
        A = -torch.rand(H, device=device) * 15 - 1
        bias, D = torch.zeros(H, device=device), torch.ones(H, device=device)
        state = torch.randn(B, H, P, N, device=device)

        now = [part.squeeze(1) for part in (x, dt, Bs, C)]

        def call(backend: str) -> Any:
            return zoo.ops.ssd_step(
                now[0], now[1], A, now[2], now[3], state, D=D, dt_bias=bias, dt_softplus=True, backend=backend
            )

        inputs = {"x": x, "dt": dt, "A": A, "B": Bs, "C": C, "D": D, "dt_bias": bias, "state": state}
        return Work(call, inputs, (2 * _nbytes(state) + 2 * _nbytes(x), 0.0))

    return make


def selective_step(B: int, E: int = 4096, N: int = 16) -> Callable[[str], Work]:
    def make(device: str) -> Work:
        x, z, dt = (_normal(B, E, device=device, grad=False) for _ in range(3))
        Bs, C = (_normal(B, N, device=device, grad=False) for _ in range(2))
        A = -torch.arange(1, N + 1, device=device, dtype=torch.float32).repeat(E, 1)
        bias, D = torch.zeros(E, device=device), torch.ones(E, device=device)
        state = torch.randn(B, E, N, device=device)

        def call(backend: str) -> Any:
            return zoo.ops.selective_scan_step(
                x, dt, A, Bs, C, state, D=D, z=z, dt_bias=bias, dt_softplus=True, backend=backend
            )

        inputs = {"x": x, "dt": dt, "A": A, "B": Bs, "C": C, "D": D, "z": z, "dt_bias": bias, "state": state}
        return Work(call, inputs, (2 * _nbytes(state) + 4 * _nbytes(x) + _nbytes(A), 0.0))

    return make


def lti_step(B: int, D: int, M: int = 32) -> Callable[[str], Work]:
    """The operator alone: modes are given, as a mixer makes them, in float64."""

    def make(device: str) -> Work:
        x, skip = _normal(B, D, device=device, grad=False), torch.ones(D, device=device)
        log_a, c = (part.detach().double() for part in modes(D, M, device))
        state = torch.randn(B, D, M, 2, device=device)
        return Work(
            lambda backend: zoo.ops.lti_scan_step(x, log_a, c, state, D=skip, backend=backend),
            {"x": x, "log_a": log_a, "c": c, "D": skip, "state": state},
            (2 * _nbytes(state) + 2 * _nbytes(x) + _nbytes(log_a, c), 0.0),
        )

    return make


def decode(name: str, B: int, d_model: int, **options: Any) -> Callable[[str], Work]:
    """One token through a whole layer whose state is donated: parameters are read, the state is moved once."""

    def make(device: str) -> Work:
        mixer = zoo.create(name, d_model=d_model, **options).to(device, BF16).requires_grad_(False)
        token = _normal(B, 1, d_model, device=device, grad=False)
        state = mixer.initial_state(B)

        def call(backend: str) -> Any:
            mixer.backend = backend
            with torch.no_grad():
                return mixer.extend(token, state, donate=True)[0]

        return Work(
            call,
            {"token": token},
            (2.0 * state.nbytes + _nbytes(*mixer.parameters()) + 2 * _nbytes(token), 0.0),
        )

    return make


def linear(B: int, T: int, H: int = 16, P: int = 128, normalize: bool = False) -> Callable[[str], Work]:
    def make(device: str) -> Work:
        q, k = (_normal(B, T, H, P, device=device, scale=P**-0.5) for _ in range(2))
        if normalize:  # positive features, as the normaliser needs
            q, k = (tensor.detach().abs().requires_grad_() for tensor in (q, k))
        v = _normal(B, T, H, P, device=device)
        return Work(
            lambda backend: zoo.ops.linear_attention(q, k, v, normalize=normalize, backend=backend),
            {"q": q, "k": k, "v": v},
            (4 * _nbytes(v), 4 * _nbytes(v) + 7 * _nbytes(v)),
            2.0 * B * T * H * (32 * P + 32 * P + 2 * P * P),
        )

    return make


def performer(B: int, T: int, H: int = 16, P: int = 128, M: int = 256) -> Callable[[str], Work]:
    def make(device: str) -> Work:
        q, k, v = (_normal(B, T, H, P, device=device) for _ in range(3))
        from zoo.ops.favor_attention import draw_projection

        projection = draw_projection(M, P, generator=torch.Generator().manual_seed(0)).to(device)
        return Work(
            lambda backend: zoo.ops.favor_attention(q, k, v, projection, backend=backend),
            {"q": q, "k": k, "v": v, "projection": projection},
            (4 * _nbytes(v), 11 * _nbytes(v)),
            2.0 * B * T * H * (2 * P * M + 64 * M + 32 * P + 2 * M * P),
        )

    return make


def selective(B: int, T: int, E: int = 4096, N: int = 16) -> Callable[[str], Work]:
    def make(device: str) -> Work:
        x, z, dt = (_normal(B, T, E, device=device) for _ in range(3))
        Bs, C = (_normal(B, T, N, device=device) for _ in range(2))
        A = (-torch.arange(1, N + 1, device=device, dtype=torch.float32).repeat(E, 1)).requires_grad_()
        step = torch.rand(E, device=device) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)
        bias, D = torch.log(torch.expm1(step.exp())).requires_grad_(), torch.ones(E, device=device).requires_grad_()
        return Work(
            lambda backend: zoo.ops.selective_scan(
                x, dt, A, Bs, C, D=D, z=z, dt_bias=bias, dt_softplus=True, backend=backend
            ),
            {"x": x, "dt": dt, "A": A, "B": Bs, "C": C, "D": D, "z": z, "dt_bias": bias},
            (4 * _nbytes(x), 11 * _nbytes(x)),
        )

    return make


def convolution(B: int, T: int, D: int = 4352, W: int = 4) -> Callable[[str], Work]:
    def make(device: str) -> Work:
        x = _normal(B, T, D, device=device)
        weight, bias = (_normal(*shape, device=device, scale=0.5) for shape in ((D, W), (D,)))
        return Work(
            lambda backend: zoo.ops.short_convolution(x, weight, bias, activation="silu", backend=backend),
            {"x": x, "weight": weight, "bias": bias},
            (2 * _nbytes(x), 5 * _nbytes(x)),
        )

    return make


def norm(rows: int, D: int) -> Callable[[str], Work]:
    def make(device: str) -> Work:
        x, z = (_normal(rows, D, device=device) for _ in range(2))
        weight = torch.ones(D, device=device).requires_grad_()
        return Work(
            lambda backend: zoo.ops.gated_rms_norm(x, z, weight, eps=1e-5, backend=backend),
            {"x": x, "z": z, "weight": weight},
            (3 * _nbytes(x), 8 * _nbytes(x)),
        )

    return make


def layer(name: str, B: int, T: int, d_model: int, **options: Any) -> Callable[[str], Work]:
    def make(device: str) -> Work:
        mixer = zoo.create(name, d_model=d_model, **options).to(device, BF16)
        x = _normal(B, T, d_model, device=device)

        def call(backend: str) -> Any:
            mixer.backend = backend
            return mixer(x)

        cost = mixer.cost(B, T, BF16)
        return Work(call, {"x": x, **dict(mixer.named_parameters())}, (cost.bytes, 3.0 * cost.bytes), cost.flops)

    return make


def modes(channels: int, M: int, device: str) -> tuple[Tensor, Tensor]:
    """S4D-Lin modes with steps of 0.001 to 0.1, and weights of them."""
    step = torch.exp(torch.rand(channels, 1) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
    log_a = torch.stack((-0.5 * step.expand(-1, M), step * math.pi * torch.arange(M)), -1)
    c = torch.randn(channels, M, 2) * (0.5 / M) ** 0.5 * step[..., None]
    return log_a.to(device).requires_grad_(), c.to(device).requires_grad_()


def lti(B: int, D: int, T: int, M: int = 32) -> Callable[[str], Work]:
    def make(device: str) -> Work:
        x = _normal(B, T, D, device=device)
        log_a, c = modes(D, M, device)
        return Work(
            lambda backend: zoo.ops.lti_scan(x, log_a, c, backend=backend),
            {"x": x, "log_a": log_a, "c": c},
            (2 * _nbytes(x), 5 * _nbytes(x)),
        )

    return make


def long(B: int, D: int, T: int) -> Callable[[str], Work]:
    def make(device: str) -> Work:
        x = _normal(B, T, D, device=device)
        kernel = (torch.randn(D, T, device=device) * torch.exp(-torch.arange(T, device=device) / 200)).requires_grad_()
        return Work(
            lambda backend: zoo.ops.long_convolution(x, kernel, backend=backend),
            {"x": x, "kernel": kernel},
            (2 * _nbytes(x) + _nbytes(kernel), 5 * _nbytes(x) + 3 * _nbytes(kernel)),
        )

    return make


def s4d_kernel(D: int, M: int, T: int) -> Callable[[str], Work]:
    def make(device: str) -> Work:
        log_a, c = modes(D, M, device)
        return Work(lambda _: lti_kernel(log_a, c, T), {"log_a": log_a, "c": c}, (4.0 * D * T, 12.0 * D * T))

    return make


def s4_kernel(D: int, N: int, T: int) -> Callable[[str], Work]:
    def make(device: str) -> Work:
        mixer = zoo.create("s4", d_model=D, d_state=N, kernel_length=T).to(device)

        def call(backend: str) -> Any:
            mixer.backend = backend
            return mixer.kernel(T)

        used = {name: p for name, p in mixer.named_parameters() if not name.startswith("out") and name != "D"}
        return Work(call, used, (4.0 * D * T, 12.0 * D * T))

    return make


def lti_attention(B: int, T: int, d_model: int, width: int, M: int = 32) -> Callable[[str], Work]:
    def make(device: str) -> Work:
        heads = d_model // width
        q, k, v = (_normal(B, T, heads, width, device=device) for _ in range(3))
        log_a, c = modes(heads, M, device)
        D = torch.ones(heads, device=device).requires_grad_()
        return Work(
            lambda backend: zoo.ops.lti_attention(q, k, v, log_a, c, D=D, backend=backend),
            {"q": q, "k": k, "v": v, "log_a": log_a, "c": c, "D": D},
            (4 * _nbytes(v), 11 * _nbytes(v)),
        )

    return make


def attention(B: int, T: int, H: int = 16, P: int = 128) -> Callable[[str], Work]:
    def make(device: str) -> Work:
        q, k, v = (_normal(B, T, H, P, device=device) for _ in range(3))
        return Work(
            lambda backend: zoo.ops.softmax_attention(q, k, v, backend=backend),
            {"q": q, "k": k, "v": v},
            (4 * _nbytes(v), 11 * _nbytes(v)),
            2.0 * B * H * T * T * P,
        )

    return make


LTI = ("triton", "chunked", "fft")
ENOUGH = (0.40 / 0.7, 1.9 / 0.7)  # 70% of the speed asked of the plain row, for the same work
TARGETS: dict[str, Row] = {
    "ssd B8 T4096": Row(ssd(8, 4096), (0.40, 1.9), (1.138, 4.915), peers=("mamba_ssd",)),
    "ssd B16 T2048": Row(ssd(16, 2048), (0.40, 1.9), (1.139, 4.923), peers=("mamba_ssd",)),
    "ssd B2 T16384": Row(ssd(2, 16384), (0.45, 2.0), (1.138, 4.919), peers=("mamba_ssd",)),
    "ssd B1 T65536": Row(ssd(1, 65536), (0.90, 4.0), (2.490, 9.989), peers=("mamba_ssd",)),
    "ssd B8 T4096 N64": Row(ssd(8, 4096, N=64), (0.32, 1.5), (0.833, 3.867), peers=("mamba_ssd",)),
    "ssd step B128": Row(ssd_step(128), (0.135, None), (0.155, None), peers=("mamba_step",)),
    "selective_scan step B128": Row(selective_step(128), (None, None), backends=("triton", "chunked")),
    "lti_scan step B128": Row(lti_step(128, 2048), (None, None), backends=("triton", "chunked")),
    "s4d step B128": Row(decode("s4d", 128, 2048), (None, None), backends=("triton", "chunked")),
    "h3 step B128": Row(decode("h3", 128, 2048), (None, None), backends=("triton", "chunked")),
    "ssd layer step B128": Row(decode("ssd", 128, 2048), (None, None), backends=("triton", "chunked")),
    "linear_attention B8 T4096": Row(linear(8, 4096), (0.22, 0.90), (0.371, 1.612), peers=("fla_linear",)),
    "linear_attention normalised": Row(
        linear(8, 4096, normalize=True), (0.28, 1.1), (0.919, 3.256), peers=("fla_linear_normalised",)
    ),
    "performer m256": Row(performer(8, 4096), (0.90, 3.5), (7.94, 21.6)),
    "selective_scan B8 T4096": Row(selective(8, 4096), (2.0, 9.0), (2.293, 11.41)),
    "selective_scan B2 T16384": Row(selective(2, 16384), (None, None), (2.929, 12.456)),
    "short_convolution": Row(convolution(8, 4096), (0.17, 0.55), (0.173, 0.692)),
    "gated_rms_norm": Row(norm(32768, 4096), (0.195, 0.60), (0.192, 0.719), peers=("mamba_norm",)),
    "ssd layer d2048 B8 T4096": Row(layer("ssd", 8, 4096, 2048), (3.0, 9.9), (3.829, 14.04)),
    "softmax_attention B8 T4096": Row(
        attention(8, 4096), (None, None), (1.008, 4.074), ("sdpa", "triton"), ("sdpa_cudnn",)
    ),
    "lti_scan B8 D2048 T4096": Row(lti(8, 2048, 4096), (0.35, 1.2), (1.612, 3.994), LTI),
    "lti_scan B2 D2048 T16384": Row(lti(2, 2048, 16384), (0.30, 1.1), (2.861, 8.595), LTI),
    "lti_scan B1 D1024 T65536": Row(lti(1, 1024, 65536), (0.30, 1.1), (4.948, 12.86), LTI),
    "long_convolution B8 D2048 T1024": Row(long(8, 2048, 1024), (0.14, 0.5), (0.269, 1.476), LTI),
    "long_convolution B8 D2048 T4096": Row(long(8, 2048, 4096), (0.80, 2.6), (1.612, 3.994), LTI),
    "long_convolution B2 D2048 T16384": Row(long(2, 2048, 16384), (2.2, 7.0), (2.861, 8.595), LTI),
    "s4d kernel D1024 N64 T4096": Row(s4d_kernel(1024, 32, 4096), (None, None), (0.128, 0.317), ("auto",)),
    "s4d kernel D1024 N64 T16384": Row(s4d_kernel(1024, 32, 16384), (0.25, 0.8), (0.484, 1.329), ("auto",)),
    "s4 kernel D1024 N64 T4096": Row(s4_kernel(1024, 64, 4096), (None, None), backends=("triton", "fft", "chunked")),
    "lti_attention d2048 P1 B8 T4096": Row(lti_attention(8, 4096, 2048, 1), (None, None), backends=LTI),
    "lti_attention d2048 P64 B1 T4096": Row(lti_attention(1, 4096, 2048, 64), (None, None), backends=LTI),
}
VARIANTS: dict[str, Row] = {
    "ssd packed 37": Row(ssd(1, 32768, packed=37), ENOUGH),
    "ssd initial state": Row(ssd(8, 4096, state=True), ENOUGH),
    "ssd G4": Row(ssd(8, 4096, G=4), ENOUGH),
    "ssd G8": Row(ssd(8, 4096, G=8), ENOUGH),
    "ssd P32": Row(ssd(8, 4096, H=128, P=32), ENOUGH),
    "ssd P128": Row(ssd(8, 4096, H=32, P=128), ENOUGH),
    "ssd N16": Row(ssd(8, 4096, N=16), (None, None)),
    "ssd N256": Row(ssd(8, 4096, N=256), (2 * ENOUGH[0], 2 * ENOUGH[1])),
    "ssd float16": Row(ssd(8, 4096, dtype=torch.float16), (None, None), backends=("triton", "chunked")),
    "ssd float32": Row(ssd(8, 4096, dtype=torch.float32), (None, None), backends=("triton", "chunked")),
    "ssd B1 T1000000 H16": Row(ssd(1, 1_000_000, H=16), (None, None)),
    "lti_scan B1 D256 T1000000": Row(lti(1, 256, 1_000_000), (None, None)),
}
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
FORMS: dict[str, Row] = {
    f"lti_scan 65536 tokens D1024 T{T}": Row(lti(65536 // T, 1024, T), (None, None), backends=LTI) for T in LENGTHS
}
CROSSOVER: dict[str, Row] = {
    f"ssd against cuDNN attention T{T}": Row(crossover(T), (None, None), peers=("sdpa_cudnn",))
    for T in (512, 1024, 1536, 2048, 4096, 16384)
}
ROWS = TARGETS | VARIANTS | FORMS | CROSSOVER
