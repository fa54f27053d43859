"""Matrix-product FLOPs of LTI attention in chunks."""

from __future__ import annotations

from zoo.ops.lti.cost import flops as scan_flops

CHUNK = 64  # tokens of a chunk where heads are narrow
CHUNKS = (64, 1024)  # least and most tokens of a chunk
NARROW = 8  # channels of a head up to which P^2 products of every token cost less than the scores of a chunk


def flops(
    batch: int, tokens: int, heads: int, width: int, modes: int, *, chunk: int | None = None, narrow: int = NARROW
) -> int:
    """FLOPs of the forward from an empty state, 2 per multiply-add: 2 B T H (K I + 2 M P^2 [+ 2 M P^2 if T > K]).

    K = min(chunk, T) tokens of a chunk (None: that of the plain path), P = width, M = modes (complex, N = 2 M). The
    terms: what happens inside a chunk, I = 2 P for scores and their product with the values, I = P^2 for the products
    k_a v_b of heads up to `narrow` channels; what a chunk adds to the state; what later chunks read from it. One token
    (T = 1) multiplies no matrices but reads q^T S, 2 B H P^2. Heads of one channel (P = 1) have the FLOPs of `lti_scan`
    beyond one token.
    """
    chunk = plain_chunk(modes, width, tokens) if chunk is None else chunk
    if width == 1 and tokens > 1:
        return scan_flops(batch, tokens, heads, modes, chunk=chunk)
    span = min(chunk, tokens)
    if tokens == 1:
        return 2 * batch * heads * width * width
    state = 2 * modes * width * width * (2 if tokens > span else 1)
    inside = width * width if width <= narrow else 2 * width
    return 2 * batch * tokens * heads * (span * inside + state)


def plain_chunk(modes: int, width: int, tokens: int) -> int:
    """Tokens of a chunk in PyTorch; with short ones, states of wide heads, N P^2 numbers each, would fill memory."""
    return CHUNK if width <= NARROW else kernel_chunk(modes, width, tokens)


def kernel_chunk(modes: int, width: int, tokens: int) -> int:
    """Tokens of a chunk with scores: as many as make the state, 2 M P^2 numbers, as large as their keys and values."""
    shortest, longest = CHUNKS
    balanced = 1 << max(modes * width - 1, 1).bit_length()
    needed = 1 << max(tokens - 1, 1).bit_length()
    return max(shortest, min(longest, balanced, needed))


def kernel_flops(batch: int, tokens: int, heads: int, width: int, modes: int) -> int:
    """`flops` of the Triton kernels: scores for heads of every width, and longer chunks for wider states."""
    chunk = CHUNK if width == 1 else kernel_chunk(modes, width, tokens)
    return flops(batch, tokens, heads, width, modes, chunk=chunk, narrow=0)


def backward_flops(batch: int, tokens: int, heads: int, width: int, modes: int, *, chunk: int = CHUNK) -> int:
    """FLOPs of the kernels' backward: eight products inside a chunk; two states, three reads, two table gradients."""
    span = min(chunk, tokens)
    return 2 * batch * tokens * heads * (8 * span * width + 7 * 2 * modes * width * width)
