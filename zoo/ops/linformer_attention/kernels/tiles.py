"""Sizes of tiles, and how many programs share a sum over the length."""

from __future__ import annotations

PROGRAMS = 264  # two for each multiprocessor of an H100 or H200; a sum over the length is split until there are as many


def power_of_two(size: int) -> int:
    """Edge of a tile that holds `size`: a power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def split_length(tokens: int, programs: int, block: int) -> tuple[int, int]:
    """(parts, tokens per part) of a sum over `tokens` that `programs` programs would do whole.

    A part is a multiple of `block`, and four blocks at least, so that its result is worth writing.
    """
    wanted = max(1, min(-(-PROGRAMS // programs), tokens // (4 * block)))
    span = -(-tokens // (wanted * block)) * block
    return -(-tokens // span), span


def project_tiles(rank: int, channels: int, element_size: int) -> dict[str, int]:
    """Tiles [BLOCK_R,BLOCK_N] of E k, BLOCK_T tokens a step."""
    edge = 128 if element_size == 2 else 64
    block_r, block_n = min(edge, power_of_two(rank)), min(edge, power_of_two(channels))
    warps = 8 if block_r * block_n >= 128 * 128 else 4
    steps = (64, 3) if element_size == 2 else (32, 2)
    return {"BLOCK_R": block_r, "BLOCK_N": block_n, "BLOCK_T": steps[0], "num_warps": warps, "num_stages": steps[1]}


def attend_tiles(rank: int, width: int, element_size: int) -> dict[str, int]:
    """Tiles of a program that holds all keys [BLOCK_R,BLOCK_P] for BLOCK_T queries.

    A tile of scores takes at most 64 registers of a thread; with float32 operands, which go through registers, 16.
    """
    block_r, block_p = power_of_two(rank), power_of_two(width)
    if element_size == 2:
        block_t = max(16, min(128, 64 * 256 // max(block_r, block_p)))
        warps = 8 if block_t * block_r >= 64 * 128 else 4
    else:
        block_t, warps = (16, 16) if block_r * block_p > 128 * 64 else (min(32, max(16, 16 * 256 // block_r)), 8)
    return {"BLOCK_T": block_t, "BLOCK_R": block_r, "BLOCK_P": block_p, "num_warps": warps, "num_stages": 2}


def gather_tiles(rank: int, width: int, element_size: int) -> dict[str, int]:
    """Tiles of a program that gathers the gradients of BLOCK_R keys and values over queries, BLOCK_T at a time."""
    block_p = power_of_two(width)
    if element_size == 2:
        edge, warps = (64, 4) if block_p <= 64 else (64, 8) if block_p <= 128 else (32, 8)
    else:
        edge, warps = (32, 8) if block_p <= 64 else (16, 8)
    return {
        "BLOCK_T": edge, "BLOCK_R": min(edge, power_of_two(rank)), "BLOCK_P": block_p,
        "num_warps": warps, "num_stages": 2,
    }  # fmt: skip


MULTIPROCESSORS = 132
HELD = 256 * 64  # elements of keys that a program keeps, beside values, and in the backward two gradients in registers
# queries at a time, warps, stages, programs of a multiprocessor, shortest walk in tiles, parts the keys are met in
FORWARD, BACKWARD = (64, 4, 2, 2, 16, 1), (32, 8, 2, 1, 16, 1)


def holds(rank: int, width: int, element_size: int) -> bool:
    """Whether the kernels that keep all keys of a head serve R=`rank` keys of P=`width` channels: half precision."""
    return element_size == 2 and rank <= 256 and width <= 128 and power_of_two(rank) * power_of_two(width) <= HELD


def held_tiles(
    rank: int, width: int, tokens: int, programs: int, *, backward: bool
) -> tuple[dict[str, int], tuple[int, int], int]:
    """Tiles of those kernels, (BLOCK_R, BLOCK_P) again, and the queries of a program, whole tiles.

    programs: heads of all rows (backward: groups). The forward is split into about four waves, at no cost but loading
    the keys again; the backward only to fill the machine, since its parts are added up.
    """
    block_t, warps, stages, resident, shortest, halves = BACKWARD if backward else FORWARD
    room = MULTIPROCESSORS * resident * (1 if backward else 4)
    wanted = max(1, min(room // programs, tokens // (shortest * block_t)))
    span = -(-tokens // (wanted * block_t)) * block_t
    block_r, block_p = power_of_two(rank), power_of_two(width)
    if backward and block_r * block_p <= HELD // 2:
        warps, halves = 4 if block_r * block_p <= HELD // 4 else warps, 1
    tiles = {"BLOCK_T": block_t, "BLOCK_R": block_r, "BLOCK_P": block_p, "num_warps": warps, "num_stages": stages}
    if backward:
        tiles["HALVES"] = halves
    return tiles, (block_r, block_p), span
