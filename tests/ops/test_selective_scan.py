"""The selective scan: recorded outputs, its forms against the definition, packing, states, numbers, and errors."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops import record_dispatch, ssd
from zoo.ops.selective_scan import chunked, flops, mixing_matrix, selective_scan
from zoo.ops.selective_scan.cost import backward_flops

from golden import load_case
from sequence_mixer.conformance.budget import judge, relative_rms
from sequence_mixer.errors import BackendError, DtypeError, PackingError, ShapeError

BACKENDS = ["reference", "chunked"]
PACKED = [0, 0, 5, 27, 27, 28, 41, 41]
TENSORS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 tokens, so that short sequences cross several."""
    monkeypatch.setattr(chunked, "SHORTEST", 8)
    monkeypatch.setattr(chunked, "LONGEST", 8)


def inputs_of(
    tokens: int,
    *,
    batch: int = 2,
    channels: int = 6,
    groups: int = 2,
    state: int = 5,
    sequences: int | None = None,
    absent: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Arguments of `selective_scan` by name; float64 values that are exact in `dtype`."""
    shapes = {
        "x": (batch, tokens, channels),
        "dt": (batch, tokens, channels),
        "A": (channels, state),
        "B": (batch, tokens, groups, state),
        "C": (batch, tokens, groups, state),
        "D": (channels,),
        "z": (batch, tokens, channels),
        "dt_bias": (channels,),
        "initial_state": (sequences or batch, channels, state),
    }
    made = {name: torch.randn(shape, dtype=torch.float64).to(dtype).double() for name, shape in shapes.items()}
    made["A"] = -made["A"].abs()
    return {name: value for name, value in made.items() if name not in absent}


def run(
    given: dict[str, Tensor],
    backend: str,
    dtype: torch.dtype = torch.float64,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = True,
) -> dict[str, Tensor]:
    """y, final_state and gradients of a fixed loss, by name; rates, steps and states stay float32 in half runs."""
    half, inner = ("x", "B", "C", "z"), torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {name: value.to(dtype if name in half else inner, copy=True) for name, value in given.items()}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    y, final_state = call(leaves, backend, cu_seqlens, dt_softplus)
    return {"y": y, "final_state": final_state} | gradients(y, final_state, leaves)


def call(
    leaves: dict[str, Tensor], backend: str, cu_seqlens: Tensor | None = None, dt_softplus: bool = True
) -> tuple[Tensor, Tensor]:
    rest = dict(leaves)
    positional = [rest.pop(name) for name in TENSORS[:5]]
    return selective_scan(*positional, **rest, dt_softplus=dt_softplus, cu_seqlens=cu_seqlens, backend=backend)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["selective_scan", "selective_scan_plain", "selective_scan_groups", "selective_scan_const_bc"]
)
def test_the_scan_agrees_with_the_recorded_operator(name: str, backend: str) -> None:
    case = load_case(name)
    recorded = {key.removeprefix("in."): value for key, value in case.tensors.items() if key.startswith("in.")}
    leaves = {key: value.clone().requires_grad_() for key, value in recorded.items()}
    x, dt = (leaves[key].transpose(1, 2) for key in ("u", "delta"))

    def keys(part: Tensor) -> Tensor:
        """[B,T,G,N] or [B,T,N]; a constant [E,N] is one group for each channel."""
        return part.expand(*x.shape[:2], -1, -1) if part.dim() == 2 else part.movedim(-1, 1)

    y, final_state = selective_scan(
        x, dt, leaves["A"], keys(leaves["B"]), keys(leaves["C"]),
        D=leaves.get("D"), z=leaves["z"].transpose(1, 2) if "z" in leaves else None,
        dt_bias=leaves.get("delta_bias"), dt_softplus=case.config["delta_softplus"], backend=backend,
    )  # fmt: skip
    y = y.transpose(1, 2)
    found = torch.autograd.grad((y * case.tensors["w"]).sum(), list(leaves.values()))
    result = {"y": y, "final_state": final_state} | {f"grad.{key}": g for key, g in zip(leaves, found, strict=True)}
    assert_same(result, {key: case.tensors[key] for key in result}, 1e-10)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 31])
def test_the_chunked_path_agrees_with_the_definition(tokens: int) -> None:
    given = inputs_of(tokens)
    assert_same(run(given, "chunked"), run(given, "reference"))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("absent", [("D",), ("z",), ("dt_bias",), ("initial_state",), TENSORS[5:]])
@pytest.mark.parametrize("ends", [None, PACKED])
def test_absent_inputs_agree_with_the_definition(ends: list[int] | None, absent: tuple[str, ...]) -> None:
    packing, sequences = (None, None) if ends is None else (torch.tensor(ends), len(ends) - 1)
    given = inputs_of(41, batch=1, sequences=sequences, absent=absent)
    given["dt"] = given["dt"].abs()
    for softplus in (True, False):
        assert_same(
            run(given, "chunked", cu_seqlens=packing, dt_softplus=softplus),
            run(given, "reference", cu_seqlens=packing, dt_softplus=softplus),
        )


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("ends", [PACKED, [0, 3, 3], [0, 1], [0, 0, 1], [0, 8, 16], list(range(12)), [0, 0, 0]])
def test_a_packed_row_equals_separate_sequences(ends: list[int]) -> None:
    given = inputs_of(ends[-1], batch=1, sequences=len(ends) - 1)
    packed = run(given, "chunked", cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    for s, (a, b) in enumerate(itertools.pairwise(ends)):
        alone = {name: value[:, a:b] if name in ("x", "dt", "B", "C", "z") else value for name, value in given.items()}
        alone["initial_state"] = given["initial_state"][s : s + 1]
        result = run(alone, "chunked")
        assert_same({"y": packed["y"][:, a:b], "final_state": packed["final_state"][s : s + 1]},
                    {key: result[key] for key in ("y", "final_state")})  # fmt: skip


def test_nothing_of_a_sequence_reaches_its_neighbours_not_even_nan() -> None:
    given = inputs_of(20, batch=1, sequences=2)
    packing = torch.tensor([0, 11, 20])
    clean = call(given, "chunked", packing)
    given["x"][:, :11] = math.nan
    dirty = call(given, "chunked", packing)
    assert torch.equal(dirty[0][:, 11:], clean[0][:, 11:])
    assert torch.equal(dirty[1][1], clean[1][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_split_sequence_passes_its_state_on(backend: str) -> None:
    given = inputs_of(70, absent=("initial_state",))
    whole = call(given, backend)
    state, parts = None, []
    for a, b in itertools.pairwise([0, 1, 2, 66, 70]):
        cut = {name: value[:, a:b] if name in ("x", "dt", "B", "C", "z") else value for name, value in given.items()}
        y, state = call(cut if state is None else cut | {"initial_state": state}, backend)
        parts.append(y)
    assert state is not None
    assert_same({"y": torch.cat(parts, 1), "final_state": state}, {"y": whole[0], "final_state": whole[1]})


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_input_returns_its_state(backend: str) -> None:
    given = inputs_of(0)
    y, final_state = call(given, backend)
    assert y.shape == (2, 0, 6)
    assert torch.equal(final_state, given["initial_state"])
    assert not torch.any(call(inputs_of(0, absent=("initial_state",)), backend)[1])


def test_rates_tied_over_the_states_make_the_scan_of_mamba_2() -> None:
    given = inputs_of(40, groups=1, absent=("z",))
    given["A"] = given["A"][:, :1].expand(-1, 5)
    ours = run(given, "chunked")
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    y, state = ssd(
        leaves["x"].unsqueeze(3), leaves["dt"], leaves["A"][:, 0], leaves["B"], leaves["C"],
        D=leaves["D"], dt_bias=leaves["dt_bias"], dt_softplus=True,
        initial_state=leaves["initial_state"].unsqueeze(2),
    )  # fmt: skip
    theirs = {"y": y.squeeze(3), "final_state": state.squeeze(2)}
    theirs |= gradients(theirs["y"], theirs["final_state"], leaves)
    ours["grad.A"], theirs["grad.A"] = ours["grad.A"].sum(1), theirs["grad.A"].sum(1)
    assert_same(ours, theirs)


def test_keys_without_groups_are_one_group() -> None:
    given = inputs_of(9, groups=1)
    flat = given | {name: given[name].squeeze(2) for name in "BC"}
    assert_same(dict(enumerate(call(flat, "auto"))), dict(enumerate(call(given, "reference"))))  # type: ignore[arg-type]


def test_the_scan_is_a_matrix_in_every_channel() -> None:
    given = inputs_of(24, groups=6, state=3, absent=("D", "z", "dt_bias", "initial_state"))
    given["dt"] = 0.1 * given["dt"].abs()
    matrix = mixing_matrix(*(given[name] for name in TENSORS[1:5]))
    y, _ = call(given, "chunked", dt_softplus=False)
    assert_same({"y": torch.einsum("betj,bje->bte", matrix, given["x"])}, {"y": y})
    assert bool((matrix.triu(1) == 0).all())
    assert {int(torch.linalg.matrix_rank(matrix[0, 1, i:, : i + 1], rtol=1e-10)) for i in range(3, 21)} == {3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", [0.01, 1.0, 16.0])
def test_the_chunked_path_keeps_the_digits_of_its_dtype(dtype: torch.dtype, rate: float) -> None:
    given = inputs_of(200, state=16, dtype=dtype)
    given["A"] = (given["A"] * rate).float().double()
    exact, plain = run(given, "chunked"), run(given, "chunked", dtype)
    for name, value in plain.items():
        verdict = judge(value, exact[name], None, dtype)
        assert verdict.ok, f"{name}: {verdict}"
    assert plain["y"].dtype == dtype
    assert plain["final_state"].dtype == torch.float32


def test_decays_that_underflow_forget_without_nan() -> None:
    given = inputs_of(40)
    given["A"][0], given["A"][1, 0] = -1e30, -torch.inf
    exact = run(given, "reference")
    del exact["grad.A"], exact["grad.dt"], exact["grad.dt_bias"]  # the definition has 0 times infinity there
    assert_same(run(given, "chunked"), exact)
    given["A"][1, 0] = -1e30
    assert all(bool(value.isfinite().all()) for value in run(given, "chunked", torch.float32).values())


def test_the_reference_differentiates_twice_and_the_fast_path_says_so() -> None:
    leaves = {name: value.requires_grad_() for name, value in inputs_of(4, batch=1, channels=2, state=2).items()}

    def once(*parts: Tensor) -> tuple[Tensor, Tensor]:
        return call(dict(zip(leaves, parts, strict=True)), "reference")

    assert torch.autograd.gradcheck(once, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(once, tuple(leaves.values()))
    y, _ = call(leaves, "chunked")
    (first,) = torch.autograd.grad(y.square().sum(), [leaves["x"]], create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        first.sum().backward()


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("packed", [False, True])
def test_the_chunked_path_compiles_without_a_graph_break(packed: bool) -> None:
    ends = torch.tensor([0, 0, 9, 20]) if packed else None
    given = inputs_of(20, batch=1 if packed else 2, sequences=3 if packed else None)
    given = {name: value.requires_grad_() for name, value in given.items()}
    results = []
    for fn in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        y, state = fn(given, "chunked", ends)
        results.append({"y": y, "final_state": state} | gradients(y, state, given))
    assert_same(results[1], results[0], 1e-13)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("ends", [None, PACKED])
@pytest.mark.parametrize("absent", [(), TENSORS[5:]])
def test_the_plain_operators_pass_opcheck(ends: list[int] | None, absent: tuple[str, ...]) -> None:
    from zoo.ops.selective_scan.plain_path import plain_backward, plain_forward

    packing, sequences = (None, None) if ends is None else (torch.tensor(ends), len(ends) - 1)
    given = inputs_of(41, batch=1, sequences=sequences, absent=absent)
    leaves = [given[name].requires_grad_() if name in given else None for name in TENSORS]
    torch.library.opcheck(plain_forward, (*leaves, packing, True))
    y, final, states = plain_forward(*leaves, packing, True)
    plain = [leaf if leaf is None else leaf.detach() for leaf in leaves]
    torch.library.opcheck(plain_backward, (torch.ones_like(y), torch.ones_like(final), states, *plain, packing, True))


@pytest.mark.usefixtures("short_chunks")
def test_inputs_and_cotangents_need_not_be_contiguous() -> None:
    given = inputs_of(20)
    turned = {
        name: value.transpose(0, -1).contiguous().transpose(0, -1) if value.dim() > 1 else value
        for name, value in given.items()
    }
    assert_same(run(turned, "chunked"), run(given, "chunked"))


def test_the_flop_counter_sees_both_directions() -> None:
    given = {name: value.requires_grad_() for name, value in inputs_of(40).items()}
    with FlopCounterMode(display=False) as counter:
        y, _ = call(given, "chunked")
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == flops(2, 40, 6, 5) == 6 * 2 * 40 * 6 * 5
    assert counter.get_total_flops() - forward == backward_flops(2, 40, 6, 5)


def test_the_choice_is_recorded_once() -> None:
    with record_dispatch() as record:
        call(inputs_of(3), "auto")
    assert [(entry.op, entry.backend) for entry in record] == [("selective_scan", "chunked")]
    assert "float64" in record[0].reasons["triton"] or "cpu" in record[0].reasons["triton"]


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"dt": torch.ones(2, 5, 6)}, ShapeError, r"dt has shape \[2, 5, 6\], wanted \[B=2, T=6, E=6\]"),
        ({"A": torch.ones(6, 4)}, ShapeError, r"A has shape \[6, 4\], wanted \[E=6, N=5\]"),
        ({"C": torch.ones(2, 6, 1, 5).double()}, ShapeError, "C has shape"),
        ({name: torch.ones(2, 6, 4, 5).double() for name in "BC"}, ShapeError, "multiple of the G=4 groups"),
        ({"initial_state": torch.ones(1, 6, 5)}, ShapeError, "initial_state has shape"),
        ({"D": torch.ones(6, 1)}, ShapeError, "D has shape"),
        ({"B": torch.ones(2, 6, 2, 5)}, DtypeError, r"B is torch\.float32, x is torch\.float64"),
        ({"z": torch.ones(2, 6, 6)}, DtypeError, r"z is torch\.float32"),
        ({"x": torch.ones(2, 6, 6).long()}, DtypeError, r"x is torch\.int64"),
        ({"cu_seqlens": torch.tensor([0, 6])}, PackingError, "has batch 2"),
        ({"backend": "chunkd"}, BackendError, "did you mean chunked"),
        ({"backend": "triton"}, BackendError, "triton: "),
    ],
)
def test_bad_inputs_are_refused_in_words(changes: dict[str, object], error: type[Exception], told: str) -> None:
    given: dict[str, object] = {**inputs_of(6), **changes}
    positional = [given.pop(name) for name in TENSORS[:5]]
    with pytest.raises(error, match=told):
        selective_scan(*positional, **given)  # type: ignore[arg-type]
