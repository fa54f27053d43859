"""The key/value buffer: in place where nobody can notice, copies everywhere else."""

import copy

import pytest
import torch
from torch import Tensor

from sequence_mixer.errors import DtypeError, PackingError, ShapeError, StateError
from sequence_mixer.kv_buffer import Appended, KeyValueBuffer, append, empty, valid_mask

B, G, P = 2, 3, 4


def fresh(capacity: int = 0, batch: int = B) -> Appended:
    buffers, positions = empty(batch, ((G, P), (G, 2 * P)), capacity=capacity, dtype=torch.float32)
    return Appended(buffers, positions, 0, True)


def tokens(count: int, batch: int = B) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, count, G, P), torch.randn(batch, count, G, 2 * P)


def more(state: Appended, news: tuple[Tensor, ...], *rest: Tensor, **options: object) -> Appended:
    return append(state.buffers, state.positions, news, *rest, **options)  # type: ignore[arg-type]


def holds(state: Appended, rows: list[Tensor], which: int = 0) -> bool:
    """Every row of a buffer has exactly these tokens, and finite values after them."""
    buffer = state.buffers[which]
    for b, row in enumerate(rows):
        if int(state.positions[b]) != row.shape[0] or not torch.equal(buffer[b, : row.shape[0]], row):
            return False
    return bool(buffer.isfinite().all())


def joined(*pieces: tuple[Tensor, ...]) -> list[Tensor]:
    return list(torch.cat([piece[0] for piece in pieces], 1))


def storage(state: Appended) -> int:
    return state.buffers[0].untyped_storage().data_ptr()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_many_single_tokens_rarely_reallocate():
    state, given, seen = fresh(), [], set()
    for _ in range(256):
        given.append(tokens(1))
        state = more(state, given[-1])
        seen.add((storage(state), state.buffers[0].shape[1]))
    assert holds(state, joined(*given))
    assert state.filled == 256
    assert state.uniform
    assert len({capacity for _, capacity in seen}) <= 7
    assert len(seen) <= 7


def test_presized_capacity_never_reallocates():
    state = fresh(capacity=64)
    where = storage(state)
    for _ in range(64):
        state = more(state, tokens(1))
    assert storage(state) == where
    assert state.buffers[0].shape[1] == 64


def test_old_states_stay_valid_after_rollback_and_fork():
    first, a, b, c = tokens(3), tokens(2), tokens(1), tokens(4)
    root = more(fresh(capacity=32), first)
    left = more(root, a)
    assert storage(left) == storage(root)
    right = more(root, b)
    assert storage(right) != storage(root)
    left_more, right_more = more(left, c), more(right, c)
    assert storage(left_more) == storage(left)
    assert storage(right_more) == storage(right)
    for state, given in (
        (root, (first,)), (left, (first, a)), (right, (first, b)),
        (left_more, (first, a, c)), (right_more, (first, b, c)),
    ):  # fmt: skip
        assert holds(state, joined(*given))
    assert bool((right.buffers[0][:, 8:] == 0).all())


def test_ragged_rows_take_only_their_real_tokens():
    prompt, step = tokens(5), tokens(2)
    starts, lengths = torch.tensor([3, 0]), torch.tensor([2, 4])
    for new in prompt:
        new[0, :3], new[1, 4:] = torch.nan, torch.nan
    rows = [prompt[0][0, 3:5], prompt[0][1, :4]]
    for capacity in (0, 32):
        state = more(fresh(capacity), prompt, lengths, new_starts=starts)
        assert holds(state, rows)
        assert not state.uniform
        after = more(state, step)
        assert holds(after, [torch.cat([row, new]) for row, new in zip(rows, step[0], strict=True)])
        assert holds(state, rows)
        assert (storage(after) == storage(state)) == (capacity == 32 or after.filled <= state.buffers[0].shape[1])


def test_rows_without_a_new_token_do_not_use_room_up():
    state = more(fresh(capacity=9), tokens(4))
    where = storage(state)
    for t in range(8):
        state = more(state, tokens(1), torch.tensor([t % 2, 1 - t % 2]))
    assert state.positions.tolist() == [8, 8]
    assert storage(state) == where


def test_packed_tokens_go_to_their_sequence():
    cu = torch.tensor([0, 3, 3, 5])
    first, second = tokens(5, batch=1), tokens(4, batch=1)
    state = more(fresh(batch=3), first, cu_seqlens=cu)
    after = more(state, second, cu_seqlens=torch.tensor([0, 1, 3, 4]))
    k, new = first[0][0], second[0][0]
    assert holds(state, [k[:3], k[:0], k[3:]])
    assert holds(after, [torch.cat([k[:3], new[:1]]), new[1:3], torch.cat([k[3:], new[3:]])])


def test_leaves_that_lost_their_record_are_copied():
    first, a, b = tokens(3), tokens(2), tokens(1)
    state = more(fresh(capacity=32), first)
    lost = [
        (tuple(x.detach() for x in state.buffers), state.positions.detach()),
        (tuple(x.index_select(0, torch.tensor([0, 1])) for x in state.buffers), state.positions.clone()),
        copy.deepcopy((state.buffers, state.positions)),
        (state.buffers, state.positions - 1),
    ]
    newer = more(state, a)
    for buffers, positions in lost:
        other = append(buffers, positions, b)
        kept = int(positions[0])
        assert holds(other, list(torch.cat([first[0][:, :kept], b[0]], 1)))
    assert holds(newer, joined(first, a))


def test_positions_changed_in_place_drop_the_record():
    first, a = tokens(3), tokens(1)
    state = more(fresh(capacity=32), first)
    state.positions.sub_(2)
    assert holds(more(state, a), list(torch.cat([first[0][:, :1], a[0]], 1)))


def test_a_donated_state_is_changed_in_place():
    first, a = tokens(3), tokens(1)
    state = more(fresh(capacity=8), first)
    given = [first]
    for _ in range(3):
        a = tokens(1)
        given.append(a)
        after = more(state, a, donate=True)
        assert after.positions is state.positions
        assert after.buffers[0] is state.buffers[0]
        state = after
    assert holds(state, joined(*given))
    grown = more(state, tokens(4), donate=True)
    assert grown.buffers[0].shape[1] == 20
    assert grown.positions.tolist() == [10, 10]


def test_a_donated_fork_does_not_disturb_the_newer_state():
    first, a, b = tokens(3), tokens(2), tokens(2)
    root = more(fresh(capacity=16), first)
    newer = more(root, a)
    fork = more(root, b, donate=True)
    assert holds(newer, joined(first, a))
    assert holds(fork, joined(first, b))


def test_gradients_reach_new_tokens_and_old_states():
    first, a, b = ([x.requires_grad_() for x in tokens(n)] for n in (3, 2, 1))
    with torch.enable_grad():
        root = more(fresh(capacity=16), tuple(first))
        left, right = more(root, tuple(a)), more(root, tuple(b))
        loss = (left.buffers[0] ** 2).sum() + 3 * (right.buffers[0] ** 2).sum() + (root.buffers[1] ** 2).sum()
        grads = torch.autograd.grad(loss, [first[0], a[0], b[0], first[1]])
    for grad, expected in zip(grads, (8 * first[0], 2 * a[0], 6 * b[0], 2 * first[1]), strict=True):
        torch.testing.assert_close(grad, expected)


def test_gradients_of_ragged_appends_ignore_padding():
    first, a = ([x.requires_grad_() for x in tokens(n)] for n in (3, 2))
    with torch.enable_grad():
        root = more(fresh(), tuple(first), torch.tensor([3, 1]))
        after = more(root, tuple(a), torch.tensor([1, 2]), new_starts=torch.tensor([1, 0]))
        grads = torch.autograd.grad((after.buffers[0] ** 2).sum(), [first[0], a[0]])
    wanted = [2 * first[0].detach(), 2 * a[0].detach()]
    wanted[0][1, 1:], wanted[1][0, 0] = 0, 0
    for grad, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, expected)


def test_appending_without_grad_leaves_a_saved_graph_alone():
    weight = torch.randn(P, requires_grad=True)
    with torch.enable_grad():
        state = more(fresh(capacity=16), tokens(3))
        y = (state.buffers[0] * weight).sum()
        later = more(fresh(capacity=16), tokens(3), donate=True)
    more(state, tokens(2))
    more(state, tokens(2), donate=True)
    more(later, tokens(2))
    torch.testing.assert_close(torch.autograd.grad(y, weight)[0], state.buffers[0].sum((0, 1, 2)))


def test_states_made_in_inference_mode_serve_outside_it():
    first, a, b = tokens(2), tokens(2), tokens(1)
    with torch.inference_mode():
        buffers, positions = empty(B, ((G, P), (G, 2 * P)), capacity=16, dtype=torch.float32)
        state = append(buffers, positions, first)
        after = more(state, a)
        assert storage(after) == storage(state)
    assert holds(more(after, b), joined(first, a, b))


@pytest.mark.parametrize("ragged", [False, True])
def test_append_compiles_whole_and_grows_by_its_tokens(ragged: bool):
    lengths = torch.tensor([1, 2]) if ragged else None

    def step(k: Tensor, v: Tensor, positions: Tensor, new_k: Tensor, new_v: Tensor, lengths: Tensor | None):
        after = append((k, v), positions, (new_k, new_v), lengths)
        return after.buffers, after.positions, valid_mask(positions, after.buffers[0].shape[1], new_k.shape[1])

    first, a = tokens(3), tokens(2)
    state = more(fresh(capacity=8), first)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    buffers, positions, mask = compiled(*state.buffers, state.positions, *a, lengths)
    assert buffers[0].shape[1] == 10
    assert mask.shape == (B, 1, 2, 10)
    ends = [2, 2] if lengths is None else lengths.tolist()
    rows = [torch.cat([first[0][b], a[0][b, :end]]) for b, end in enumerate(ends)]
    after = Appended(buffers, positions, None, False)
    assert holds(after, rows)
    assert holds(more(after, a), [torch.cat([row, new]) for row, new in zip(rows, a[0], strict=True)])
    assert holds(state, joined(first))


def test_a_donated_append_compiles_at_static_shapes():
    def step(k: Tensor, v: Tensor, positions: Tensor, new_k: Tensor, new_v: Tensor):
        after = append((k, v), positions, (new_k, new_v), donate=True)
        return after.buffers, after.positions

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    given = [tokens(3)]
    state = more(fresh(capacity=8), given[0])
    where = storage(state)
    buffers, positions = state.buffers, state.positions
    for _ in range(3):
        given.append(tokens(1))
        buffers, positions = compiled(*buffers, positions, *given[-1])
    after = Appended(buffers, positions, None, False)
    assert storage(after) == where
    assert holds(after, joined(*given))
    given.append(tokens(1))
    assert holds(more(after, given[-1]), joined(*given))


@pytest.mark.gpu
def test_a_donated_append_replays_in_a_cuda_graph():
    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs need a CUDA device")
    buffers, positions = empty(B, ((G, P), (G, 2 * P)), capacity=16, dtype=torch.float32, device="cuda")
    given = [tuple(x.cuda() for x in tokens(3))]
    state = append(buffers, positions, given[0])
    new = tuple(torch.zeros(B, 1, *buffer.shape[2:], device="cuda") for buffer in buffers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append(state.buffers, state.positions, new, donate=True)
    for _ in range(4):
        given.append(tuple(x.cuda() for x in tokens(1)))
        for slot, value in zip(new, given[-1], strict=True):
            slot.copy_(value)
        graph.replay()
    assert holds(state, joined(*given))
    given.append(tuple(x.cuda() for x in tokens(2)))
    assert holds(append(state.buffers, state.positions, given[-1]), joined(*given))
    with pytest.raises(StateError, match="donate=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        append(state.buffers, state.positions, new)


def test_no_new_tokens_change_nothing():
    state = more(fresh(), tokens(3))
    after = more(state, tokens(0))
    assert after.buffers[0] is state.buffers[0]
    assert after.filled == 3


def test_the_mask_is_aligned_at_the_end_of_each_row():
    mask = valid_mask(torch.tensor([0, 2]), 5, 2)
    assert mask[:, 0].sum(-1).tolist() == [[1, 2], [3, 4]]
    shifted = valid_mask(torch.tensor([0, 2]), 5, 2, new_starts=torch.tensor([1, 0]))
    assert shifted[:, 0].sum(-1).tolist() == [[0, 1], [3, 4]]


def test_one_name_offers_the_rule():
    assert KeyValueBuffer.append is append
    assert KeyValueBuffer.valid_mask is valid_mask


def test_bad_inputs_raise_in_words():
    state = fresh()
    k, v = tokens(2)
    with pytest.raises(ShapeError, match="pass one for each"):
        more(state, (k,))
    with pytest.raises(ShapeError, match="new tokens have shape"):
        more(state, (k, k))
    with pytest.raises(DtypeError, match="cast one"):
        more(state, (k, v.double()))
    with pytest.raises(PackingError, match="new_lengths"):
        more(state, (k, v), torch.tensor([1]))
    with pytest.raises(PackingError, match="pass both"):
        more(state, (k, v), new_starts=torch.tensor([1, 0]))
    with pytest.raises(PackingError, match="cu_seqlens"):
        more(state, (k[:1], v[:1]), cu_seqlens=torch.tensor([0, 2]))
