"""Memory that is used again: never two tensors in one place, and all of it comes back."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.runtime.arena import Arena

DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.int64)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 300), st.integers(0, 40), st.sampled_from(DTYPES)),
            st.integers(0, 20),
        ),
        max_size=60,
    )
)
def test_living_tensors_keep_their_values(steps: list[tuple[int, int, torch.dtype] | int]) -> None:
    arena, alive = Arena(), list[tuple[torch.Tensor, int]]()
    for number, step in enumerate(steps):
        if isinstance(step, tuple):
            rows, columns, dtype = step
            like = torch.empty(columns, rows, dtype=dtype).t()
            made = arena.empty_like(like)
            assert (made.shape, made.stride(), made.dtype) == (
                like.shape, like.stride(), like.dtype,
            )  # fmt: skip
            assert made.data_ptr() % 64 == 0
            alive.append((made.fill_(number), number))
        elif alive:
            del alive[step % len(alive)]
        assert all(bool((tensor == value).all()) for tensor, value in alive)
    alive.clear()
    made = None
    assert sum(size for _, size in arena._free) == arena.size
    assert len(arena._free) <= len(arena._chunks)


def test_a_view_keeps_the_memory() -> None:
    arena = Arena()
    view = arena.empty_like(torch.empty(64, 8)).fill_(3)[5]
    other = arena.empty_like(torch.empty(64, 8)).fill_(4)
    assert bool((view == 3).all())
    assert bool((other == 4).all())


def test_a_borrowed_tensor_does_not() -> None:
    arena = Arena()
    tensor = arena.empty_like(torch.empty(8, 4).t()).fill_(3)
    borrowed = arena.borrowed(tensor[1:])
    assert torch.equal(borrowed, tensor[1:])
    assert borrowed.stride() == tensor[1:].stride()
    del tensor
    again = arena.empty_like(torch.empty(8, 4).t()).fill_(4)
    assert torch.equal(borrowed, again[1:])


def test_what_lies_elsewhere_is_not_borrowed() -> None:
    arena, tensor = Arena(), torch.ones(3)
    arena.empty_like(tensor)
    assert arena.borrowed(tensor) is tensor


def test_memory_grows_only_when_nothing_fits() -> None:
    arena = Arena()
    sizes = []
    for _ in range(5):
        kept = [arena.empty_like(torch.empty(2**20)) for _ in range(6)]
        del kept
        sizes.append(arena.size)
    assert sizes == [sizes[0]] * 5
