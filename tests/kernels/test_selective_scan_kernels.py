"""Triton kernels of the selective scan against the float64 plain path, itself held to the definition in tests/ops."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.selective_scan import flops, selective_scan, triton_path
from zoo.ops.selective_scan.cost import backward_flops
from zoo.ops.selective_scan.kernels import launch, launch_backward, tuning
from zoo.ops.selective_scan.triton_path import triton_backward, triton_forward

from sequence_mixer.conformance.budget import judge
from sequence_mixer.errors import BackendError

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
PACKED = [0, 0, 1, 6, 6]


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and segments of 4 tokens in tiles of 2: sequences that the interpreter can afford cross several."""
    monkeypatch.setattr(triton_path, "CHUNK", 4)
    monkeypatch.setattr(tuning, "SHORTEST_SEGMENT", 4)
    monkeypatch.setattr(launch, "blocks_for", lambda table, state: replace(tuning.blocks_for(table, state), tile=2))


@pytest.fixture
def one_segment(short_chunks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same chunks, but every sequence is run through by one program."""
    monkeypatch.setattr(tuning, "PROCESSORS", 0)


def inputs_of(
    device: str,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 1,
    channels: int = 6,
    groups: int = 1,
    state: int = 4,
    sequences: int | None = None,
    absent: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Arguments of `selective_scan` that are present, by name, on `device`."""
    made = {
        "x": torch.randn(batch, tokens, channels).to(dtype),
        "dt": torch.randn(batch, tokens, channels).abs(),
        "A": -4 * torch.rand(channels, state),
        "B": torch.randn(batch, tokens, groups, state).to(dtype),
        "C": torch.randn(batch, tokens, groups, state).to(dtype),
        "D": torch.randn(channels),
        "z": torch.randn(batch, tokens, channels).to(dtype),
        "dt_bias": torch.randn(channels) - 2,
        "initial_state": torch.randn(sequences or batch, channels, state),
    }
    return {name: value.to(device) for name, value in made.items() if name not in absent}


def run(
    given: dict[str, Tensor],
    backend: str,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = True,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """y, final state and the gradients of a fixed loss; `dtype` casts everything first."""
    leaves = {name: value.detach().to(dtype=dtype).requires_grad_() for name, value in given.items()}
    y, final_state = call(leaves, backend, cu_seqlens, dt_softplus)
    return {"y": y, "final_state": final_state} | gradients(y, final_state, leaves)


def call(
    leaves: dict[str, Tensor], backend: str, cu_seqlens: Tensor | None = None, dt_softplus: bool = True
) -> tuple[Tensor, Tensor]:
    rest = dict(leaves)
    positional = [rest.pop(name) for name in NAMES[:5]]
    return selective_scan(*positional, **rest, dt_softplus=dt_softplus, cu_seqlens=cu_seqlens, backend=backend)


def gradients(y: Tensor, final_state: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    seeded = torch.Generator().manual_seed(7)
    w, ws = (torch.randn(part.shape, generator=seeded) for part in (y, final_state))
    w = w.bfloat16().to(y.device)  # exact in every dtype, so that all paths have the same loss
    loss = (y.double() * w).sum() + (final_state * ws.to(final_state)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {f"grad.{name}": grad for name, grad in zip(leaves, found, strict=True)}


def assert_within_budget(given: dict[str, Tensor], cu_seqlens: Tensor | None = None, dt_softplus: bool = True) -> None:
    dtype = given["x"].dtype
    exact = run(given, "chunked", cu_seqlens, dt_softplus, torch.float64)
    plain = run(given, "chunked", cu_seqlens, dt_softplus)
    for name, value in run(given, "triton", cu_seqlens, dt_softplus).items():
        verdict = judge(value, exact[name], plain[name], dtype)
        assert value.dtype == plain[name].dtype, name
        assert verdict.ok, f"{name}: {verdict}"


@pytest.mark.usefixtures("one_segment")
@pytest.mark.parametrize(("tokens", "batch"), [(1, 2), (3, 1), (4, 1), (5, 2), (9, 1)])
def test_every_length_is_within_budget(device: str, tokens: int, batch: int) -> None:
    assert_within_budget(inputs_of(device, tokens, batch=batch))


def test_a_chunk_of_its_usual_length_is_within_budget(device: str) -> None:
    assert_within_budget(inputs_of(device, 65))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_budget(device: str, dtype: torch.dtype) -> None:
    assert_within_budget(inputs_of(device, 5, dtype))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("ends", [PACKED, [0, 1], [0, 4, 9], list(range(4))])
def test_packed_sequences_are_within_budget(device: str, ends: list[int]) -> None:
    given = inputs_of(device, ends[-1], sequences=len(ends) - 1)
    assert_within_budget(given, torch.tensor(ends, device=device, dtype=torch.int32))


@pytest.mark.usefixtures("one_segment")
def test_packed_sequences_in_one_segment_each_are_within_budget(device: str) -> None:
    given = inputs_of(device, PACKED[-1], sequences=len(PACKED) - 1)
    assert_within_budget(given, torch.tensor(PACKED, device=device))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(
    ("state", "channels", "groups"), [(1, 3, 1), (5, 6, 3), (16, 40, 1), (32, 17, 1), (64, 10, 2), (256, 3, 1)]
)
def test_every_width_is_within_budget(device: str, state: int, channels: int, groups: int) -> None:
    assert_within_budget(inputs_of(device, 3, state=state, channels=channels, groups=groups))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("absent", [("z",), ("D", "dt_bias"), ("initial_state",), NAMES[5:]])
def test_absent_inputs_are_within_budget(device: str, absent: tuple[str, ...]) -> None:
    softplus = "dt_bias" not in absent
    packing = torch.tensor(PACKED, device=device) if absent == ("initial_state",) else None
    assert_within_budget(inputs_of(device, PACKED[-1], absent=absent), packing, softplus)


@pytest.mark.usefixtures("short_chunks")
def test_many_channel_blocks_share_their_sums(device: str) -> None:
    assert_within_budget(inputs_of(device, 3, channels=70, state=3))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.usefixtures("short_chunks")
def test_a_backward_in_slabs_is_within_budget(device: str, cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SHORTEST_SEGMENT", 12 if cut else 64)
    monkeypatch.setattr(launch_backward, "slab_length", lambda segment, row: 8)
    assert_within_budget(inputs_of(device, 14, batch=2))


@pytest.mark.usefixtures("one_segment")
def test_slices_of_a_projection_are_served(device: str) -> None:
    given = inputs_of(device, 3, batch=2)
    whole = run(given, "triton")
    xz, keys = torch.cat([given["x"], given["z"]], -1), torch.cat([given["B"], given["C"]], -1)
    views = dict(zip("xz", xz.chunk(2, -1), strict=True)) | dict(zip("BC", keys.chunk(2, -1), strict=True))
    views |= {name: given[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("A", "dt", "initial_state")}
    leaves = {name: views.get(name, value).detach().requires_grad_() for name, value in given.items()}
    y, state = call(leaves, "triton")
    for name, value in ({"y": y, "final_state": state} | gradients(y, state, leaves)).items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.usefixtures("short_chunks")
def test_scratch_memory_is_never_read_before_it_is_written(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*shape: object, **options: object) -> Tensor:
        made = empty(*shape, **options)  # type: ignore[call-overload]
        return made.fill_(torch.nan) if made.is_floating_point() else made

    packing = torch.tensor(PACKED, device=device)
    given = inputs_of(device, PACKED[-1], sequences=len(PACKED) - 1)
    clean = run(given, "triton", packing)
    monkeypatch.setattr(torch, "empty", poisoned)
    for name, value in run(given, "triton", packing).items():
        assert torch.equal(value, clean[name]), name


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("ends", [None, [0, 0, 2]])
def test_the_custom_operators_pass_opcheck(device: str, ends: list[int] | None) -> None:
    packing = None if ends is None else torch.tensor(ends, device=device)
    absent = ("D", "z") if ends is None else ()
    tokens = 3 if ends is None else ends[-1]
    given = inputs_of(device, tokens, channels=3, sequences=None if ends is None else len(ends) - 1, absent=absent)
    leaves = [given[name].requires_grad_() if name in given else None for name in NAMES]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(triton_forward, (*leaves, packing, True), test_utils=checks)
    y, state, states = triton_forward(*leaves, packing, True)
    plain = [leaf if leaf is None else leaf.detach() for leaf in leaves]
    cotangents = (torch.ones_like(y), torch.ones_like(state))
    torch.library.opcheck(triton_backward, (*cotangents, states, *plain, packing, True), test_utils=checks)


@pytest.mark.usefixtures("one_segment")
def test_the_scan_compiles_without_a_graph_break_and_repeats_itself(device: str) -> None:
    given = {name: value.requires_grad_() for name, value in inputs_of(device, 3).items()}
    results = []
    for fn in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        y, state = fn(given, "triton")
        results.append({"y": y, "final_state": state} | gradients(y, state, given))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.usefixtures("one_segment")
def test_the_flop_counter_sees_both_directions(device: str) -> None:
    given = {name: value.requires_grad_() for name, value in inputs_of(device, 3).items()}
    with FlopCounterMode(display=False) as counter:
        y, _ = call(given, "triton")
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == flops(1, 3, 6, 4)
    assert counter.get_total_flops() - forward == backward_flops(1, 3, 6, 4)


def test_no_token_and_what_the_kernels_cannot_do_are_said_in_words(device: str) -> None:
    with pytest.raises(BackendError, match="at most 256 states of a channel, wanted N=257"):
        call(inputs_of(device, 3, state=257), "triton")
    with pytest.raises(BackendError, match="x is empty"):
        call(inputs_of(device, 0), "triton")
    with pytest.raises(BackendError, match="float64"):
        call({name: value.double() for name, value in inputs_of(device, 3).items()}, "triton")


def test_sequences_are_cut_only_where_programs_are_few() -> None:
    blocks = tuning.Blocks(tiles=1, rows=16, e=32, tile=8, warps=1, resident=8)
    assert tuning.segment_length(8, 4096, 128, blocks) == 4096
    assert tuning.segment_length(2, 16384, 128, blocks) == 4096
    assert tuning.segment_length(1, 100, 1, blocks) == 128
    assert tuning.segment_length(1, 4096, 1, blocks) == tuning.SHORTEST_SEGMENT
    for state in range(1, 257):
        assert tuning.slab_length(4096, state << 15) % triton_path.CHUNK == 0
        for table in (tuning.AHEAD, tuning.BACK):
            blocks = tuning.blocks_for(table, state)
            assert state <= blocks.tiles * blocks.rows < max(8, 2 * state)
            assert triton_path.CHUNK % blocks.tile == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "channels", "batch"), [(4096, 256, 1), (2003, 2048, 9)])
def test_long_sequences_are_within_budget(
    device: str, dtype: torch.dtype, tokens: int, channels: int, batch: int
) -> None:
    if device != "cuda":
        pytest.skip("needs a CUDA device: too long for Triton's interpreter")
    assert_within_budget(inputs_of(device, tokens, dtype, batch=batch, channels=channels, state=16))
