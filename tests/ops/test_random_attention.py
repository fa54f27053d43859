"""Random attention: the plain path against the definition, what it spares, what it is, and words for bad inputs."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops import random_attention, softmax_attention
from zoo.ops.dispatch import record_dispatch
from zoo.ops.random_attention import flops
from zoo.ops.random_attention.cost import row_blocks

from sequence_mixer.conformance.budget import PLAIN_CEILING, relative_rms
from sequence_mixer.errors import BackendError, DeviceError, DtypeError, ShapeError

SHAPES = [(1, 1), (5, 5), (1100, 1100), (5, 9), (9, 5), (1, 6), (6, 1)]


def draw(queries: int, keys: int, *, batch: int = 2, heads: int = 3, width: int = 4) -> tuple[Tensor, Tensor]:
    table = torch.randn(heads, queries, keys, dtype=torch.float64)
    return table, torch.randn(batch, keys, heads, width, dtype=torch.float64)


def run(backend: str, tensors: tuple[Tensor, Tensor], cotangent: Tensor, causal: bool = True) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = random_attention(*leaves, causal=causal, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))]


def cotangent_for(tensors: tuple[Tensor, Tensor]) -> Tensor:
    table, v = tensors
    return torch.randn(v.shape[0], table.shape[1], *v.shape[2:], dtype=torch.float64)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_the_plain_path_is_the_definition(sizes: tuple[int, int], causal: bool):
    tensors = draw(*sizes)
    cotangent = cotangent_for(tensors)
    for value, wanted in zip(
        run("chunked", tensors, cotangent, causal), run("reference", tensors, cotangent, causal), strict=True
    ):
        torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_it_is_softmax_attention_with_a_bias_and_no_queries(sizes: tuple[int, int]):
    tensors = draw(*sizes)
    cotangent = cotangent_for(tensors)
    table, v = (t.detach().clone().requires_grad_() for t in tensors)
    nothing = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    q, k = nothing.expand(2, sizes[0], 3, 1), nothing.expand(2, sizes[1], 3, 1)
    y = softmax_attention(q, k, v, bias=table, backend="reference")
    wanted = [y.detach(), *torch.autograd.grad(y, [table, v], cotangent)]
    for value, expected in zip(run("chunked", tensors, cotangent), wanted, strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_float32_table_goes_with_half_values(dtype: torch.dtype):
    table, v = draw(80, 80)
    rounded = (table.float().double(), v.to(dtype).double())
    cotangent = cotangent_for(rounded).to(dtype).double()
    ours = run("chunked", (table.float(), v.to(dtype)), cotangent)
    assert [value.dtype for value in ours] == [dtype, torch.float32, dtype]
    for value, wanted in zip(ours, run("reference", rounded, cotangent), strict=True):
        assert relative_rms(value, wanted) < PLAIN_CEILING[dtype]


def test_autocast_leaves_the_weights_alone():
    table, v = (t.float() for t in draw(40, 40))
    exact = random_attention(table.double(), v.double(), backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_rms(random_attention(table, v), exact) < PLAIN_CEILING[torch.float32]


def test_blocks_of_rows_cover_every_pair_that_is_seen():
    for queries, keys in [(0, 3), (1, 1), (1024, 1024), (1025, 1025), (2000, 2000), (2000, 2500), (2500, 2000)]:
        blocks = list(row_blocks(queries, keys, True))
        assert [first for first, _, _ in blocks] == [0, *[end for _, end, _ in blocks]][:-1]
        assert blocks[-1][1] == queries
        assert all(seen == min(keys, max(0, end + keys - queries)) for _, end, seen in blocks)
        assert list(row_blocks(queries, keys, False)) == [(0, queries, keys)]


@pytest.mark.parametrize("tokens", [64, 1500])
def test_flops_are_those_that_torch_counts(tokens: int):
    table, v = draw(tokens, tokens)
    for causal in (True, False):
        with FlopCounterMode(display=False) as counter:
            random_attention(table, v, causal=causal)
        assert counter.get_total_flops() == flops(2, tokens, tokens, 3, 4, causal)
    assert flops(2, 64, 64, 3, 4) == 2 * 2 * 3 * 64 * 64 * 4
    assert flops(1, 4096, 4096, 1, 1) < 0.57 * flops(1, 4096, 4096, 1, 1, causal=False)


def test_rows_do_not_see_the_future_and_weights_sum_to_one():
    table, v = draw(30, 30)
    y = random_attention(table, v)
    changed = v.clone()
    changed[:, 20:] *= -100
    assert torch.equal(random_attention(table, changed)[:, :20], y[:, :20])
    torch.testing.assert_close(random_attention(table, torch.ones_like(v)), torch.ones_like(v))


def test_the_definition_has_second_derivatives():
    tensors = tuple(t.requires_grad_() for t in draw(4, 5, batch=1, heads=2, width=2))
    call = lambda table, v: random_attention(table, v, backend="reference")
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


def test_inputs_and_cotangents_need_not_be_contiguous():
    table, v = draw(11, 11)
    strided = (table.permute(1, 2, 0).contiguous().permute(2, 0, 1), v.mT.contiguous().mT)
    cotangent = torch.randn(2, 1, 3, 1, dtype=torch.float64).expand(2, 11, 3, 4)
    for value, wanted in zip(
        run("chunked", strided, cotangent), run("reference", (table, v), cotangent.contiguous()), strict=True
    ):
        torch.testing.assert_close(value, wanted)


def test_the_plain_path_compiles_whole():
    torch._dynamo.reset()
    tensors = tuple(t.requires_grad_() for t in draw(1030, 1030, batch=1, heads=1, width=2))
    compiled = torch.compile(random_attention, backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
    wanted = torch.autograd.grad(random_attention(*tensors).square().sum(), tensors)
    for value, expected in zip(ours, wanted, strict=True):
        torch.testing.assert_close(value, expected)


def test_bad_inputs_raise_in_words():
    table, v = draw(5, 5)
    with pytest.raises(ShapeError, match=r"v has shape .* wanted \[B, Tk=5, H=3, P\]"):
        random_attention(table, v[:, :4])
    with pytest.raises(ShapeError, match=r"table has shape .* wanted \[H, Tq, Tk\]"):
        random_attention(table[0], v)
    with pytest.raises(ShapeError, match="no key"):
        random_attention(table[..., :0], v[:, :0])
    with pytest.raises(DtypeError, match=r"table is torch\.int64"):
        random_attention(table.long(), v)
    with pytest.raises(DeviceError, match="table is on meta"):
        random_attention(table.to("meta"), v)
    with pytest.raises(BackendError, match="triton: "):
        random_attention(table, v, backend="triton")
    with record_dispatch() as record:
        random_attention(table, v)
    assert record[0].backend == "chunked"
    assert "triton" in record[0].reasons


def test_it_is_one_linear_layer_over_the_tokens_with_softmaxed_weights():
    """A token-mixing MLP (MLP-Mixer) of a single layer without a bias, the same for all channels of a head."""
    table, v = draw(12, 12, heads=1, width=7)
    layer = torch.nn.Linear(12, 12, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(table[0].softmax(-1))
    mixed = layer(v.squeeze(2).mT).mT  # [B,D,T] -> [B,D,T]
    torch.testing.assert_close(random_attention(table, v, causal=False).squeeze(2), mixed)
