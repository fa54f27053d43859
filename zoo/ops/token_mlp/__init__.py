"""Token MLP: two products over the token axis with a GELU between them, the same for every channel.

y = w2 act(w1 x + b1) + b2 on x [T,D]. Source: Tolstikhin et al. 2021 (arXiv 2105.01601).
"""

from __future__ import annotations

from torch import Tensor

from sequence_mixer.errors import ConfigError, ShapeError
from sequence_mixer.shapes import expect_floating, expect_same_device, expect_shape
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select, without_autocast
from zoo.ops.token_mlp import chunked, reference
from zoo.ops.token_mlp.triton_path import token_mlp_triton

__all__ = ["ACTIVATIONS", "flops", "token_mlp"]

ACTIVATIONS = ("gelu_tanh", "gelu_erf")


def token_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu_tanh",
    causal: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Mix the tokens of each channel; x is never transposed.

    x: [B,T,D]. w1: [E,K], b1: [E] or None. w2: [K,E], b2: [K] or None. K >= T: column t of w1 and row t of w2 belong to
        token t, those beyond the last token are not used. Weights may have another floating dtype than x, and are
        rounded to that of x.
    activation: "gelu_tanh" (a sigmoid(2 sqrt(2/pi) (a + 0.044715 a^3)), the default of flax) or "gelu_erf" (a Phi(a),
        that of torch).
    causal: use the lower triangles of w1 and w2 only, so that hidden unit e sees tokens up to e and is seen by tokens
        from e on. Needs E = K.
    backend: "auto", "triton", "chunked" or "reference".
    Returns y [B,T,D] in the dtype of x.
    Raises ShapeError, DtypeError, DeviceError, BackendError; ConfigError for an unknown activation.
    """
    sizes = expect_shape("x", x, "B T D")
    sizes = expect_shape("w1", w1, "E K", sizes)
    sizes = expect_shape("w2", w2, "K E", sizes)
    for name, bias, letter in (("b1", b1, "E"), ("b2", b2, "K")):
        if bias is not None:
            expect_shape(name, bias, letter, sizes)
    tokens, hidden = sizes["T"], sizes["E"]
    if sizes["K"] < tokens:
        raise ShapeError(f"w1 has shape {list(w1.shape)}, wanted [E, K] with K >= T={tokens}")
    if hidden == 0:
        raise ShapeError(f"w1 has shape {list(w1.shape)}, wanted at least one hidden unit")
    if causal and hidden != sizes["K"]:
        raise ShapeError(f"causal=True needs as many hidden units as tokens, w1 is [E={hidden}, K={sizes['K']}]")
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation is {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
    for name, tensor in (("x", x), ("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if tensor is not None:
            expect_floating(name, tensor)
    expect_same_device(x, w1=w1, b1=b1, w2=w2, b2=b2)
    mix = select("token_mlp", backend, (x, w1, b1, w2, b2), {"empty": x.numel() == 0})
    units = tokens if causal else hidden
    w1, w2 = w1[:units, :tokens].to(x.dtype), w2[:tokens, :units].to(x.dtype)
    if causal:
        w1, w2 = w1.tril(), w2.tril()
    b1 = None if b1 is None else b1[:units].to(x.dtype)
    b2 = None if b2 is None else b2[:tokens].to(x.dtype)
    with without_autocast(x):
        y: Tensor = mix(x, w1, b1, w2, b2, tanh=activation == "gelu_tanh")
    return y


def flops(batch: int, tokens: int, channels: int, hidden: int) -> int:
    """Matrix-product FLOPs of the forward, 2 per multiply-add: 4 B T E D; E = T if causal, whole squares counted."""
    return 4 * batch * tokens * hidden * channels


def _triton_refuses(empty: bool) -> str | None:
    return "x is empty" if empty else None


register_backend("token_mlp", Serves("reference"), reference.token_mlp_reference, priority=REFERENCE)
register_backend("token_mlp", Serves("chunked"), chunked.token_mlp_chunked, priority=PLAIN)
register_backend(
    "token_mlp",
    Serves("triton", devices=("cuda",), dtypes=("float32", "bfloat16", "float16"), needs=("triton",)),
    token_mlp_triton,
    refuses=_triton_refuses,
    priority=KERNEL,
)
