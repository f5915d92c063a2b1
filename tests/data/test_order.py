"""The order of samples: a permutation, disjoint over ranks, weighted, and resumable from two integers."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from prismo.data.hashing import mix, permute, uniform
from prismo.data.order import EpochOrder, Position, RankSampler

Key = tuple[int, int]


def take(order: EpochOrder, batches: int | None, **options: object) -> list[list[Key]]:
    return list(islice(RankSampler(order, **options), batches))  # type: ignore[arg-type]


def flat(batches: list[list[Key]]) -> list[Key]:
    return [key for batch in batches for key in batch]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_permute_is_a_bijection(size: int) -> None:
    shuffled = permute(np.arange(size), size, key=3)
    assert sorted(shuffled.tolist()) == list(range(size))
    # A part of the positions gives the same part of the result.
    np.testing.assert_array_equal(permute(np.arange(size)[::3], size, key=3), shuffled[::3])


def test_permute_mixes() -> None:
    """Neighbours are sent far apart, keys are unrelated, and the first place is hit evenly."""
    n = 10_000
    shuffled = permute(np.arange(n), n, key=1)
    assert abs(np.corrcoef(np.arange(n), shuffled)[0, 1]) < 0.03
    assert abs(np.abs(np.diff(shuffled)).mean() - n / 3) < n / 50
    assert (shuffled == permute(np.arange(n), n, key=2)).sum() < 10
    first = np.bincount([permute(np.array([0]), 8, key=k)[0] for k in range(1600)], minlength=8)
    assert np.abs(first - 200).max() < 60


def test_a_permutation_of_droid_takes_no_memory() -> None:
    assert permute(np.array([0, 26_999_999]), 27_000_000, key=0).max() < 27_000_000


def test_hash_values_are_fixed() -> None:
    """Runs of today must resume with the code of tomorrow."""
    assert mix(1, 2).tolist() == [15671754871817308195]
    assert mix(7, np.array([0, 1, -1])).dtype == np.uint64
    assert permute(np.arange(10), 10, key=42).tolist() == [0, 9, 5, 3, 4, 8, 1, 7, 2, 6]
    assert 0.49 < uniform(mix(0, np.arange(10_000))).mean() < 0.51


def test_an_epoch_sees_every_window_once() -> None:
    order = EpochOrder((30, 70), (1.0, 1.0), seed=5)
    epochs = [order.windows(e, np.arange(100)) for e in range(3)]
    assert all(sorted(windows.tolist()) == list(range(100)) for windows in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], EpochOrder((30, 70), (1.0, 1.0), seed=6).windows(0, np.arange(100)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_are_disjoint_and_complete(world_size: int) -> None:
    order = EpochOrder((103,), (1.0,), seed=1)
    ranks = [take(order, None, batch_size=4, rank=r, world_size=world_size, epochs=2) for r in range(world_size)]
    keys = [key for rank in ranks for key in flat(rank)]
    assert sorted(keys) == [(epoch, window) for epoch in range(2) for window in range(103)]


def test_training_never_runs_out_and_ranks_stay_in_step() -> None:
    order = EpochOrder((10,), (1.0,), seed=1)
    ranks = [take(order, 25, batch_size=3, rank=r, world_size=2) for r in range(2)]
    assert all(len(batch) == 3 for rank in ranks for batch in rank)
    keys = sorted(key for rank in ranks for key in flat(rank))
    assert keys == [(epoch, window) for epoch in range(15) for window in range(10)]


@pytest.mark.parametrize("stopped_after", [1, 5, 17, 30])
def test_resume_continues_the_same_sequence(stopped_after: int) -> None:
    order = EpochOrder((50, 21), (1.0, 0.5), seed=9)
    whole = take(order, 40, batch_size=4, rank=1, world_size=2)
    position = order.after(Position(), stopped_after * 8)
    rest = take(order, 40 - stopped_after, batch_size=4, rank=1, world_size=2, start=position)
    assert rest == whole[stopped_after:]


def test_resume_with_another_world_size_takes_the_same_samples() -> None:
    """4 ranks x 2, then 2 ranks x 4: every global batch holds the samples that it would have held."""
    order = EpochOrder((90,), (1.0,), seed=2)
    position = order.after(Position(), 6 * 8)
    before = [take(order, 30, batch_size=2, rank=r, world_size=4) for r in range(4)]
    after = [take(order, 24, batch_size=4, rank=r, world_size=2, start=position) for r in range(2)]
    for step in range(24):
        expected = {key for rank in before for key in rank[6 + step]}
        assert {key for rank in after for key in rank[step]} == expected


def test_weights_are_shares_of_each_window() -> None:
    order = EpochOrder((40, 10), (0.5, 2.0), seed=3)
    assert order.shares == (20, 20)
    first, second = (order.windows(e, np.arange(order.size)) for e in range(2))
    counts = np.bincount(first, minlength=50)
    assert counts[:40].max() == 1
    assert counts[:40].sum() == 20
    assert (counts[40:] == 2).all()
    # Two epochs of weight 0.5 see every window once.
    assert (np.bincount(np.concatenate([first, second]), minlength=50)[:40] == 1).all()


def test_stored_order_without_shuffling() -> None:
    order = EpochOrder((4, 3), (1.0, 1.0), shuffle=False)
    assert flat(take(order, None, batch_size=3, epochs=1)) == [(0, i) for i in range(7)]


def test_positions_are_two_integers() -> None:
    order = EpochOrder((10,), (1.0,))
    assert order.after(Position(2, 8), 5) == Position(3, 3)
    assert order.after(Position(), 40) == Position(4, 0)
    with pytest.raises(ValueError, match="rank 2 is not below the world size 2"):
        RankSampler(order, 1, rank=2, world_size=2)
