"""Triton kernels of the semiseparable scan and of SSD on top of it, against the float64 definition."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.semiseparable import flops, semiseparable
from zoo.ops.semiseparable.cost import backward_flops
from zoo.ops.semiseparable.triton_path import semiseparable_backward, semiseparable_forward
from zoo.ops.ssd import ssd

from sequence_mixer.conformance.budget import judge
from sequence_mixer.errors import BackendError

NAMES = ("q", "k", "v", "log_decay", "scale", "initial_state")
PACKED = [0, 0, 5, 69, 69, 70, 97, 97]
HALF = [torch.bfloat16, torch.float16]


def inputs_of(
    device: str,
    tokens: int,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    heads: int = 4,
    groups: int = 2,
    width: int = 16,
    channels: int = 16,
    sequences: int | None = None,
    absent: tuple[str, ...] = (),
    rate: float = 0.2,
) -> dict[str, Tensor]:
    """Arguments of `semiseparable` that are present, by name, on `device`."""
    made = {
        "q": torch.randn(batch, tokens, groups, width).to(dtype),
        "k": torch.randn(batch, tokens, groups, width).to(dtype),
        "v": torch.randn(batch, tokens, heads, channels).to(dtype),
        "log_decay": -rate * torch.rand(batch, tokens, heads),
        "scale": torch.rand(batch, tokens, heads),
        "initial_state": torch.randn(sequences or batch, heads, channels, width),
    }
    return {name: value.to(device) for name, value in made.items() if name not in absent}


def run(given: dict[str, Tensor], backend: str, cu_seqlens: Tensor | None = None, **wider: object) -> dict[str, Tensor]:
    """y, final state and the gradients of a fixed loss; `dtype=` casts everything first."""
    leaves = {name: value.detach().to(**wider).requires_grad_() for name, value in given.items()}
    named = {name: leaves[name] for name in ("scale", "initial_state") if name in leaves}
    y, final_state = semiseparable(
        leaves["q"], leaves["k"], leaves["v"], leaves.get("log_decay"), **named, cu_seqlens=cu_seqlens, backend=backend
    )
    return {"y": y, "final_state": final_state} | gradients(y, final_state, leaves)


def gradients(y: Tensor, final_state: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    seeded = torch.Generator().manual_seed(7)
    w, ws = (torch.randn(part.shape, generator=seeded) for part in (y, final_state))
    w = w.bfloat16().to(y.device)  # exact in every dtype, so that all paths have the same loss
    loss = (y.double() * w).sum() + (final_state * ws.to(final_state)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {f"grad.{name}": grad for name, grad in zip(leaves, found, strict=True)}


def assert_within_budget(given: dict[str, Tensor], cu_seqlens: Tensor | None = None) -> None:
    dtype = given["v"].dtype
    exact = run(given, "reference", cu_seqlens, dtype=torch.float64)
    plain = run(given, "chunked", cu_seqlens, dtype=None)
    for name, value in run(given, "triton", cu_seqlens, dtype=None).items():
        verdict = judge(value, exact[name], plain[name], dtype)
        assert value.dtype == plain[name].dtype, name
        assert verdict.ok, f"{name}: {verdict}"


@pytest.mark.parametrize(("tokens", "batch"), [(2, 3), (31, 1), (32, 1), (33, 2), (64, 1), (65, 2), (97, 1), (129, 1)])
def test_every_length_is_within_budget(device: str, tokens: int, batch: int) -> None:
    assert_within_budget(inputs_of(device, tokens, torch.float32, batch=batch))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("ends", [None, PACKED])
def test_half_precision_is_within_budget(device: str, dtype: torch.dtype, ends: list[int] | None) -> None:
    packing = None if ends is None else torch.tensor(ends, device=device)
    given = inputs_of(device, 97, dtype, batch=1, sequences=None if ends is None else len(ends) - 1)
    assert_within_budget(given, packing)


@pytest.mark.parametrize("ends", [PACKED, [0, 1], [0, 0, 1], [0, 64, 128], [0, 130], list(range(12)), [0, 63, 130]])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_packed_sequences_are_within_budget(device: str, ends: list[int], kind: torch.dtype) -> None:
    given = inputs_of(device, ends[-1], torch.float32, batch=1, sequences=len(ends) - 1, width=5, channels=3)
    assert_within_budget(given, torch.tensor(ends, device=device, dtype=kind))


@pytest.mark.parametrize(
    ("width", "channels", "dtype"),
    [
        (1, 1, torch.float32),
        (5, 70, torch.float32),
        (64, 64, torch.float32),
        (128, 64, torch.float32),
        (256, 40, torch.float32),
        (64, 64, torch.bfloat16),
        (128, 64, torch.bfloat16),
        (128, 128, torch.bfloat16),
        (200, 70, torch.bfloat16),
        (128, 16, torch.bfloat16),
        (256, 16, torch.bfloat16),
        (256, 32, torch.bfloat16),
        (256, 256, torch.bfloat16),
        (64, 65, torch.bfloat16),
        (32, 32, torch.float16),
        (128, 64, torch.float16),
    ],
)
def test_every_width_is_within_budget(device: str, width: int, channels: int, dtype: torch.dtype) -> None:
    given = inputs_of(device, 70, dtype, batch=1, heads=2, groups=1, width=width, channels=channels)
    assert_within_budget(given)


@pytest.mark.parametrize(
    ("width", "channels", "columns"),
    [(64, 16, 16), (128, 16, 64), (128, 32, 64), (128, 40, 64), (256, 16, 64), (256, 32, 64), (256, 40, 32)],
)
def test_no_single_tile_is_narrow_beside_wide_states(width: int, channels: int, columns: int) -> None:
    """decisions/0008: one tile of 16 or 32 columns beside 128 modes and more is assembled wrongly."""
    from zoo.ops.semiseparable.kernels.launch import sizes_of

    q, v = (torch.empty(1, 70, 2, size, dtype=torch.bfloat16) for size in (width, channels))
    assert sizes_of(q, v, None).blocks["BLOCK_P"] == columns


@pytest.mark.parametrize("absent", [("log_decay",), ("scale",), ("initial_state",), NAMES[3:]])
@pytest.mark.parametrize("ends", [None, PACKED])
def test_absent_inputs_are_within_budget(device: str, absent: tuple[str, ...], ends: list[int] | None) -> None:
    packing = None if ends is None else torch.tensor(ends, device=device)
    sequences = None if ends is None else len(ends) - 1
    assert_within_budget(inputs_of(device, 97, torch.float32, batch=1, sequences=sequences, absent=absent), packing)


@pytest.mark.parametrize("rate", [0.0, 0.01, 2.0, 20.0])
def test_slow_and_fast_decays_are_within_budget(device: str, rate: float) -> None:
    assert_within_budget(inputs_of(device, 130, torch.float32, rate=rate))


def test_decays_of_zero_are_within_budget(device: str) -> None:
    given = inputs_of(device, 130, torch.float32)
    given["log_decay"][:, ::9, 0] = -torch.inf
    given["log_decay"][:, 5::11, 1] = -1e30
    given["log_decay"][:, :, 2] = -torch.inf
    given["log_decay"][:, 63:66, 3] = -200.0
    assert_within_budget(given)


def test_slices_of_a_projection_are_served(device: str) -> None:
    given = inputs_of(device, 70, torch.float32, batch=2, groups=4)
    joined = torch.cat([given[name] for name in "vqk"], -1)
    parts = dict(zip("vqk", joined.split(16, -1), strict=True))
    turned = {
        name: given[name].transpose(0, -1).contiguous().transpose(0, -1) for name in ("log_decay", "initial_state")
    }
    whole = run(given, "triton", dtype=None)
    for views in (parts | turned, {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}):
        leaves = {name: value.detach().requires_grad_() for name, value in (given | views).items()}
        y, state = semiseparable(
            *(leaves[name] for name in NAMES[:4]), scale=leaves["scale"], initial_state=leaves["initial_state"],
            backend="triton",
        )  # fmt: skip
        for name, value in ({"y": y, "final_state": state} | gradients(y, state, leaves)).items():
            assert torch.equal(value, whole[name]), name


def test_scratch_memory_is_never_read_before_it_is_written(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*shape: object, **options: object) -> Tensor:
        made = empty(*shape, **options)  # type: ignore[call-overload]
        return made.fill_(torch.nan) if made.is_floating_point() else made

    packing = torch.tensor(PACKED, device=device)
    given = inputs_of(device, 97, torch.float32, batch=1, sequences=len(PACKED) - 1, width=5, channels=3)
    clean = run(given, "triton", packing, dtype=None)
    monkeypatch.setattr(torch, "empty", poisoned)
    for name, value in run(given, "triton", packing, dtype=None).items():
        assert torch.equal(value, clean[name]), name


def test_gradients_are_the_same_in_every_run(device: str) -> None:
    given = inputs_of(device, 130, torch.bfloat16)
    first, second = run(given, "triton", dtype=None), run(given, "triton", dtype=None)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_token_and_no_token_are_served(device: str) -> None:
    assert_within_budget(inputs_of(device, 1, torch.bfloat16))
    given = inputs_of(device, 0, torch.float32, batch=2)
    start = given["initial_state"]
    y, state = semiseparable(*(given[name] for name in NAMES[:4]), initial_state=start, backend="triton")
    assert y.shape == (2, 0, 4, 16)
    assert torch.equal(state, start)


@pytest.mark.parametrize("ends", [None, PACKED])
@pytest.mark.parametrize("absent", [(), NAMES[3:]])
def test_the_custom_operators_pass_opcheck(device: str, ends: list[int] | None, absent: tuple[str, ...]) -> None:
    packing = None if ends is None else torch.tensor(ends, device=device)
    sequences = None if ends is None else len(ends) - 1
    given = inputs_of(device, 97, torch.float32, batch=1, heads=2, sequences=sequences, absent=absent)
    leaves = [given[name].requires_grad_() if name in given else None for name in NAMES]
    torch.library.opcheck(semiseparable_forward, (*leaves, packing))
    y, state = semiseparable_forward(*leaves, packing)
    cotangents = (torch.ones_like(y), torch.ones_like(state))
    plain = [leaf if leaf is None else leaf.detach() for leaf in leaves]
    torch.library.opcheck(semiseparable_backward, (*cotangents, *plain, packing))


@pytest.mark.parametrize("packed", [False, True])
def test_ssd_is_within_budget_and_compiles_without_a_graph_break(device: str, packed: bool) -> None:
    batch, sequences = (1, len(PACKED) - 1) if packed else (2, 2)
    packing = torch.tensor(PACKED, device=device) if packed else None
    given = {
        "x": torch.randn(batch, 97, 4, 8).bfloat16(),
        "dt": torch.randn(batch, 97, 4),
        "A": -torch.rand(4) * 4,
        "B": torch.randn(batch, 97, 2, 16).bfloat16(),
        "C": torch.randn(batch, 97, 2, 16).bfloat16(),
        "D": torch.randn(4, 8),
        "dt_bias": torch.randn(4),
        "initial_state": torch.randn(sequences, 4, 8, 16),
    }
    given = {name: value.to(device) for name, value in given.items()}

    def call(leaves: dict[str, Tensor], backend: str) -> tuple[Tensor, Tensor]:
        rest = dict(leaves)
        positional = [rest.pop(name) for name in ("x", "dt", "A", "B", "C")]
        return ssd(*positional, **rest, dt_softplus=True, cu_seqlens=packing, backend=backend)

    results = {}
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for way, fn, backend in (
        ("exact", call, "reference"),
        ("plain", call, "chunked"),
        ("triton", call, "triton"),
        ("compiled", compiled, "triton"),
    ):
        wider = {"dtype": torch.float64} if way == "exact" else {"dtype": None}
        leaves = {name: value.detach().to(**wider).requires_grad_() for name, value in given.items()}
        y, state = fn(leaves, backend)
        results[way] = {"y": y, "final_state": state} | gradients(y, state, leaves)
    for name, exact in results["exact"].items():
        for way in ("triton", "compiled"):
            verdict = judge(results[way][name], exact, results["plain"][name], torch.bfloat16)
            assert verdict.ok, f"{way} {name}: {verdict}"


def test_the_flop_counter_sees_both_directions(device: str) -> None:
    given = {name: value.requires_grad_() for name, value in inputs_of(device, 97, torch.float32).items()}
    with FlopCounterMode(display=False) as counter:
        y, _ = semiseparable(*(given[name] for name in NAMES[:4]), backend="triton")
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == flops(1, 97, 4, 2, 16, 16)
    assert counter.get_total_flops() - forward == backward_flops(1, 97, 4, 2, 16, 16)


def test_what_the_kernels_cannot_do_is_said_in_words(device: str) -> None:
    wide = inputs_of(device, 3, torch.float32, width=300)
    with pytest.raises(BackendError, match="at most 256 by 256, wanted P=16, N=300"):
        semiseparable(*(wide[name] for name in NAMES[:4]), backend="triton")
    given = inputs_of(device, 3, torch.float32)
    with pytest.raises(BackendError, match="float64"):
        semiseparable(*(given[name].double() for name in NAMES[:4]), backend="triton")
    leaves = [given[name].requires_grad_() for name in NAMES[:4]]
    y, _ = semiseparable(*leaves, backend="triton")
    (first,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        first.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "rate"), [(4096, 0.01), (2003, 2.0)])
def test_long_sequences_are_within_budget(device: str, dtype: torch.dtype, tokens: int, rate: float) -> None:
    if device != "cuda":
        pytest.skip("needs a CUDA device: too long for Triton's interpreter")
    assert_within_budget(inputs_of(device, tokens, dtype, batch=1, width=128, channels=64, rate=rate))
