"""FAVOR+ attention: softmax's kernel estimated by positive random features, in time linear in the tokens.

Source: Choromanski et al. 2021 (arXiv 2009.14794); code: google-research/performer, lucidrains/performer-pytorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sequence_mixer.errors import ConfigError, DtypeError, PackingError, ShapeError
from sequence_mixer.shapes import (
    accumulation_dtype,
    expect_cu_seqlens,
    expect_floating,
    expect_padding_mask,
    expect_same_device,
    expect_shape,
)
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select, without_autocast
from zoo.ops.favor_attention.chunked import favor_attention_chunked
from zoo.ops.favor_attention.cost import flops
from zoo.ops.favor_attention.features import FEATURES, expect_features, feature_count
from zoo.ops.favor_attention.projection import draw_projection
from zoo.ops.favor_attention.reference import favor_attention_reference
from zoo.ops.favor_attention.running_maximum import empty_state
from zoo.ops.favor_attention.triton_path import favor_attention_triton, refuses
from zoo.ops.semiseparable.triton_path import KERNEL_DTYPES

__all__ = ["FEATURES", "draw_projection", "favor_attention", "feature_count", "feature_epsilon", "flops"]

RELU_EPS, JAX_EPS = 1e-3, 1e-6  # those of the JAX code's layers


def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    features: str = "positive",
    causal: bool = True,
    eps: float = 0.0,
    feature_eps: float | None = None,
    compat: str | None = None,
    padding_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """y_i = sum_j w_ij v_j / (sum_j w_ij + eps), w_ij = <phi(q_i), phi(k_j)>, over j <= i if causal.

    q: [B,T,H,N]. k: [B,T,G,N], v: [B,T,G,P], of the dtype of q; query head h reads group h // (H / G). With
        causal=False and without packing k and v may have another number of tokens, [B,K,G,...].
    projection: [M,N] ([M/2,N] if hyperbolic), the same for all heads; see `draw_projection`. May be float32 beside half
        precision inputs.
    features: phi, with x' = N^-1/4 x: "positive" M^-1/2 exp(W x' - |x'|^2 / 2); "hyperbolic" the same with W and -W;
        "relu" max(W x', 0) + feature_eps. The first two estimate exp(<q, k> / sqrt(N)) without bias if every row of W
        is standard normal, with a variance that grows as exp(|q' + k'|^2): keep inputs small.
    causal: False for one sum over all (real) tokens, read by every query.
    eps: added to the sum of weights. 0 is safe: sums are scaled by running maxima, so that no row's is 0.
    feature_eps: added to every ReLU feature, 1e-3 if None; under `compat` to every stabilised one, 1e-6 if None.
        Refused elsewhere: beside a maximum it would make weights depend on other tokens.
    compat: "jax" for the features of the JAX code, M^-1/2 (exp(W x' - |x'|^2 / 2 - max) + feature_eps), the max of W x'
        being a query's own, or that over all features and keys of the sequence. Needs causal=False: with a maximum over
        all keys future keys change past outputs.
    padding_mask: bool [B,T] ([B,K] of the keys), True = real, one run per row. What stands in padded slots (NaN too)
        does not matter; the state is the one after the real tokens. With as many queries as keys it also says which
        queries are real: padded rows of y are 0.
    initial_state: [B,H,M,P+2], with S in place of B under `cu_seqlens`; None for empty. Needs causal=True. Its columns
        are sum_j f_jr v_j, sum_j f_jr and top_r, where f_jr = exp(log(M^1/2 phi_r(k_j)) - top_r) and top_r is the
        maximum of these logarithms so far, finfo.min if there was no key. ReLU features are kept as they are, beside a
        column of 0. `top` is a scale that cancels: no gradient goes through it.
    cu_seqlens: int [S+1], boundaries of S sequences packed in one row (B = 1); empty sequences are legal.
    backend: "auto", "triton", "chunked" or "reference".
    Returns y [B,T,H,P] in the dtype of v and the final state (the total sums if causal=False), shaped like
    `initial_state`, in the accumulation dtype.
    Raises ShapeError, DtypeError, DeviceError, PackingError, BackendError; ConfigError for options that do not go
    together or unknown features.
    """
    feature_eps = feature_epsilon(features, feature_eps, compat, causal)
    if eps < 0:
        raise ConfigError(f"eps is {eps}, wanted 0 or more")
    sizes = _check(q, k, v, projection, features, causal, padding_mask, initial_state, cu_seqlens)
    inner = accumulation_dtype(v.dtype)
    padded_queries = None
    if padding_mask is not None:
        padded = ~padding_mask[:, :, None, None]
        k, v = k.masked_fill(padded, 0.0), v.masked_fill(padded, 0.0)
        if sizes["T"] == sizes["K"]:
            padded_queries = padded
            q = q.masked_fill(padded, 0.0)
    if initial_state is not None:
        initial_state = initial_state.to(inner)
        if initial_state.requires_grad:
            initial_state = torch.cat([initial_state[..., :-1], initial_state[..., -1:].detach()], -1)
    if min(sizes["B"], sizes["T"], sizes["K"]) == 0:
        state = empty_state(v, sizes["H"], sizes["M"], cu_seqlens) if initial_state is None else initial_state.clone()
        return q[..., :1] * v.new_zeros(sizes["P"]), state
    facts = {"compat": compat, "trained_projection": projection.requires_grad, "N": sizes["N"], "P": sizes["P"]}
    fn = select("favor_attention", backend, (v, q, k, projection, initial_state), facts)
    with without_autocast(v):
        y, final_state = fn(
            q, k, v, projection, features, causal, eps, feature_eps, compat, padding_mask, initial_state, cu_seqlens
        )
        if padded_queries is not None:
            y = y.masked_fill(padded_queries, 0.0)
    return y, final_state


def feature_epsilon(features: str, feature_eps: float | None, compat: str | None, causal: bool) -> float:
    """What is added to every feature, after all checks of the options. Raises ConfigError."""
    expect_features(features)
    if compat not in (None, "jax"):
        raise ConfigError(f"compat is {compat!r}, wanted None or 'jax'")
    if compat == "jax" and causal:
        raise ConfigError(
            "compat='jax' came with causal=True: its keys share a maximum over the whole sequence, and with an epsilon "
            "beside it future keys change past outputs; pass causal=False, or leave compat out"
        )
    if compat == "jax" and features == "relu":
        raise ConfigError("compat='jax' came with ReLU features, which have no stabiliser; leave compat out")
    if features != "relu" and compat is None:
        if feature_eps:
            raise ConfigError(
                f"feature_eps={feature_eps} came with features={features!r}, whose scale is a running maximum; "
                "use eps, or compat='jax' if not causal"
            )
        return 0.0
    if feature_eps is not None and feature_eps < 0:
        raise ConfigError(f"feature_eps is {feature_eps}, wanted 0 or more")
    if feature_eps is None:
        return RELU_EPS if features == "relu" else JAX_EPS
    return feature_eps


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    features: str,
    causal: bool,
    padding_mask: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> dict[str, int]:
    """Check everything that does not depend on the implementation; returns sizes by letter (K keys, S sequences)."""
    expect_floating("q", q)
    sizes = expect_shape("q", q, "B T H N")
    if causal or cu_seqlens is not None:
        expect_shape("k", k, "B T G N", sizes)
    sizes = expect_shape("k", k, "B K G N", sizes)
    sizes = expect_shape("v", v, "B K G P", sizes)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise DtypeError(f"q is {q.dtype}, k is {k.dtype} and v is {v.dtype}; cast them to one dtype")
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ShapeError(f"q has H={sizes['H']} heads, wanted a multiple of the G={sizes['G']} heads of k and v")
    expect_floating("projection", projection)
    expect_shape("projection", projection, "M N", {"N": sizes["N"]})
    sizes["M"] = feature_count(projection.shape[0], features)
    if min(sizes[letter] for letter in "HNPM") == 0:
        raise ShapeError(f"q is {list(q.shape)}, v is {list(v.shape)}; H, N, P and M must be at least 1")
    sizes["S"] = sizes["B"]
    if cu_seqlens is not None:
        if padding_mask is not None:
            raise PackingError("cu_seqlens and padding_mask came together; pass one: packing already has no padding")
        sizes["S"] = expect_cu_seqlens(cu_seqlens, sizes["T"], sizes["B"])
    if padding_mask is not None:
        expect_padding_mask(padding_mask, sizes["B"], sizes["K"])
    if initial_state is not None:
        if not causal:
            raise ConfigError("initial_state came with causal=False, where tokens have no order; leave one out")
        expect_floating("initial_state", initial_state)
        expect_shape("initial_state", initial_state, f"S H M {sizes['P'] + 2}", sizes)
    expect_same_device(
        q, k=k, v=v, projection=projection, padding_mask=padding_mask, initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return sizes


register_backend(
    "favor_attention",
    Serves("triton", ("cuda",), KERNEL_DTYPES, needs=("triton",)),
    favor_attention_triton,
    refuses=refuses,
    priority=KERNEL,
)
register_backend("favor_attention", Serves("chunked"), favor_attention_chunked, priority=PLAIN)
register_backend("favor_attention", Serves("reference"), favor_attention_reference, priority=REFERENCE)
