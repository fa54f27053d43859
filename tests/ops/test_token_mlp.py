"""The token MLP: the plain path against the definition, recorded cases, triangles, and words for bad inputs."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo.ops.dispatch import record_dispatch
from zoo.ops.token_mlp import ACTIVATIONS, flops, token_mlp

from golden import load_case
from sequence_mixer.conformance.budget import judge, relative_rms
from sequence_mixer.errors import BackendError, ConfigError, DtypeError, ShapeError

PATHS = ("reference", "chunked")
CASES: dict[str, tuple[dict, dict]] = {
    "one-token": ({"tokens": 1}, {}),
    "all-of-the-weights": ({"tokens": 19}, {}),
    "longer-weights": ({"tokens": 11, "length": 19}, {"activation": "gelu_erf"}),
    "no-biases": ({"tokens": 19, "bias": False}, {}),
    "causal": ({"tokens": 19, "hidden": 19}, {"causal": True}),
    "causal-longer": ({"tokens": 11, "length": 19, "hidden": 19}, {"causal": True, "activation": "gelu_erf"}),
    "causal-no-biases": ({"tokens": 19, "hidden": 19, "bias": False}, {"causal": True}),
}


def draw(*, tokens: int, length: int | None = None, hidden: int = 7, bias: bool = True) -> list[Tensor | None]:
    """x, w1, b1, w2, b2 in float64."""
    length = length or tokens
    make = lambda *sizes: torch.randn(*sizes, dtype=torch.float64)
    w1, w2 = make(hidden, length) * length**-0.5, make(length, hidden) * hidden**-0.5
    return [make(3, tokens, 10), w1, make(hidden) if bias else None, w2, make(length) if bias else None]


def cast(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def run(backend: str, tensors: list[Tensor | None], cotangent: Tensor, **options) -> list[Tensor]:
    """y and the gradients of x and every weight."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = token_mlp(*leaves, backend=backend, **options)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], cotangent.to(y.dtype))]


@pytest.mark.parametrize("name", ["mlp_mixer_token", "mlp_mixer_token_tanh"])
@pytest.mark.parametrize("backend", PATHS)
def test_recorded_layers_come_back(name: str, backend: str):
    case = load_case(name)
    weights = case.parameters()
    tensors = [case.tensors["x"]] + [weights[f"mlp_tokens.fc{n}.{kind}"] for n in (1, 2) for kind in ("weight", "bias")]
    y, dx, *_ = run(backend, tensors, case.tensors["w"], activation=case.config["act"])
    assert relative_rms(y, case.tensors["y_mlp"]) < 1e-10
    assert relative_rms(dx, case.tensors["grad_x_mlp"]) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_the_plain_path_equals_the_definition(name: str):
    sizes, options = CASES[name]
    tensors = draw(**sizes)
    cotangent = torch.randn(3, sizes["tokens"], 10, dtype=torch.float64)
    exact, ours = (run(backend, tensors, cotangent, **options) for backend in PATHS)
    for value, wanted in zip(ours, exact, strict=True):
        verdict = judge(value, wanted, None, torch.float64)
        assert verdict.ok, verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["all-of-the-weights", "causal-longer"])
def test_narrow_dtypes_err_as_their_rounding_explains(name: str, dtype: torch.dtype):
    sizes, options = CASES[name]
    tensors = cast(draw(**sizes), dtype)
    cotangent = torch.randn(3, sizes["tokens"], 10).to(dtype)
    exact = run("reference", cast(tensors, torch.float64), cotangent.double(), **options)
    for value, wanted in zip(run("chunked", tensors, cotangent, **options), exact, strict=True):
        assert value.dtype == dtype
        assert relative_rms(value, wanted) < {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_is_the_one_that_is_named(activation: str):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64).view(1, 1, 101)
    one = torch.ones(1, 1, dtype=torch.float64)
    wanted = torch.nn.functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    for backend in PATHS:
        y = token_mlp(x, one, None, one, None, activation=activation, backend=backend)
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", PATHS)
def test_triangles_are_causal_and_the_unused_halves_get_no_gradient(backend: str):
    tensors = draw(tokens=9, hidden=9)
    x = tensors[0]
    assert x is not None
    y = token_mlp(*tensors, causal=True, backend=backend)
    changed = torch.cat([x[:, :4], 100 * torch.randn_like(x[:, 4:])], 1)
    assert torch.equal(token_mlp(changed, *tensors[1:], causal=True, backend=backend)[:, :4], y[:, :4])
    shorter = token_mlp(x[:, :4], *tensors[1:], causal=True, backend=backend)
    torch.testing.assert_close(shorter, y[:, :4])
    _, _, dw1, _, dw2, _ = run(backend, tensors, torch.randn_like(y), causal=True)
    for gradient in (dw1, dw2):
        assert bool((gradient.triu(1) == 0).all())
        assert bool((gradient.tril()[1:] != 0).any(1).all())


def test_no_tokens_are_served():
    tensors = draw(tokens=5)
    assert tensors[0] is not None
    assert token_mlp(tensors[0][:, :0], *tensors[1:]).shape == (3, 0, 10)


def test_double_backward_is_that_of_the_definition():
    tensors = [t.requires_grad_() for t in draw(tokens=3, hidden=2) if t is not None]
    tensors[0] = tensors[0][..., :2].detach().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *given: token_mlp(*given, backend="reference"), tensors)


def test_the_flop_counter_agrees_with_the_formula():
    with FlopCounterMode(display=False) as counter:
        token_mlp(*draw(tokens=19), backend="chunked")
    assert counter.get_total_flops() == flops(3, 19, 10, 7)


def test_autocast_and_weights_of_another_dtype_keep_that_of_x():
    tensors = cast(draw(tokens=5), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert token_mlp(*tensors).dtype == torch.float32
    assert tensors[0] is not None
    assert token_mlp(tensors[0].bfloat16(), *tensors[1:]).dtype == torch.bfloat16


def test_bad_inputs_are_refused_in_words():
    x, w1, b1, w2, b2 = draw(tokens=6)
    assert x is not None
    assert w1 is not None
    with pytest.raises(ShapeError, match=r"w1 has shape \[7, 5\], wanted \[E, K\] with K >= T=6"):
        token_mlp(x, w1[:, :5], None, w1[:, :5].T, None)
    with pytest.raises(ShapeError, match=r"w2 has shape \[7, 6\], wanted \[K=6, E=7\]"):
        token_mlp(x, w1, b1, w1, b2)
    with pytest.raises(ShapeError, match="b2 has shape"):
        token_mlp(x, w1, b1, w2, b1)
    with pytest.raises(ShapeError, match="at least one hidden unit"):
        token_mlp(x, w1[:0], None, w1[:0].T, None)
    with pytest.raises(ShapeError, match="as many hidden units as tokens"):
        token_mlp(x, w1, b1, w2, b2, causal=True)
    with pytest.raises(ConfigError, match="gelu_tanh, gelu_erf"):
        token_mlp(x, w1, b1, w2, b2, activation="gelu")
    with pytest.raises(DtypeError, match=r"w1 is torch\.int64"):
        token_mlp(x, w1.long(), b1, w2, b2)
    with pytest.raises(BackendError, match="runs on cuda"):
        token_mlp(x.float(), w1, b1, w2, b2, backend="triton")
    with record_dispatch() as record:
        token_mlp(x, w1, b1, w2, b2)
    assert (record[0].backend, list(record[0].reasons)) == ("chunked", ["triton"])
