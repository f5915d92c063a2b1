"""The order of samples: a permutation, disjoint over ranks, weighted, and resumable from two integers."""

from __future__ import annotations

from collections import Counter
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismo.data.hashing import mix, permute, uniform
from prismo.data.order import EpochOrder, Position, RankSampler

Key = tuple[int, int]
SOME = settings(max_examples=40, derandomize=True, database=None, deadline=None)


@st.composite
def orders(draw: st.DrawFn) -> EpochOrder:
    """40 windows (short epochs are slow to try) and up to three datasets of 1 to 80, each seen 0.02 to 3 times."""
    datasets = [(40, 1.0), *draw(st.lists(st.tuples(st.integers(1, 80), st.floats(0.02, 3)), max_size=3))]
    counts, weights = zip(*datasets, strict=True)
    return EpochOrder(counts, weights, seed=draw(st.integers(0, 2**63 - 1)), shuffle=draw(st.booleans()))


def take(order: EpochOrder, batches: int | None, **options: Any) -> list[list[Key]]:
    return list(islice(RankSampler(order, **options), batches))


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


@SOME
@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_any_size_and_key_give_a_bijection(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@SOME
@given(order=orders(), first=st.integers(0, 1000), epochs=st.integers(1, 6))
def test_windows_of_a_dataset_are_seen_equally_often(order: EpochOrder, first: int, epochs: int) -> None:
    """Every epoch holds each dataset's share, and no window comes a third time before another came twice."""
    ends = np.cumsum((0, *order.counts))
    seen = [order.windows(epoch, np.arange(order.size)) for epoch in range(first, first + epochs)]
    for windows in seen:
        assert tuple(np.histogram(windows, ends)[0]) == order.shares
    times = np.bincount(np.concatenate(seen), minlength=ends[-1])
    for number, count in enumerate(order.counts):
        own = times[ends[number] : ends[number + 1]]
        assert own.sum() == epochs * order.shares[number]
        # From the middle of one permutation into that of another: one time more, and one less.
        assert own.max() - own.min() <= (1 if first == 0 or order.shares[number] % count == 0 else 2)


@SOME
@given(order=orders(), world=st.integers(1, 6), batch=st.integers(1, 9), epochs=st.integers(1, 5))
def test_ranks_deal_out_the_stream_in_turn(order: EpochOrder, world: int, batch: int, epochs: int) -> None:
    """Disjoint, complete, epoch after epoch; only the last batch of a rank may be short."""
    ranks = [take(order, None, batch_size=batch, rank=r, world_size=world, epochs=epochs) for r in range(world)]
    for batches in ranks:
        assert all(len(each) == batch for each in batches[:-1])
        assert all(1 <= len(each) <= batch for each in batches[-1:])
    dealt = [key for turn in zip_longest(*map(flat, ranks)) for key in turn if key is not None]
    wanted = [(e, w) for e in range(epochs) for w in order.windows(e, np.arange(order.size)).tolist()]
    assert dealt == wanted


@SOME
@given(
    order=orders(),
    start=st.builds(Position, st.integers(0, 3), st.integers(0, 5)),
    batch=st.integers(1, 6),
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    done=st.integers(0, 12),
)
def test_any_run_goes_on_where_it_stopped(
    order: EpochOrder, start: Position, batch: int, worlds: tuple[int, int], done: int
) -> None:
    """With another number of processes and the batch that goes with it, too: each update has the samples it had."""
    before, after = worlds
    start = order.after(start, 0)
    ranks = [
        take(order, done + 5, batch_size=batch * after, rank=r, world_size=before, start=start) for r in range(before)
    ]
    position = order.after(start, done * batch * before * after)
    others = [take(order, 5, batch_size=batch * before, rank=r, world_size=after, start=position) for r in range(after)]
    for number in range(5):
        wanted = Counter(key for rank in ranks for key in rank[done + number])
        assert Counter(key for rank in others for key in rank[number]) == wanted
