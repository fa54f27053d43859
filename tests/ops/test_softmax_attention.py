"""Softmax attention: the recorded cases, the plain paths against the definition, and words for bad inputs."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.dispatch import record_dispatch
from zoo.ops.softmax_attention import flops, softmax_attention
from zoo.ops.softmax_attention.chunked import softmax_attention_chunked

from golden import load_case
from sequence_mixer.conformance.budget import judge, relative_rms
from sequence_mixer.errors import BackendError, DtypeError, PackingError, ShapeError

PATHS = ("reference", "sdpa", "chunked")
FAST = ("sdpa", "chunked")


def draw(queries: int, keys: int, *, batch: int = 2, heads: int = 4, groups: int = 2, width: int = 8, values: int = 8):
    return (
        torch.randn(batch, queries, heads, width, dtype=torch.float64),
        torch.randn(batch, keys, groups, width, dtype=torch.float64),
        torch.randn(batch, keys, groups, values, dtype=torch.float64),
    )


def run(backend: str, tensors: tuple[Tensor, ...], cotangent: Tensor, **options) -> list[Tensor]:
    """y and the gradients of q, k, v and a floating bias."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    bias = options.pop("bias", None)
    if bias is not None and bias.is_floating_point():
        bias = bias.detach().clone().requires_grad_()
        leaves.append(bias)
    y = softmax_attention(*leaves[:3], bias=bias, backend=backend, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))]


def padding(batch: int, keys: int) -> Tensor:
    """Left padded, right padded, empty."""
    mask = torch.ones(batch, keys, dtype=torch.bool)
    mask[0, : keys // 3] = False
    mask[1, keys - keys // 4 :] = False
    if batch > 2:
        mask[2] = False
    return mask


def cases() -> dict[str, tuple[tuple[Tensor, ...], dict]]:
    made: dict[str, tuple[tuple[Tensor, ...], dict]] = {}
    for tokens in (1, 127, 128, 129, 131):
        made[f"causal-{tokens}"] = (draw(tokens, tokens), {})
    made["full"] = (draw(21, 37, values=5), {"causal": False, "scale": 0.3})
    made["one-query"] = (draw(1, 37), {})
    made["more-keys"] = (draw(9, 30), {})
    made["more-queries"] = (draw(30, 9), {})
    made["many-heads"] = (draw(17, 17, heads=6, groups=1), {})
    made["padded"] = (draw(29, 29, batch=3), {"padding_mask": padding(3, 29)})
    made["padded-full"] = (draw(29, 29, batch=3), {"padding_mask": padding(3, 29), "causal": False})
    made["padded-keys"] = (draw(7, 29, batch=3), {"padding_mask": padding(3, 29)})
    made["bias"] = (draw(13, 17), {"bias": torch.randn(4, 13, 17, dtype=torch.float64)})
    made["bias-row"] = (draw(150, 150), {"bias": torch.randn(1, 4, 1, 150, dtype=torch.float64), "causal": False})
    hidden = torch.randn(2, 1, 13, 17, dtype=torch.float64).masked_fill(torch.rand(2, 1, 13, 17) < 0.5, -torch.inf)
    hidden[0, 0, 3] = -torch.inf
    made["bias-hides"] = (draw(13, 17), {"bias": hidden, "causal": False})
    made["bias-selects"] = (draw(13, 17), {"bias": hidden != -torch.inf, "causal": False})
    ends = torch.tensor([0, 0, 5, 6, 6, 40, 41])
    key_ends = torch.tensor([0, 3, 12, 12, 13, 43, 50])
    made["packed"] = (draw(41, 41, batch=1), {"cu_seqlens": ends})
    made["packed-full"] = (draw(41, 41, batch=1), {"cu_seqlens": ends.int(), "causal": False})
    made["packed-cross"] = (draw(41, 50, batch=1), {"cu_seqlens": ends, "cu_seqlens_k": key_ends})
    made["packed-bias"] = (draw(41, 41, batch=1), {"cu_seqlens": ends, "bias": torch.randn(41, 41).double()})
    made["nothing"] = (draw(0, 0), {})
    made["no-keys"] = (draw(3, 0), {})
    return made


CASES = cases()


@pytest.mark.parametrize("name", ["sdpa_causal", "sdpa_full_scale_ev", "sdpa_gqa_causal", "sdpa_bottom_right_mask"])
@pytest.mark.parametrize("backend", PATHS)
def test_recorded_outputs_and_gradients_come_back(name: str, backend: str):
    case = load_case(name)
    get = lambda key: case.tensors[key].transpose(1, 2)
    causal = case.config["is_causal"] or case.config.get("mask") == "bottom_right"
    ours = run(
        backend,
        tuple(get(f"in.{key}") for key in ("query", "key", "value")),
        get("w"),
        causal=causal,
        scale=case.config.get("scale"),
    )
    for value, key in zip(ours, ("y", "grad.query", "grad.key", "grad.value"), strict=True):
        assert relative_rms(value, get(key)) < 1e-10, key


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", CASES)
def test_plain_paths_equal_the_definition(name: str, backend: str):
    tensors, options = CASES[name]
    if backend == "sdpa" and not all(t.numel() for t in tensors):
        pytest.skip("empty inputs are served by the other paths")
    cotangent = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3], dtype=torch.float64)
    exact = run("reference", tensors, cotangent, **options)
    ours = run(backend, tensors, cotangent, **options)
    for value, wanted in zip(ours, exact, strict=True):
        verdict = judge(value, wanted, None, torch.float64)
        assert verdict.ok, verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal-129", "full", "more-keys", "padded", "bias", "packed"])
def test_half_and_single_precision_stay_within_budget(name: str, dtype: torch.dtype):
    tensors, options = CASES[name]
    options = {key: x.to(dtype) if x.is_floating_point() else x for key, x in options.items() if torch.is_tensor(x)} | {
        key: x for key, x in options.items() if not torch.is_tensor(x)
    }
    rounded = tuple(t.to(dtype) for t in tensors)
    cotangent = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3]).to(dtype)
    wide = {key: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in options.items()}
    exact = run("reference", tuple(t.double() for t in rounded), cotangent.double(), **wide)
    plain = run("chunked", rounded, cotangent, **options)
    sdpa = run("sdpa", rounded, cotangent, **options)
    for value, wanted, yardstick in zip(sdpa, exact, plain, strict=True):
        verdict = judge(value, wanted, yardstick, dtype)
        assert value.dtype == dtype
        assert verdict.ok, verdict
    for value, wanted in zip(plain, exact, strict=True):
        assert relative_rms(value, wanted) < (2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("keys", [7, 12])
def test_nan_in_padded_slots_changes_nothing(backend: str, keys: int):
    q, k, v = draw(7, keys, batch=3)
    mask = padding(3, keys)
    cotangent = torch.randn(3, 7, 4, 8, dtype=torch.float64)
    clean = run(backend, (q, k, v), cotangent, padding_mask=mask)
    if keys == 7:
        q = q.masked_fill(~mask[..., None, None], torch.nan)
        assert bool((clean[0][~mask] == 0).all())
    k, v = k.masked_fill(~mask[..., None, None], torch.nan), v.masked_fill(~mask[..., None, None], torch.nan)
    for value, wanted in zip(run(backend, (q, k, v), cotangent, padding_mask=mask), clean, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("backend", PATHS)
def test_queries_without_keys_give_zero_and_zero_gradients(backend: str):
    tensors = draw(9, 4)
    y, dq, dk, dv = run(backend, tensors, torch.randn(2, 9, 4, 8))
    assert bool((y[:, :5] == 0).all())
    assert bool((dq[:, :5] == 0).all())
    assert all(bool(x.isfinite().all()) for x in (y, dq, dk, dv))


@pytest.mark.parametrize("backend", PATHS)
def test_each_packed_sequence_is_as_if_alone(backend: str):
    q, k, v = draw(20, 31, batch=1)
    ends, key_ends = [0, 7, 7, 20], [0, 4, 9, 31]
    packed = softmax_attention(
        q, k, v, cu_seqlens=torch.tensor(ends), cu_seqlens_k=torch.tensor(key_ends), backend=backend
    )
    for s in range(3):
        rows, cols = slice(ends[s], ends[s + 1]), slice(key_ends[s], key_ends[s + 1])
        alone = softmax_attention(q[:, rows], k[:, cols], v[:, cols], backend="reference")
        torch.testing.assert_close(packed[:, rows], alone)


@pytest.mark.parametrize("backend", PATHS)
def test_inputs_and_cotangents_need_not_be_contiguous(backend: str):
    tensors = draw(11, 11)
    strided = tuple(t.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for t in tensors)
    cotangent = torch.randn(2, 1, 4, 1, dtype=torch.float64).expand(2, 11, 4, 8)
    exact = run("reference", tensors, cotangent.contiguous())
    for value, wanted in zip(run(backend, strided, cotangent), exact, strict=True):
        torch.testing.assert_close(value, wanted)


def test_the_definition_has_second_derivatives():
    tensors = tuple(t.requires_grad_() for t in draw(4, 3, batch=1, heads=2, groups=1, width=2, values=2))
    call = lambda q, k, v: softmax_attention(q, k, v, backend="reference")
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("backend", ["auto", *FAST])
@pytest.mark.parametrize("name", ["causal-129", "more-keys", "padded", "bias", "packed", "packed-cross"])
def test_plain_paths_compile_whole(name: str, backend: str):
    tensors, options = CASES[name]
    torch._dynamo.reset()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(q, k, v, backend=backend, **options)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    grads = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    wanted = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    for value, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(value, expected)


def test_the_blocked_path_keeps_no_matrix_for_the_backward():
    q, k, v = (t.float().requires_grad_() for t in draw(1024, 1024, batch=1))
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        softmax_attention(q, k, v, backend="chunked")
    assert max(sizes, default=0) <= 1024 * 128


def test_auto_takes_the_library_kernel_on_a_cpu():
    tensors = draw(5, 5)
    with record_dispatch() as record:
        softmax_attention(*tensors)
        softmax_attention(*(t.bfloat16() for t in tensors), bias=torch.zeros(5, 5))
    assert [choice.backend for choice in record] == ["sdpa", "chunked"]
    assert "round the bias" in record[1].reasons["sdpa"]


def test_a_block_size_changes_nothing():
    q, k, v = draw(23, 31)
    options = {
        "scale": 0.4,
        "bias": None,
        "padding_mask": None,
        "cu_seqlens": None,
        "cu_seqlens_k": None,
        "causal": True,
    }
    torch.testing.assert_close(
        softmax_attention_chunked(q, k, v, block=5, **options), softmax_attention_chunked(q, k, v, **options)
    )


def test_flops_are_those_that_torch_counts():
    q, k, v = (t.float() for t in draw(16, 16, heads=4, groups=4))
    with FlopCounterMode(display=False) as counter:
        softmax_attention(q, k, v, backend="reference", causal=False)
    assert counter.get_total_flops() == flops(2, 16, 16, 4, 8) == 4 * 2 * 4 * 16 * 16 * 8
    assert flops(1, 3, 5, 2, 8, 4) == 2 * 3 * 5 * 2 * 12


def test_bad_inputs_raise_in_words():
    q, k, v = draw(5, 5, batch=1)
    mask, ends = torch.ones(1, 5, dtype=torch.bool), torch.tensor([0, 2, 5])
    with pytest.raises(ShapeError, match=r"k has shape .* wanted \[B=1"):
        softmax_attention(q, k[..., :4], v)
    with pytest.raises(ShapeError, match="multiple of G"):
        softmax_attention(q[:, :, :3], k, v)
    with pytest.raises(DtypeError, match="k is torch"):
        softmax_attention(q, k.float(), v)
    with pytest.raises(DtypeError, match="wanted one of"):
        softmax_attention(q.long(), k.long(), v.long())
    with pytest.raises(ShapeError, match="bias has shape"):
        softmax_attention(q, k, v, bias=torch.zeros(3, 5, 5))
    with pytest.raises(PackingError, match="came together"):
        softmax_attention(q, k, v, padding_mask=mask, cu_seqlens=ends)
    with pytest.raises(PackingError, match="without cu_seqlens"):
        softmax_attention(q, k, v, cu_seqlens_k=ends)
    with pytest.raises(PackingError, match="pass cu_seqlens_k"):
        softmax_attention(q[:, :4], k, v, cu_seqlens=torch.tensor([0, 2, 4]))
    with pytest.raises(PackingError, match="same number"):
        softmax_attention(q, k, v, cu_seqlens=ends, cu_seqlens_k=torch.tensor([0, 5]))
    with pytest.raises(PackingError, match="without decreasing"):
        softmax_attention(q, k, v, cu_seqlens=torch.tensor([0, 4, 3]))
    with pytest.raises(BackendError, match="triton: "):
        softmax_attention(q, k, v, backend="triton")
    with pytest.raises(BackendError, match="did you mean chunked"):
        softmax_attention(q, k, v, backend="chunk")
