"""Synthetic attention: the plain path against the definition, its parts alone, and words for bad inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops import random_attention, softmax_attention, synthetic_attention
from zoo.ops.dispatch import record_dispatch
from zoo.ops.synthetic_attention import flops

from sequence_mixer.conformance.budget import PLAIN_CEILING, relative_rms
from sequence_mixer.errors import BackendError, DtypeError, PackingError, ShapeError

PARTS: dict[str, tuple[str, ...]] = {
    "inner": ("q", "k"),
    "table": ("table",),
    "outer": ("left", "right"),
    "all": ("q", "k", "table", "left", "right"),
}
ENDS, KEY_ENDS = torch.tensor([0, 1, 1, 4, 4]), torch.tensor([0, 5, 7, 12, 12])
CASES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {  # (B, Tq, Tk) and options
    "one": ((2, 1, 1), {}),
    "causal": ((2, 13, 13), {}),
    "blocks": ((1, 150, 150), {}),
    "full": ((2, 7, 7), {"causal": False}),
    "more-keys": ((2, 7, 9), {}),
    "more-queries": ((2, 9, 7), {}),
    "ragged": ((3, 2, 9), {"past": torch.tensor([0, 4, 7])}),
    "packed": ((1, 12, 12), {"cu_seqlens": torch.tensor([0, 3, 3, 12], dtype=torch.int32)}),
    "packed-full": ((1, 12, 12), {"cu_seqlens": torch.tensor([0, 3, 3, 12]), "causal": False}),
    "packed-cross": ((1, 4, 12), {"cu_seqlens": ENDS, "cu_seqlens_k": KEY_ENDS}),
}


def draw(sizes: Sequence[int], parts: str = "all", *, heads: int = 2, width: int = 4) -> dict[str, Tensor]:
    batch, queries, keys = sizes
    made = {
        "v": torch.randn(batch, keys, heads, width),
        "q": torch.randn(batch, queries, heads, 5),
        "k": torch.randn(batch, keys, heads, 5),
        "left": torch.randn(batch, queries, heads, 11),
        "right": torch.randn(batch, queries, heads, 14),
        "table": torch.randn(heads, max(queries, keys) + 1, keys + 2),
    }
    return {name: made[name].double() for name in ("v", *PARTS[parts])}


def run(backend: str, tensors: dict[str, Tensor], cotangent: Tensor, **options: Any) -> list[Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y = synthetic_attention(**leaves, queries=cotangent.shape[1], backend=backend, **options)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), cotangent.to(y.dtype))]


def cotangent_for(sizes: Sequence[int]) -> Tensor:
    return torch.randn(sizes[0], sizes[1], 2, 4, dtype=torch.float64)


def agree(ours: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for value, expected in zip(ours, wanted, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", CASES)
def test_the_plain_path_is_the_definition(name: str, parts: str):
    sizes, options = CASES[name]
    tensors, cotangent = draw(sizes, parts), cotangent_for(sizes)
    agree(run("chunked", tensors, cotangent, **options), run("reference", tensors, cotangent, **options))


@pytest.mark.parametrize("name", ["causal", "more-queries", "ragged", "packed-cross"])
def test_the_plain_path_compiles_whole(name: str):
    torch._dynamo.reset()
    sizes, options = CASES[name]
    tensors, cotangent = draw(sizes), cotangent_for(sizes)
    compiled = torch.compile(
        lambda **given: synthetic_attention(**given, **options, backend="chunked"), backend="aot_eager", fullgraph=True
    )
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
    y = compiled(**leaves)
    agree(
        [y.detach(), *torch.autograd.grad(y, list(leaves.values()), cotangent)],
        run("reference", tensors, cotangent, **options),
    )


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "ragged"])
def test_inner_products_alone_are_softmax_attention(name: str, backend: str):
    sizes, options = CASES[name]
    tensors, cotangent = draw(sizes, "inner"), cotangent_for(sizes)
    v, q, k = (tensor.clone().requires_grad_() for tensor in tensors.values())
    y = softmax_attention(q, k, v, scale=1.0, backend="reference", **options)
    agree(run(backend, tensors, cotangent, **options), [y.detach(), *torch.autograd.grad(y, [v, q, k], cotangent)])


@pytest.mark.parametrize("name", ["causal", "blocks", "full", "more-keys"])
def test_a_table_alone_is_random_attention(name: str):
    (batch, queries, keys), options = CASES[name]
    tensors, cotangent = draw((batch, queries, keys), "table"), cotangent_for((batch, queries, keys))
    v, table = (tensor.clone().requires_grad_() for tensor in tensors.values())
    y = random_attention(table[:, keys - queries : keys, :keys], v, backend="reference", **options)
    wanted = [y.detach(), *torch.autograd.grad(y, [v, table], cotangent)]
    agree(run("chunked", tensors, cotangent, **options), wanted)


def test_an_outer_product_is_a_rank_one_grid_of_logits():
    tensors = draw((1, 6, 6), "outer")
    grid = tensors["left"].unsqueeze(-1) * tensors["right"].unsqueeze(-2)  # [B,T,H,a,b]
    logits = grid.flatten(-2)[..., :6].transpose(1, 2).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    wanted = torch.einsum("bhij,bjhp->bihp", logits.softmax(-1), tensors["v"])
    torch.testing.assert_close(synthetic_attention(**tensors), wanted)


def test_rows_of_their_own_length_are_those_of_a_longer_sequence():
    tensors = draw((3, 9, 9))
    whole = synthetic_attention(**tensors)
    past = torch.tensor([0, 4, 7])
    rows = {
        name: torch.stack([tensors[name][b, p : p + 2] for b, p in enumerate(past.tolist())])
        for name in ("q", "left", "right")
    }
    wanted = torch.stack([whole[b, p : p + 2] for b, p in enumerate(past.tolist())])
    torch.testing.assert_close(synthetic_attention(**(tensors | rows), past=past), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_float32_table_goes_with_half_operands(dtype: torch.dtype):
    sizes = (2, 40, 40)
    tensors = {name: t.float() if name == "table" else t.to(dtype) for name, t in draw(sizes).items()}
    cotangent = cotangent_for(sizes).to(dtype)
    ours = run("chunked", tensors, cotangent)
    assert [value.dtype for value in ours[1:]] == [tensor.dtype for tensor in tensors.values()]
    wanted = run("reference", {name: tensor.double() for name, tensor in tensors.items()}, cotangent.double())
    for value, expected in zip(ours, wanted, strict=True):
        assert relative_rms(value, expected) < PLAIN_CEILING[dtype]


def test_the_definition_has_second_derivatives():
    tensors = {name: tensor.requires_grad_() for name, tensor in draw((1, 3, 3), heads=1, width=2).items()}
    tensors = {name: tensor[..., :4].detach().requires_grad_() for name, tensor in tensors.items()}
    call = lambda *given: synthetic_attention(**dict(zip(tensors, given, strict=True)), backend="reference")
    assert torch.autograd.gradcheck(call, tuple(tensors.values()))
    assert torch.autograd.gradgradcheck(call, tuple(tensors.values()))


def test_the_blocked_path_keeps_no_matrix_for_the_backward():
    tensors = {name: t.float().requires_grad_() for name, t in draw((1, 1024, 1024), "inner").items()}
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        synthetic_attention(**tensors, backend="chunked")
    assert max(sizes, default=0) <= 1024 * 128


def test_flops_are_those_that_torch_counts():
    tensors = draw((2, 16, 16))
    with FlopCounterMode(display=False) as counter:
        synthetic_attention(**tensors)
    assert counter.get_total_flops() == flops(2, 16, 16, 2, 5, 4) == 2 * 2 * 2 * 16 * 16 * 9


def test_bad_inputs_raise_in_words():
    good = draw((1, 5, 5))
    v, q, k, table, left, right = (good[name] for name in ("v", "q", "k", "table", "left", "right"))
    ends = torch.tensor([0, 2, 5])
    with pytest.raises(ShapeError, match="no logits"):
        synthetic_attention(v)
    with pytest.raises(ShapeError, match="q and k go together"):
        synthetic_attention(v, q=q)
    with pytest.raises(ShapeError, match="left and right go together"):
        synthetic_attention(v, right=right)
    with pytest.raises(ShapeError, match=r"k has shape .* wanted \[B=1, Tk=5, H=2, N=5\]"):
        synthetic_attention(v, q=q, k=k[:, :4])
    with pytest.raises(ShapeError, match=r"left has shape .* wanted \[B=1, Tq=5"):
        synthetic_attention(v, q=q, k=k, left=left[:, :4], right=right)
    with pytest.raises(ShapeError, match="wanted at least Tk=5"):
        synthetic_attention(v, table=table[:, :, :4])
    with pytest.raises(ShapeError, match="wanted a b of at least Tk=5"):
        synthetic_attention(v, left=left[..., :2], right=right[..., :2])
    with pytest.raises(DtypeError, match=r"left is torch\.float32, v is torch\.float64"):
        synthetic_attention(v, left=left.float(), right=right)
    with pytest.raises(PackingError, match="past came together"):
        synthetic_attention(v, q=q, k=k, cu_seqlens=ends, past=torch.tensor([0]))
    with pytest.raises(PackingError, match="without cu_seqlens"):
        synthetic_attention(v, q=q, k=k, cu_seqlens_k=ends)
    with pytest.raises(PackingError, match="pass cu_seqlens_k"):
        synthetic_attention(v, q=q[:, :4], k=k, cu_seqlens=torch.tensor([0, 2, 4]))
    with pytest.raises(PackingError, match="same number"):
        synthetic_attention(v, q=q, k=k, cu_seqlens=ends, cu_seqlens_k=torch.tensor([0, 5]))
    with pytest.raises(BackendError, match="triton: "):
        synthetic_attention(v, q=q, k=k, backend="triton")
    with record_dispatch() as record:
        synthetic_attention(v, table=table)
    assert record[0].backend == "chunked"
    assert "triton" in record[0].reasons
