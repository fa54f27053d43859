"""Random attention: y_bi = sum_j softmax_j(R_ij) v_bj, one learned matrix of logits per head for a whole batch.

The weights do not depend on the input, so they are computed once and applied in one batched product, and the gradient
of R gathers over the batch inside that product. Source: Tay et al. 2021 (Synthesizer), section 3.3.
"""

from __future__ import annotations

from torch import Tensor

from sequence_mixer.errors import ShapeError
from sequence_mixer.shapes import expect_floating, expect_same_device, expect_shape
from zoo.ops.dispatch import KERNEL, PLAIN, REFERENCE, Serves, register_backend, select
from zoo.ops.random_attention import chunked, reference
from zoo.ops.random_attention.cost import flops
from zoo.ops.random_attention.triton_path import random_attention_triton

__all__ = ["flops", "random_attention"]


def random_attention(table: Tensor, v: Tensor, *, causal: bool = True, backend: str = "auto") -> Tensor:
    """Mix values by the softmax of a matrix that the whole batch shares.

    table: logits [H,Tq,Tk], any floating dtype (float32 keeps the resolution of trained logits beside half values).
    v: [B,Tk,H,P].
    causal: query i sees key j if j <= i + Tk - Tq (aligned at the end, so that one query sees every key).
    backend: "auto", "triton", "chunked" or "reference".
    Returns y [B,Tq,H,P] in the dtype of v; a query that sees no key gives 0. Weights are computed in the accumulation
    dtype and rounded once to the dtype of v, in which they are multiplied.
    Raises ShapeError, DtypeError, DeviceError, BackendError.
    """
    sizes = expect_shape("table", table, "H Tq Tk")
    sizes = expect_shape("v", v, "B Tk H P", sizes)
    expect_floating("table", table)
    expect_floating("v", v)
    expect_same_device(v, table=table)
    if sizes["Tk"] == 0:
        raise ShapeError(f"v has shape {list(v.shape)}: there is no key to attend to")
    facts = {"empty": v.numel() == 0 or table.numel() == 0, "wide_table": str(table.dtype) == "torch.float64"}
    y: Tensor = select("random_attention", backend, (v, table), facts)(table, v, causal=causal)
    return y


def _triton_refuses(empty: bool, wide_table: bool) -> str | None:
    if empty:
        return "an input is empty"
    return "takes a table of at most float32, this is float64" if wide_table else None


register_backend("random_attention", Serves("reference"), reference.random_attention_reference, priority=REFERENCE)
register_backend("random_attention", Serves("chunked"), chunked.random_attention_chunked, priority=PLAIN)
register_backend(
    "random_attention",
    Serves("triton", devices=("cuda",), dtypes=("float32", "bfloat16", "float16"), needs=("triton",)),
    random_attention_triton,
    refuses=_triton_refuses,
    priority=KERNEL,
)
