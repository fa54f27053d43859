"""SSD forward by walks along segments: sequences too few to fill the device are cut, and walked from several places.

A segment begins from the state that its tokens before it leave. What each of them brings is summed in pieces, side by
side, and carried from piece to piece; chunks whose decay up to the next segment underflows are not read. How many those
are depends on the time steps, so a head that forgets costs next to nothing here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.ops.kernels.devices import on_device
from zoo.ops.kernels.launcher import launched
from zoo.ops.kernels.rows import cdiv, next_power_of_2
from zoo.ops.semiseparable.kernels.chunks import Chunks, chunks_of, decay_sums
from zoo.ops.semiseparable.kernels.launch import OPERANDS, flat
from zoo.ops.semiseparable.kernels.walk import chunk_tile, mixed
from zoo.ops.semiseparable.kernels.walk_launch import Decays, State, blocks_for, walk
from zoo.ops.ssd.kernels import march_launch
from zoo.ops.ssd.kernels import walk as whole

FORGOTTEN = tl.constexpr(-152.0)  # log2 of a factor that is 0 in float32 however sums of decays are rounded
SCANNED = tl.constexpr(128)  # decays of chunks looked at together

FULL = 264  # walks side by side: two on each of 132 multiprocessors
MOST = 16  # segments of a sequence, where fewer do not fill the device either
SHORTEST = 1024  # tokens of a segment; three launches more are worth no less
GAIN = 0.8  # of the time without segments; more than that is not worth the pieces
PIECE = {"tokens": 2048, "tile": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3}  # tokens of a piece, of a step


def segments_for(walks: int, tokens: int) -> int:
    """Segments to cut each sequence into. walks: programs without; tokens: of a sequence, on average.

    Walks take as long as there are rounds of FULL of them, each as long as a segment.
    """

    def rounds(segments: int) -> float:
        return cdiv(walks * segments, FULL) / segments

    most = min(tokens // SHORTEST, max(MOST, FULL // max(walks, 1)))
    best = min(range(1, max(most, 1) + 1), key=lambda n: (rounds(n) * (1.0 + 0.01 * n), n))
    return best if rounds(best) <= GAIN * rounds(1) else 1


@triton.jit
def _place(sequence, first_ptr, cu_ptr, T, PER_SEQUENCE, PACKED: tl.constexpr):
    """Of a sequence: the first chunk, the number of chunks (int64), the first token (int64), the number of tokens."""
    if PACKED:
        slot = tl.load(first_ptr + sequence)
        chunks = (tl.load(first_ptr + sequence + 1) - slot).to(tl.int64)
        start = tl.load(cu_ptr + sequence).to(tl.int64)
        tokens = (tl.load(cu_ptr + sequence + 1).to(tl.int64) - start).to(tl.int32)
    else:
        slot = sequence * PER_SEQUENCE
        chunks = PER_SEQUENCE.to(tl.int64)
        start = sequence.to(tl.int64) * T
        tokens = T
    return slot, chunks, start, tokens


@triton.jit
def _felt(s_ptr, begin, stop, edge, Q: tl.constexpr):
    """Of the chunks from `begin` to `stop`: the first that is felt at `edge`, and the sum of log2 decays of all.

    Decays of either sign: a chunk that is felt may lie before some that are not. NaN is felt.
    """
    reach = 0.0
    own = 0.0
    alive = stop
    for back in range(0, (edge - begin + SCANNED - 1) // SCANNED):
        at = edge - 1 - back * SCANNED - tl.arange(0, SCANNED)
        e = tl.load(s_ptr + at.to(tl.int64) * Q + Q - 1, mask=at >= begin, other=0.0)
        behind = reach + tl.cumsum(e, 0) - e  # from the end of the chunk to the edge
        here = tl.where(at >= begin, at, stop) < stop
        alive = tl.minimum(alive, tl.min(tl.where(behind <= FORGOTTEN, stop, tl.where(here, at, stop)), 0))
        own += tl.sum(tl.where(here, e, 0.0), 0)
        reach += tl.sum(e, 0)
    return alive, own


@launched(do_not_specialize=["T", "PER_SEQUENCE", "COUNT", "SEGMENTS", "FINER"])
def pieces_kernel(
    x_ptr, B_ptr, s_ptr, r_ptr, first_ptr, cu_ptr,  # [BT,H,P] [BT,G,N] [H,count,Q] twice, int [S+1] twice if packed
    ends_ptr, decay_ptr, read_ptr,  # [S (SEGMENTS-1) FINER,H,P,N], float32 and int32 of the same without P and N
    T, PER_SEQUENCE, COUNT, SEGMENTS, FINER, x_t, x_h, B_t, B_h,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    Q: tl.constexpr, JOINED: tl.constexpr, OPERAND: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What the tokens of a piece bring into the state at its end; one program owns a tile of it for one head.

    JOINED chunks at a time enter the state. decay: the sum of log2 decays of the piece. read: how many of its chunks
    are felt at the end of the segment; the others are left out, and with none nothing is written. The last segment of a
    sequence has no pieces.
    """
    across: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    blocks: tl.constexpr = ((N + BLOCK_N - 1) // BLOCK_N) * across
    block = tl.program_id(0) % blocks
    h = tl.program_id(0) // blocks % H
    piece = tl.program_id(0) // (blocks * H)
    inner = (SEGMENTS - 1) * FINER
    sequence = piece // inner
    place = piece % inner
    slot, chunks, start, tokens = _place(sequence, first_ptr, cu_ptr, T, PER_SEQUENCE, PACKED)
    parts = SEGMENTS * FINER
    begin = (chunks * place // parts).to(tl.int32)
    stop = (chunks * (place + 1) // parts).to(tl.int32)
    edge = (chunks * (place // FINER + 1) // SEGMENTS).to(tl.int32)  # the end of the segment
    sums = (h.to(tl.int64) * COUNT + slot) * Q

    alive, own = _felt(s_ptr + sums, begin, stop, edge, Q)
    n = block // across * BLOCK_N + tl.arange(0, BLOCK_N)
    p = block % across * BLOCK_P + tl.arange(0, BLOCK_P)
    step = tl.arange(0, Q * JOINED)
    state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    x_ptr += h.to(tl.int64) * x_h
    B_ptr += (h // (H // G)).to(tl.int64) * B_h
    behind = 0.0  # log2 decay from the end of the tile to the end of the piece
    ahead = tl.load(s_ptr + sums + tl.maximum(stop - 1, 0).to(tl.int64) * Q + Q - 1)  # fetched early, see below
    for count in range(0, (stop - alive + JOINED - 1) // JOINED):
        chunk = stop - (count + 1) * JOINED
        token = chunk * Q + step
        wanted = (token >= alive * Q) & (token < tl.minimum(tokens, stop * Q))
        first = start + chunk * Q
        key = chunk_tile(B_ptr, first, B_t, n, wanted, N, Q * JOINED, BLOCK_N)
        value = chunk_tile(x_ptr, first, x_t, p, wanted, P, Q * JOINED, BLOCK_P)
        at = sums + chunk.to(tl.int64) * Q
        if JOINED == 1:
            behind += ahead
            ahead = tl.load(s_ptr + at - tl.where(chunk > 0, Q, 0) + Q - 1)
            after = behind
        else:
            after = tl.zeros([Q * JOINED], tl.float32) + behind
            for c in tl.static_range(0, JOINED):
                e = tl.load(s_ptr + at + tl.maximum(c, alive - chunk) * Q + Q - 1)
                e = tl.where(chunk + c >= alive, e, 0.0)
                after += tl.where(step // Q <= c, e, 0.0)
                behind += e
        r = tl.load(r_ptr + at + step, mask=wanted, other=0.0)
        state = mixed(tl.trans(key), value * tl.exp2(after - r)[:, None], state, OPERAND)

    at = piece.to(tl.int64) * H + h
    if block == 0:
        tl.store(decay_ptr + at, own)
        tl.store(read_ptr + at, stop - alive)
    if alive < stop:
        tile = ends_ptr + (at * P + p[None, :]) * N + n[:, None]
        tl.store(tile, state, mask=(n < N)[:, None] & (p < P)[None, :])


@launched(do_not_specialize=["T", "PER_SEQUENCE", "SEGMENTS", "FINER"])
def carry_kernel(
    ends_ptr, decay_ptr, read_ptr, start_ptr, first_ptr, cu_ptr,  # as above; [S,H,P,N]
    states_ptr, bounds_ptr, slots_ptr,  # -> [S SEGMENTS,H,P,N], int64 [S SEGMENTS + 1], int32 [S SEGMENTS]
    T, PER_SEQUENCE, SEGMENTS, FINER,
    H: tl.constexpr, N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
    HAS_START: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The states in which segments begin, and where that is; one program owns BLOCK elements of one head."""
    blocks: tl.constexpr = (N * P + BLOCK - 1) // BLOCK
    h = tl.program_id(0) // blocks % H
    sequence = tl.program_id(0) // (blocks * H)
    f = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inner = (SEGMENTS - 1) * FINER
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_START:
        begin = (sequence.to(tl.int64) * H + h) * (N * P)
        state = tl.load(start_ptr + begin + f, mask=f < N * P, other=0.0)
    slot, chunks, token, tokens = _place(sequence, first_ptr, cu_ptr, T, PER_SEQUENCE, PACKED)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(bounds_ptr + (sequence + 1) * SEGMENTS, token + tokens)
    for segment in range(0, SEGMENTS):
        begin = chunks * segment // SEGMENTS
        index = sequence * SEGMENTS + segment
        if tl.program_id(0) % (blocks * H) == 0:
            tl.store(slots_ptr + index, slot + begin.to(tl.int32))
            tl.store(bounds_ptr + index, token + tl.minimum(begin * Q, tokens))
        tl.store(states_ptr + (index.to(tl.int64) * H + h) * (N * P) + f, state, mask=f < N * P)
        if segment + 1 < SEGMENTS:
            for part in range(0, FINER):
                at = (sequence * inner + segment * FINER + part).to(tl.int64) * H + h
                live = tl.where(f < N * P, tl.load(read_ptr + at), 0) > 0
                brought = tl.load(ends_ptr + at * (N * P) + f, mask=live, other=0.0)
                state = state * tl.exp2(tl.load(decay_ptr + at)) + brought


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    has_softplus: bool, limits: tuple[float, float], start: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B,T,H,P] and the final state [S,H,P,N], float32. A, D, dt_bias: float32 [H]; start: float32 [S,H,P,N].

    x, B and C are of one half precision dtype, N is a multiple of 16, time steps are not negative. In whole sequences
    where those are enough. A value that is not finite is felt as far as its decay does not underflow.
    """
    marched = march_launch.serves(x, B)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    segments = segments_for(sequences * programs(x, B), x.shape[0] * x.shape[1] // max(sequences, 1))
    if segments == 1:
        return whole.forward(x, dt, A, B, C, D, dt_bias, has_softplus, limits, start, cu_seqlens)
    x, B, C = flat(x), flat(B), flat(C)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ends = torch.empty((sequences * segments, *x.shape[2:], B.shape[3]), dtype=torch.float32, device=x.device)
    with on_device(x):
        if marched:
            blocks = march_launch.blocks_for(B.shape[3])
            chunks = chunks_of(x, cu_seqlens, blocks.chunk)
            made = march_launch.before(chunks, dt, A, B, C, dt_bias, has_softplus, limits, blocks.scores)
            begins, bounds, slots = states(chunks, x, B, made.s, made.r, start, cu_seqlens, segments, PIECE)
            march_launch.march(x, B, C, made, D, begins, bounds, slots, march_launch.whole(chunks), y, ends, blocks)
        else:
            chunks = chunks_of(x, cu_seqlens, blocks_for(x.dtype, B.shape[3]).chunk)
            s, r = decay_sums(chunks, dt, A, dt_bias, has_softplus, limits)
            begins, bounds, slots = states(chunks, x, B, s, r, start, cu_seqlens, segments, PIECE)
            walk(C, B, x, y, bounds, decays=Decays(s, r, slots), skip=D, start=State(begins.mT), end=State(ends.mT))
        return y, ends.unflatten(0, (sequences, segments))[:, -1].contiguous()


def programs(x: Tensor, B: Tensor) -> int:
    """Of a walk, or of a march, along one sequence."""
    (heads, channels), (groups, modes) = x.shape[2:], B.shape[2:]
    if march_launch.serves(x, B):
        return march_launch.programs(march_launch.blocks_for(modes), heads, groups, channels)
    return heads * cdiv(channels, blocks_for(x.dtype, modes).channels)


def states(
    chunks: Chunks, x: Tensor, B: Tensor, s: Tensor, r: Tensor, start: Tensor | None, cu_seqlens: Tensor | None,
    segments: int, options: dict[str, int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """States in which segments begin, float32 [S segments,H,P,N]; their bounds in tokens, int64 [S segments + 1]; the
    slots of their first chunks, int32 [S segments]. start: float32 [S,H,P,N], contiguous. segments: 2 or more."""
    (heads, channels), (groups, modes) = x.shape[2:], B.shape[2:]
    sequences, size, device = chunks.sequences, chunks.size, x.device
    finer = max(1, cdiv(chunks.count // sequences * size, segments * options["tokens"]))
    pieces = sequences * (segments - 1) * finer
    ends = torch.empty(pieces, heads, channels, modes, dtype=torch.float32, device=device)
    decay = torch.empty(pieces, heads, dtype=torch.float32, device=device)
    read = torch.empty(pieces, heads, dtype=torch.int32, device=device)
    block_n, block_p = min(options["BLOCK_N"], next_power_of_2(modes)), blocks_for(x.dtype, modes).channels
    block_p = min(block_p, max(16, next_power_of_2(channels)))
    first, cu = (chunks.first, cu_seqlens) if chunks.packed else (None, None)
    pieces_kernel[(pieces * heads * cdiv(modes, block_n) * cdiv(channels, block_p),)](
        x, B, s, r, first, cu, ends, decay, read,
        chunks.tokens, chunks.per_sequence, chunks.count, segments, finer, *x.stride()[1:3], *B.stride()[1:3],
        H=heads, G=groups, N=modes, P=channels, BLOCK_N=block_n, BLOCK_P=block_p,
        Q=size, JOINED=max(1, options["tile"] // size), OPERAND=OPERANDS[x.dtype], PACKED=chunks.packed,
        num_warps=options["num_warps"], num_stages=options["num_stages"],
    )  # fmt: skip
    begins = torch.empty(sequences * segments, heads, channels, modes, dtype=torch.float32, device=device)
    bounds = torch.empty(sequences * segments + 1, dtype=torch.int64, device=device)
    slots = torch.empty(sequences * segments, dtype=torch.int32, device=device)
    block = min(1024, next_power_of_2(modes * channels))
    carry_kernel[(sequences * heads * cdiv(modes * channels, block),)](
        ends, decay, read, start, first, cu, begins, bounds, slots,
        chunks.tokens, chunks.per_sequence, segments, finer,
        H=heads, N=modes, P=channels, Q=size, BLOCK=block,
        HAS_START=start is not None, PACKED=chunks.packed, num_warps=4,
    )  # fmt: skip
    return begins, bounds, slots
