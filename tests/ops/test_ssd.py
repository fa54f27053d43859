"""The SSD operator: against recorded outputs, its three forms against each other, packing, numbers, and errors."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from zoo.ops import record_dispatch
from zoo.ops.linear_attention import linear_attention
from zoo.ops.semiseparable import semiseparable
from zoo.ops.ssd import flops, mixing_matrix, ssd, ssd_quadratic, time_step

from golden import load_case
from sequence_mixer.conformance.budget import judge, relative_rms
from sequence_mixer.errors import BackendError, ConfigError, DtypeError, PackingError, ShapeError

LENGTHS = [1, 2, 63, 64, 65, 97, 128, 130]
PACKED = [0, 0, 5, 69, 69, 70, 134, 151, 151]
BIASED = {"dt_softplus": True, "dt_limit": (0.01, 2.0)}


def inputs_of(
    tokens: int,
    *,
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    width: int = 5,
    channels: int = 3,
    sequences: int | None = None,
    skip: str = "H",
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Arguments of `ssd` by name; float64 values that are exact in `dtype`."""
    shapes = {
        "x": (batch, tokens, heads, channels),
        "dt": (batch, tokens, heads),
        "A": (heads,),
        "B": (batch, tokens, groups, width),
        "C": (batch, tokens, groups, width),
        "D": (heads,) if skip == "H" else (heads, channels),
        "dt_bias": (heads,),
        "initial_state": (sequences or batch, heads, channels, width),
    }
    made = {name: torch.randn(shape, dtype=torch.float64).to(dtype).double() for name, shape in shapes.items()}
    made["A"] = -made["A"].abs()
    return made


def run(
    given: dict[str, Tensor], backend: str, dtype: torch.dtype = torch.float64, **options: object
) -> dict[str, Tensor]:
    """y, final_state and gradients of a fixed random loss, by name; dt, A, D, dt_bias stay float32 in half runs."""
    half = ("x", "B", "C")
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        name: value.to(dtype if name in half else inner, copy=True).requires_grad_() for name, value in given.items()
    }
    positional = [leaves[name] for name in ("x", "dt", "A", "B", "C")]
    named = {name: leaf for name, leaf in leaves.items() if name in ("D", "dt_bias", "initial_state")}
    y, final_state = ssd(*positional, **named, backend=backend, **options)
    return {"y": y, "final_state": final_state} | gradients(y, final_state, leaves)


def gradients(y: Tensor, final_state: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    seeded = torch.Generator().manual_seed(7)
    w, ws = (torch.randn(part.shape, generator=seeded, dtype=torch.float64) for part in (y, final_state))
    loss = (y * w.to(y)).sum() + (final_state * ws.to(final_state)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {f"grad.{name}": grad for name, grad in zip(leaves, found, strict=True)}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], limit: float = 1e-12) -> None:
    for name, exact in other.items():
        assert one[name].shape == exact.shape, name
        assert relative_rms(one[name], exact) <= limit, f"{name}: {relative_rms(one[name], exact):.2e}"


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("name", ["ssd", "ssd_d_hdim", "ssd_d_z_bias_groups", "ssd_packed", "ssd_state"])
def test_ssd_agrees_with_the_recorded_operator(name: str, backend: str) -> None:
    case = load_case(name)
    leaves = {
        key.removeprefix("in."): value.clone().requires_grad_()
        for key, value in case.tensors.items()
        if key.startswith("in.") and value.is_floating_point()
    }
    x, dt, A, B, C = (leaves[key] for key in ("x", "dt", "A", "B", "C"))
    packing = None
    if case.config["seq_idx"]:
        packing = torch.tensor([0, *itertools.accumulate(case.config["seq_lens"][0])])
    y, final_state = ssd(
        x, dt, A, B, C,
        D=leaves.get("D"), dt_bias=leaves.get("dt_bias"), dt_softplus=case.config["dt_softplus"],
        dt_limit=(0.0, math.inf), initial_state=leaves.get("initial_states"), cu_seqlens=packing, backend=backend,
    )  # fmt: skip
    if "z" in leaves:
        y = y * torch.nn.functional.silu(leaves["z"])
    loss = (y * case.tensors["w"]).sum()
    found = {"y": y}
    if "w_final_state" in case.tensors:
        loss = loss + (final_state * case.tensors["w_final_state"]).sum()
        found["final_state"] = final_state
    found |= {f"grad.{key}": grad for key, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())))}
    assert_same(found, {key: case.tensors[key] for key in found}, 1e-10)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("name", ["ssd_minimal", "ssd_minimal_state"])
def test_the_semiseparable_scan_agrees_with_the_recorded_discrete_form(name: str, backend: str) -> None:
    case = load_case(name)
    leaves = {
        key.removeprefix("in."): value.clone().requires_grad_()
        for key, value in case.tensors.items()
        if key.startswith("in.")
    }
    initial = leaves["initial_states"][:, 0] if "initial_states" in leaves else None
    y, final_state = semiseparable(
        leaves["C"], leaves["B"], leaves["X"], leaves["A"], initial_state=initial, backend=backend
    )
    loss = (y * case.tensors["w"]).sum() + (final_state * case.tensors["w_final_state"]).sum()
    found = {"y": y, "final_state": final_state}
    found |= {f"grad.{key}": grad for key, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())))}
    assert_same(found, {key: case.tensors[key] for key in found}, 1e-10)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_recurrent_chunked_and_quadratic_forms_agree(tokens: int) -> None:
    given = inputs_of(tokens)
    exact = run(given, "reference", **BIASED)
    assert_same(run(given, "chunked", **BIASED), exact)

    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    step = time_step(leaves["dt"], leaves["dt_bias"], True, (0.01, 2.0), torch.float64)
    y, final_state = ssd_quadratic(
        leaves["x"], step, leaves["A"], leaves["B"], leaves["C"],
        D=leaves["D"], initial_state=leaves["initial_state"],
    )  # fmt: skip
    assert_same({"y": y, "final_state": final_state} | gradients(y, final_state, leaves), exact)


def test_many_chunks_are_carried_exactly() -> None:
    given = inputs_of(64 * 37 + 5, batch=1)
    assert_same(run(given, "chunked", **BIASED), run(given, "reference", **BIASED))


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("ends", [PACKED, [0, 3, 3], [0, 1], [0, 0, 1], [0, 64, 128], [0, 200], list(range(40))])
def test_a_packed_row_equals_separate_sequences(ends: list[int], state: bool) -> None:
    given = inputs_of(ends[-1], batch=1, sequences=len(ends) - 1, skip="H P")
    if not state:
        del given["initial_state"]
    packing = torch.tensor(ends, dtype=torch.int32)
    packed = run(given, "chunked", cu_seqlens=packing, **BIASED)
    assert_same(packed, run(given, "reference", cu_seqlens=packing, **BIASED))
    for s, (a, b) in enumerate(itertools.pairwise(ends)):
        alone = {name: value[:, a:b] if value.dim() > 2 else value for name, value in given.items()}
        if state:
            alone["initial_state"] = given["initial_state"][s : s + 1]
        result = run(alone, "chunked", **BIASED)
        assert_same({"y": packed["y"][:, a:b], "final_state": packed["final_state"][s : s + 1]},
                    {key: result[key] for key in ("y", "final_state")})  # fmt: skip


def test_a_split_sequence_passes_its_state_on() -> None:
    given = inputs_of(100)
    del given["initial_state"]
    whole = ssd(*(given[key] for key in ("x", "dt", "A", "B", "C")), dt_softplus=True)
    state, parts = None, []
    for a, b in itertools.pairwise([0, 1, 2, 66, 67, 100]):
        cut = {key: value[:, a:b] if value.dim() > 2 else value for key, value in given.items()}
        y, state = ssd(*(cut[key] for key in ("x", "dt", "A", "B", "C")), dt_softplus=True, initial_state=state)
        parts.append(y)
    assert_same({"y": torch.cat(parts, 1), "final_state": state}, {"y": whole[0], "final_state": whole[1]})


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 0), (0, 5)])
def test_an_empty_input_returns_its_state(backend: str, batch: int, tokens: int) -> None:
    given = inputs_of(tokens, batch=batch)
    y, final_state = ssd(*(given[key] for key in ("x", "dt", "A", "B", "C")), backend=backend,
                         initial_state=given["initial_state"])  # fmt: skip
    assert y.shape == (batch, tokens, 4, 3)
    assert torch.equal(final_state, given["initial_state"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", [0.01, 1.0, 16.0])
def test_the_chunked_path_keeps_the_digits_of_its_dtype(dtype: torch.dtype, rate: float) -> None:
    given = inputs_of(300, width=16, channels=8, dtype=dtype)
    given["A"] = (given["A"] * rate).to(dtype).double()
    exact, plain = run(given, "reference", **BIASED), run(given, "chunked", dtype, **BIASED)
    for name, value in plain.items():
        verdict = judge(value, exact[name], None, dtype)
        assert verdict.ok, f"{name}: {verdict}"
    assert plain["y"].dtype == dtype
    assert plain["final_state"].dtype == torch.float32


def test_decays_of_zero_forget_without_nan() -> None:
    q, k, v = torch.randn(1, 150, 1, 4), torch.randn(1, 150, 1, 4), torch.randn(1, 150, 2, 3)
    log_decay = -torch.rand(1, 150, 2)
    log_decay[:, ::9, 0] = -torch.inf
    log_decay[:, 5::11, 1] = -1e30
    results = {}
    for backend, dtype in (("reference", torch.float64), ("chunked", torch.float64), ("plain", torch.float32)):
        leaves = [part.to(dtype).requires_grad_() for part in (q, k, v, log_decay.clone())]
        y, state = semiseparable(*leaves, backend="chunked" if backend == "plain" else backend)
        results[backend] = dict(
            zip(["y", "q", "k", "v", "a"], [y, *torch.autograd.grad(y.sum() + state.sum(), leaves)])
        )
    assert_same(results["chunked"], results["reference"])
    assert_same(results["plain"], results["reference"], 5e-6)


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 0, 70, 97])])
def test_no_decay_is_a_decay_of_one(cu_seqlens: Tensor | None) -> None:
    q, k, v = (torch.randn(1, 97, 2, 4, dtype=torch.float64) for _ in range(3))
    without = semiseparable(q, k, v, None, cu_seqlens=cu_seqlens, backend="chunked")
    zero = semiseparable(q, k, v, torch.zeros(1, 97, 2), cu_seqlens=cu_seqlens, backend="reference")
    assert_same(dict(enumerate(without)), dict(enumerate(zero)))  # type: ignore[arg-type]


def test_without_decay_it_is_linear_attention() -> None:
    """Values dt x, keys B, queries C, no normaliser; values and gradients, from a state."""
    given = inputs_of(97)
    given["A"], given["dt"] = torch.zeros_like(given["A"]), given["dt"].abs()
    del given["D"], given["dt_bias"]
    ours = run(given, "chunked")
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    k, q = (leaves[name].repeat_interleave(2, 2) for name in "BC")
    y, state = linear_attention(
        q, k, leaves["x"] * leaves["dt"].unsqueeze(-1), initial_state=leaves["initial_state"].mT, backend="reference"
    )
    theirs = {"y": y, "final_state": state.mT} | gradients(y, state.mT, leaves)
    del ours["grad.A"], theirs["grad.A"]  # linear attention has no decay to differentiate by
    assert_same(ours, theirs)


def test_small_time_steps_keep_their_digits() -> None:
    raw = torch.tensor([-30.0, -12.0, -7.0, 0.0, 7.0, 30.0], dtype=torch.float64)
    exact = torch.tensor([math.log1p(math.exp(value)) for value in raw.tolist()], dtype=torch.float64)
    assert torch.allclose(time_step(raw, None, True, (0.0, math.inf), torch.float64), exact, rtol=1e-15, atol=0)
    single = time_step(raw.float(), None, True, (0.0, math.inf), torch.float32).double()
    assert float(((single - exact) / exact).abs().max()) < 1e-6


def test_time_steps_outside_their_limits_have_no_gradient() -> None:
    raw = torch.tensor([[[-9.0, 0.0, 9.0]]], requires_grad=True)
    step = time_step(raw, None, True, (0.1, 2.0), torch.float32)
    step.sum().backward()
    assert raw.grad is not None
    assert raw.grad[0, 0, 0] == 0
    assert raw.grad[0, 0, 2] == 0
    assert raw.grad[0, 0, 1] == 0.5
    assert step.flatten().tolist()[::2] == pytest.approx([0.1, 2.0])


def test_the_mask_has_rank_one_and_the_matrix_the_rank_of_the_state() -> None:
    given = inputs_of(24, batch=1, width=3)
    matrix = mixing_matrix(given["dt"].abs(), 0.1 * given["A"], given["B"], given["C"])
    assert bool((matrix.triu(1) == 0).all())
    assert {int(torch.linalg.matrix_rank(matrix[0, 1, i:, : i + 1], rtol=1e-10)) for i in range(3, 21)} == {3}


def test_the_reference_differentiates_twice() -> None:
    given = inputs_of(4, batch=1, heads=2, groups=1, width=2, channels=2)
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    names = list(leaves)

    def call(*parts: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(names, parts))
        positional = [named.pop(name) for name in ("x", "dt", "A", "B", "C")]
        return ssd(*positional, **named, dt_softplus=True, backend="reference")

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(call, tuple(leaves.values()))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 97])
def test_the_chunked_path_compiles_without_a_graph_break(packed: bool, tokens: int) -> None:
    ends = torch.tensor([0, 0, tokens // 2, tokens]) if packed else None
    given = inputs_of(tokens, batch=1 if packed else 2, sequences=3 if packed else None)
    leaves = [given[key].requires_grad_() for key in ("x", "dt", "A", "B", "C", "D", "initial_state")]

    def call(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(x, dt, A, B, C, D=D, dt_softplus=True, initial_state=state, cu_seqlens=ends)

    results = []
    for fn in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        y, state = fn(*leaves)
        results.append(dict(enumerate([y, state, *torch.autograd.grad(y.square().sum() + state.sum(), leaves)])))
    assert_same(results[1], results[0], 1e-13)  # type: ignore[arg-type]


def test_inputs_and_cotangents_need_not_be_contiguous() -> None:
    given = inputs_of(70)
    exact = run(given, "chunked")
    turned = {
        name: value.transpose(0, -1).contiguous().transpose(0, -1) if value.dim() > 1 else value
        for name, value in given.items()
    }
    assert_same(run(turned, "chunked"), exact)


def test_the_choice_is_recorded_once() -> None:
    given = inputs_of(3)
    with record_dispatch() as record:
        ssd(*(given[key] for key in ("x", "dt", "A", "B", "C")))
    assert [(entry.op, entry.backend) for entry in record] == [("ssd", "chunked")]
    assert "float64" in record[0].reasons["triton"] or "cpu" in record[0].reasons["triton"]


def test_bad_inputs_are_refused_in_words() -> None:
    given = inputs_of(6)
    x, dt, A, B, C = (given[key] for key in ("x", "dt", "A", "B", "C"))
    with pytest.raises(ShapeError, match=r"dt has shape \[2, 5, 4\], wanted \[B=2, T=6, H=4\]"):
        ssd(x, dt[:, :5], A, B, C)
    with pytest.raises(ShapeError, match="multiple of the G=3 groups"):
        ssd(x, dt, A, B[:, :, :1].expand(-1, -1, 3, -1), C[:, :, :1].expand(-1, -1, 3, -1))
    with pytest.raises(ShapeError, match="C has shape"):
        ssd(x, dt, A, B, C[..., :4])
    with pytest.raises(ShapeError, match=r"D has shape \[4, 2\], wanted \[H=4, P=3\]"):
        ssd(x, dt, A, B, C, D=torch.ones(4, 2))
    with pytest.raises(ShapeError, match="initial_state"):
        ssd(x, dt, A, B, C, initial_state=given["initial_state"][:1])
    with pytest.raises(DtypeError, match=r"B is torch\.float32"):
        ssd(x, dt, A, B.float(), C)
    with pytest.raises(DtypeError, match=r"x is torch\.int64"):
        ssd(x.long(), dt, A, B, C)
    with pytest.raises(PackingError, match="has batch 2"):
        ssd(x, dt, A, B, C, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ConfigError, match="dt_limit"):
        ssd(x, dt, A, B, C, dt_limit=(2.0, 1.0))
    with pytest.raises(BackendError, match="did you mean chunked"):
        ssd(x, dt, A, B, C, backend="chunkd")
    with pytest.raises(BackendError, match="triton: "):
        ssd(x, dt, A, B, C, backend="triton")


def test_flops_follow_the_chunk_products() -> None:
    assert flops(1, 128, 4, 2, 16, 8) == 2 * 128 * (64 * 16 * 2 + 64 * 8 * 4 + 2 * 16 * 8 * 4)
    assert flops(3, 1, 4, 2, 16, 8) == 3 * 4 * 16 * 8 * 4
