"""One call of every operator that overwrites its state with one token, and the same by the scan with T = 1."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import zoo.ops
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """step: the operator. scan: (arguments, state) -> y and the state after, by the definition. arguments: all but
    `state`; `options` are passed by keyword."""

    name: str
    step: Callable[..., Tensor]
    scan: Callable[..., tuple[Tensor, Tensor]]
    arguments: dict[str, Tensor]
    state: Tensor
    options: dict[str, Any]

    def run(self, backend: str, state: Tensor, **changed: Any) -> Tensor:
        return self.step(**{**self.arguments, "state": state, **self.options, "backend": backend, **changed})

    def expected(self) -> tuple[Tensor, Tensor]:
        """y and the state after in float64, by the reference."""
        return self.scan({name: part.double() for name, part in self.arguments.items()}, self.state.double())

    def to(self, device: str) -> "Step":
        moved = {name: part.to(device) for name, part in self.arguments.items()}
        return Step(self.name, self.step, self.scan, moved, self.state.to(device), self.options)


def ssd(dtype: torch.dtype, *, P: int = 6, N: int = 5, G: int = 2, plain: bool = False) -> Step:
    B, H = 3, 4
    arguments = {"x": torch.randn(B, H, P).to(dtype), "dt": torch.randn(B, H), "A": -2 * torch.rand(H)}
    arguments |= {name: torch.randn(B, G, N).to(dtype) for name in "BC"}
    options: dict[str, Any] = {}
    if not plain:
        arguments |= {"D": torch.randn(H, P) if G > 1 else torch.randn(H), "dt_bias": torch.randn(H)}
        options = {"dt_softplus": True, "dt_limit": (0.2, 1.5)}

    def scan(given: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        tokens = {name: part.unsqueeze(1) if name in ("x", "dt", "B", "C") else part for name, part in given.items()}
        y, after = zoo.ops.ssd(**tokens, **options, initial_state=state, backend="reference")
        return y.squeeze(1), after

    return Step("ssd_step", zoo.ops.ssd_step, scan, arguments, torch.randn(B, H, P, N), options)


def selective_scan(dtype: torch.dtype, *, E: int = 6, N: int = 5, G: int = 1, plain: bool = False) -> Step:
    B = 5  # more than one program walks over, and no multiple of it
    arguments = {"x": torch.randn(B, E).to(dtype), "dt": torch.randn(B, E).abs(), "A": -2 * torch.rand(E, N)}
    arguments |= {name: torch.randn(B, G, N).to(dtype) for name in "BC"}
    if not plain:
        arguments |= {"D": torch.randn(E), "dt_bias": torch.randn(E), "z": torch.randn(B, E).to(dtype)}
    options = {} if plain else {"dt_softplus": True}

    def scan(given: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        one = ("x", "dt", "B", "C", "z")
        tokens = {name: part.unsqueeze(1) if name in one else part for name, part in given.items()}
        y, after = zoo.ops.selective_scan(**tokens, **options, initial_state=state, backend="reference")
        return y.squeeze(1), after

    return Step("selective_scan_step", zoo.ops.selective_scan_step, scan, arguments, torch.randn(B, E, N), options)


def modes(channels: int, M: int) -> dict[str, Tensor]:
    rate, turn, c = torch.rand(channels, M), torch.randn(channels, M), torch.randn(channels, M, 2)
    return {"log_a": torch.stack([-0.1 * rate, turn], -1).double(), "c": c.double()}


def lti_scan(dtype: torch.dtype, *, D: int = 6, M: int = 3, plain: bool = False) -> Step:
    B = 5
    arguments = {"x": torch.randn(B, D).to(dtype), **modes(D, M)} | ({} if plain else {"D": torch.randn(D)})

    def scan(given: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        y, after = zoo.ops.lti_scan(**{**given, "x": given["x"].unsqueeze(1)}, initial_state=state, backend="reference")
        return y.squeeze(1), after

    return Step("lti_scan_step", zoo.ops.lti_scan_step, scan, arguments, torch.randn(B, D, M, 2), {})


def lti_attention(dtype: torch.dtype, *, H: int = 6, P: int = 1, M: int = 3, plain: bool = False) -> Step:
    B = 5
    arguments = {name: torch.randn(B, H, P).to(dtype) for name in "qkv"} | modes(H, M)
    arguments |= {} if plain else {"D": torch.randn(H)}

    def scan(given: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        tokens = {name: part.unsqueeze(1) if name in "qkv" else part for name, part in given.items()}
        y, after = zoo.ops.lti_attention(**tokens, initial_state=state, backend="reference")
        return y.squeeze(1), after

    state = torch.randn(B, H, M, 2, P, P)
    return Step("lti_attention_step", zoo.ops.lti_attention_step, scan, arguments, state, {})


def short_convolution(dtype: torch.dtype, *, D: int = 6, W: int = 4, plain: bool = False) -> Step:
    B = 3
    arguments = {"x": torch.randn(B, D).to(dtype), "weight": torch.randn(D, W)}
    arguments |= {} if plain else {"bias": torch.randn(D)}
    options = {} if plain else {"activation": "silu"}

    def scan(given: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        tokens = {**given, "x": given["x"].unsqueeze(1)}
        y, after = zoo.ops.short_convolution(**tokens, **options, initial_state=state, backend="reference")
        return y.squeeze(1), after

    state = torch.randn(B, D, W - 1).to(dtype)
    return Step("short_convolution_step", zoo.ops.short_convolution_step, scan, arguments, state, options)


def linear_attention(
    dtype: torch.dtype, *, N: int = 5, P: int = 6, G: int = 2, decay: str = "none", **options: Any
) -> Step:
    B, H = 2, 4
    arguments = {"q": torch.randn(B, H, N), "k": torch.randn(B, G, N), "v": torch.randn(B, G, P)}
    if options.get("normalize"):  # positive weights, as the normaliser needs
        arguments |= {name: arguments[name].abs() + 0.1 for name in "qk"}
    arguments = {name: part.to(dtype) for name, part in arguments.items()}
    if decay != "none":
        arguments["log_decay"] = -torch.rand(B, H) if decay == "head" else -torch.rand(B, H, N)

    def scan(given: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        tokens = {name: part.unsqueeze(1) for name, part in given.items()}
        y, after = zoo.ops.linear_attention(**tokens, **options, initial_state=state, backend="reference")
        return y.squeeze(1), after

    state = torch.rand(B, H, N, P + bool(options.get("normalize")))
    return Step("linear_attention_step", zoo.ops.linear_attention_step, scan, arguments, state, options)


STEPS: dict[str, Callable[[torch.dtype], Step]] = {
    "ssd": ssd,
    "ssd, one group, D per head": lambda dtype: ssd(dtype, P=5, N=16, G=1),
    "ssd, nothing optional": lambda dtype: ssd(dtype, plain=True),
    "selective_scan": selective_scan,
    "selective_scan, groups": lambda dtype: selective_scan(dtype, G=3),
    "selective_scan, nothing optional": lambda dtype: selective_scan(dtype, N=16, plain=True),
    "lti_scan": lti_scan,
    "lti_scan, nothing optional": lambda dtype: lti_scan(dtype, M=8, plain=True),
    "lti_attention": lti_attention,
    "lti_attention, nothing optional": lambda dtype: lti_attention(dtype, M=4, plain=True),
    "linear_attention": linear_attention,
    "linear_attention, normalised": lambda dtype: linear_attention(
        dtype, G=4, normalize=True, feature_map="elu_plus_one", scale=0.5, eps=1e-3
    ),
    "linear_attention, decay": lambda dtype: linear_attention(dtype, decay="head", feature_map="silu", N=8, P=8),
    "linear_attention, channel decay": lambda dtype: linear_attention(
        dtype, decay="channel", normalize=True, feature_map="relu"
    ),
    "linear_attention, squares": lambda dtype: linear_attention(dtype, feature_map="squared_relu", scale=0.25),
    "short_convolution": short_convolution,
    "short_convolution, nothing optional": lambda dtype: short_convolution(dtype, D=9, W=2, plain=True),
    "short_convolution, many taps": lambda dtype: short_convolution(dtype, W=12),
}
