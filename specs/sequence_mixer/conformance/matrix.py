"""SM-7: the mixing matrix reproduces the output and has the structure that is declared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sequence_mixer.conformance.catalogue import CheckSkipped, check, declares
from sequence_mixer.conformance.comparing import compare
from sequence_mixer.conformance.probes import Subject
from sequence_mixer.definition import (
    Capabilities,
    LowRank,
    Masked,
    OneSemiseparable,
    RowStochastic,
    Semiseparable,
    Structure,
    Toeplitz,
)
from sequence_mixer.mixer import MatrixForm, SequenceMixer

ZERO = 1e-10  # a singular value or an entry below this share of the largest counts as zero, in float64
LONGEST = 280  # tokens; a rank that no block of so long a matrix exceeds cannot be tested

with_matrix = declares("matrix_form")


def has(kind: type) -> Callable[[Capabilities], bool]:
    """Rule: `matrix_form` and a structure of this kind are declared."""
    return lambda able: able.matrix_form and any(isinstance(structure, kind) for structure in able.structures)


def declared(subject: Subject, kind: type[Structure]) -> list[Structure]:
    """Declared structures of one kind."""
    return [structure for structure in subject.capabilities.structures if isinstance(structure, kind)]


def form_of(subject: Subject, tokens: int, seed: int = 1) -> MatrixForm:
    """Matrix form on a random input of batch 1, built without autograd's graph."""
    with torch.no_grad():
        return subject.build().matrix_form(subject.input(1, tokens, seed=seed))


def matrices(form: MatrixForm, most: int = 4) -> Tensor:
    """Matrices of the first heads, [h,T,T], detached."""
    with torch.no_grad():
        return form.heads(slice(0, min(most, form.n_heads)))[0].detach()


def numerical_rank(block: Tensor) -> int:
    """Singular values above ZERO times the largest."""
    values = torch.linalg.svdvals(block.double().cpu())
    return int((values > ZERO * values.max()).sum()) if values.numel() and float(values.max()) > 0 else 0


@check("SM-7", applies=with_matrix, precision="both")
def check_the_matrix_form_reproduces_the_output(subject: Subject) -> None:
    """finish(M v) is forward(x), with the shapes of the contract, by slices of heads as well."""
    tokens = subject.length(23)

    def applied(at: Subject, mixer: SequenceMixer) -> dict[str, Tensor]:
        form = mixer.matrix_form(at.input(2, tokens))
        heads, matrix = form.n_heads, form.matrix.detach()
        wanted = [2, heads, tokens, tokens]
        at.require(list(matrix.shape) == wanted, f"matrix is {list(matrix.shape)}, wanted {wanted}")
        sizes = list(form.values.shape)
        at.require(len(sizes) == 4 and sizes[:3] == [2, tokens, heads], f"values is {sizes}, wanted [2,T,H,P]")
        last = form.heads(slice(heads - 1, heads)).detach()
        worst = float((last - matrix[:, heads - 1 :]).abs().max())
        at.require(worst <= 1e-6 * float(matrix.abs().max()), f"heads(last) differs from matrix by {worst:.2e}")
        return {"output": form.apply().detach()}

    compare(subject, "matrix_form", applied, lambda at, mixer: {"output": mixer(at.input(2, tokens)).detach()})


@check("SM-7", applies=declares("matrix_form", "causal"))
def check_a_causal_matrix_is_lower_triangular(subject: Subject) -> None:
    """M_ij = 0 for j > i, exactly."""
    matrix = matrices(form_of(subject, subject.length(24)))
    worst = float(matrix.triu(1).abs().max())
    subject.require(worst == 0.0, f"an entry above the diagonal is {worst:.2e}")


@check("SM-7", applies=with_matrix)
def check_the_matrix_depends_on_the_input_as_declared(subject: Subject) -> None:
    """Two inputs give two matrices if data_dependent is declared, and one matrix if it is not."""
    subject.needs_tokens(2)
    tokens = subject.length(16)
    one, two = (matrices(form_of(subject, tokens, seed)) for seed in (1, 2))
    differs = float((one - two).abs().max()) > 1e-9 * float(one.abs().max())
    wanted = subject.capabilities.data_dependent
    subject.require(differs == wanted, f"data_dependent={wanted}, but the matrices of two inputs {_say(differs)}")


def _say(differs: bool) -> str:
    return "differ" if differs else "are the same"


@check("SM-7", applies=has(Semiseparable))
def check_strictly_lower_blocks_have_the_declared_rank(subject: Subject) -> None:
    """Every strictly lower block M[i:, :i] of a Semiseparable(r) matrix has rank at most r."""
    for structure in declared(subject, Semiseparable):
        rank = structure.rank  # type: ignore[union-attr]
        matrix = matrices(form_of(subject, _long_enough(subject, 2 * (rank + 1))), most=2)
        tokens = matrix.shape[-1]
        for cut in sorted({tokens // 2, rank + 1, tokens - rank - 1}):
            for head, each in enumerate(matrix):
                found = numerical_rank(each[cut:, :cut])
                subject.require(found <= rank, f"head {head}: M[{cut}:, :{cut}] has rank {found}, declared {rank}")


@check("SM-7", applies=has(LowRank))
def check_the_matrix_has_the_declared_low_rank(subject: Subject) -> None:
    """A LowRank(r) matrix has rank at most r."""
    for structure in declared(subject, LowRank):
        rank = structure.rank  # type: ignore[union-attr]
        for head, each in enumerate(matrices(form_of(subject, _long_enough(subject, rank + 1)), most=2)):
            found = numerical_rank(each)
            subject.require(found <= rank, f"head {head}: the matrix has rank {found}, declared {rank}")


@check("SM-7", applies=has(Toeplitz))
def check_a_toeplitz_matrix_depends_on_the_distance_only(subject: Subject) -> None:
    """M_ij = M_i+1,j+1 for a Toeplitz matrix."""
    subject.needs_tokens(3)
    matrix = matrices(form_of(subject, subject.length(24)))
    worst = float((matrix[:, 1:, 1:] - matrix[:, :-1, :-1]).abs().max())
    subject.require(worst <= ZERO * float(matrix.abs().max()), f"entries of one diagonal differ by {worst:.2e}")


@check("SM-7", applies=has(Masked))
def check_masked_factors_give_the_matrix(subject: Subject) -> None:
    """M = mask o (left right^T) + diag(skip), factors no wider than declared, the mask of the declared kind."""
    subject.needs_tokens(3)
    form = form_of(subject, subject.length(24))
    factors = form.factors
    if factors is None:
        subject.fail("a Masked structure is declared and matrix_form has no factors")
        return
    which = slice(0, min(4, form.n_heads))
    with torch.no_grad():
        matrix, mask = form.heads(which)[0], factors.mask(which)[0]
        product = mask * torch.einsum("thr,shr->hts", factors.left[0, :, which], factors.right[0, :, which])
        if factors.skip is not None:
            product = product + torch.diag_embed(factors.skip[0, :, which].transpose(0, 1))
    worst = float((product - matrix).abs().max())
    subject.require(worst <= ZERO * float(matrix.abs().max()), f"the factors miss the matrix by {worst:.2e}")
    for structure in declared(subject, Masked):
        rank, width = structure.rank, factors.left.shape[-1]  # type: ignore[union-attr]
        subject.require(width <= rank, f"the factors are {width} wide, declared {rank}")
        _expect_mask(subject, mask, structure.mask)  # type: ignore[union-attr]


def _expect_mask(subject: Subject, mask: Tensor, kind: Toeplitz | OneSemiseparable) -> None:
    """mask [h,T,T]."""
    subject.require(float(mask.triu(1).abs().max()) == 0.0, "the mask is not causal")
    if isinstance(kind, Toeplitz):
        worst = float((mask[:, 1:, 1:] - mask[:, :-1, :-1]).abs().max())
        subject.require(worst <= ZERO * float(mask.abs().max()), f"the mask is not Toeplitz, by {worst:.2e}")
        return
    diagonal = float((mask.diagonal(dim1=1, dim2=2) - 1).abs().max())
    subject.require(diagonal <= ZERO, f"the diagonal of a one-semiseparable mask is 1, here off by {diagonal:.2e}")
    tokens = mask.shape[-1]
    for middle in (tokens // 3, tokens // 2):
        chained = mask[:, middle:, middle, None] * mask[:, None, middle, : middle + 1]
        worst = float((chained - mask[:, middle:, : middle + 1]).abs().max())
        subject.require(worst <= ZERO, f"L_ij L_jk = L_ik fails at j={middle} by {worst:.2e}")


@check("SM-7", applies=has(RowStochastic))
def check_rows_are_weights_that_sum_to_one(subject: Subject) -> None:
    """Entries of a RowStochastic matrix are at least 0, and rows sum to 1 up to the config's eps."""
    matrix = matrices(form_of(subject, subject.length(24)))
    lowest = float(matrix.min())
    subject.require(lowest >= 0.0, f"an entry is {lowest:.2e}, below 0")
    allowed = 1e-9 + 10.0 * float(getattr(subject.config, "eps", 0.0))
    worst = float((matrix.sum(-1) - 1).abs().max())
    subject.require(worst <= allowed, f"a row sums to 1 only up to {worst:.2e} (allowed {allowed:.2e})")


def _long_enough(subject: Subject, least: int) -> int:
    """Tokens for a matrix whose blocks can exceed the rank; skips where there are none."""
    tokens = max(24, least)
    if tokens > LONGEST:
        raise CheckSkipped(f"only a matrix of {tokens} tokens could exceed the declared rank; longest tried {LONGEST}")
    subject.needs_tokens(tokens)
    return tokens
