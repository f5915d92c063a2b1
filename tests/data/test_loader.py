"""Batches from real worker processes: complete, disjoint over ranks, resumable bit for bit, decoded elsewhere."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prismo.data.dataset import Sample, WindowDataset, open_dataset
from prismo.data.images import prepare_images, sample_seeds
from prismo.data.loader import Batch, Loader
from tests.data.conftest import quiet_environment


def note_worker(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Stands for a tokeniser: numbers made of the samples, in the process that decodes them."""
    return {
        "length": torch.tensor([len(sample.instruction) for sample in samples]),
        "process": torch.full((len(samples),), os.getpid()),
        "brightness": torch.stack([sample.images.float().mean() for sample in samples]),
    }


def pixels(batch: Batch) -> Tensor:
    return prepare_images(batch.images, 56, batch.seeds)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_two_ranks_see_every_window_once(small: WindowDataset, workers: int) -> None:
    seen: list[int] = []
    for rank in range(2):
        loader = Loader(small, 7, seed=4, rank=rank, world_size=2, num_workers=workers, epochs=1)
        seen += [index for batch in loader for index in batch.index.tolist()]
    assert sorted(seen) == list(range(len(small)))


def test_a_batch_holds_its_samples(small: WindowDataset) -> None:
    loader = Loader(small, 5, seed=3, num_workers=2, collate_text=note_worker)
    for batch in islice(loader, 4):
        assert batch.images.shape == (5, 2, 3, 64, 64)
        assert batch.images.dtype == torch.uint8
        for i, index in enumerate(batch.index.tolist()):
            sample = small[index]
            assert torch.equal(batch.images[i], sample.images)
            assert torch.equal(batch.actions[i], sample.actions)
            assert torch.equal(batch.proprio[i], sample.proprio)
            assert torch.equal(batch.action_mask[i], sample.action_mask)
            assert (batch.instructions[i], batch.dataset_names[i]) == (sample.instruction, sample.dataset_name)
            assert (batch.episode[i], batch.step[i]) == (sample.episode, sample.step)
            assert batch.text["length"][i] == len(sample.instruction)
            assert batch.text["brightness"][i] == sample.images.float().mean()
        assert torch.equal(batch.seeds, sample_seeds(3, batch.epoch, batch.index))


def test_earlier_batches_stay_as_they_were(small: WindowDataset) -> None:
    """The workers reuse their image memory; what was handed out must not change."""
    batches = list(islice(Loader(small, 4, num_workers=2), 12))
    for batch in batches:
        for i, index in enumerate(batch.index.tolist()):
            assert torch.equal(batch.images[i], small[index].images)


@pytest.mark.parametrize("stopped_after", [2, 9])
def test_resume_is_exact_to_the_augmented_pixel(small: WindowDataset, stopped_after: int) -> None:
    options = {"seed": 11, "rank": 1, "world_size": 2}
    loader = Loader(small, 6, num_workers=2, **options)
    state, expected = None, []
    for number, batch in enumerate(islice(loader, 14), start=1):
        if number == stopped_after:
            state = loader.state_dict()
        elif number > stopped_after:
            expected.append((batch.index, batch.epoch, batch.actions, pixels(batch)))
    assert state is not None
    assert set(state) == {"epoch", "sample"}
    assert all(isinstance(value, int) for value in state.values())
    assert expected[-1][1].max() > 0, "the sequence runs into the next epoch"
    resumed = Loader(small, 6, num_workers=1, **options)
    resumed.load_state_dict(state)
    for batch, (index, epoch, actions, picture) in zip(resumed, expected, strict=False):
        assert torch.equal(batch.index, index)
        assert torch.equal(batch.epoch, epoch)
        assert torch.equal(batch.actions, actions)
        assert torch.equal(pixels(batch), picture)


def test_another_seed_gives_another_order_and_other_pixels(small: WindowDataset) -> None:
    first, again, other = (next(iter(Loader(small, 8, seed=s, num_workers=1))) for s in (0, 0, 1))
    assert torch.equal(first.index, again.index)
    assert torch.equal(pixels(first), pixels(again))
    assert not torch.equal(first.index, other.index)
    assert not torch.equal(first.seeds, other.seeds)


def test_the_training_process_neither_decodes_nor_tokenises(small: WindowDataset) -> None:
    processes = set()
    for batch in islice(Loader(small, 4, num_workers=2, collate_text=note_worker), 8):
        processes |= set(batch.text["process"].tolist())
    assert len(processes) == 2
    assert os.getpid() not in processes


def test_iterating_again_goes_on(small: WindowDataset) -> None:
    loader = Loader(small, 4, num_workers=1)
    first = [batch.index for batch in islice(loader, 2)]
    second = [batch.index for batch in islice(loader, 2)]
    whole = [batch.index for batch in islice(Loader(small, 4, num_workers=1), 4)]
    assert all(torch.equal(a, b) for a, b in zip(first + second, whole, strict=True))


def test_damage_reaches_the_user_with_the_file_name(synthetic: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(synthetic, root)
    dataset = open_dataset(root, "libero_spatial_no_noops")
    for file in root.rglob("*.tfrecord*"):
        file.write_bytes(file.read_bytes().replace(b"\xff\xd8", b"\xff\xd9"))
    with pytest.raises(ValueError, match=r"tfrecord.*not what was indexed"):
        next(iter(Loader(dataset, 4, num_workers=1)))


@pytest.mark.processes
def test_workers_may_be_spawned(synthetic: Path) -> None:
    """The default of newer Pythons is not to fork."""
    program = f"""
import itertools, torch
from prismo.data.dataset import open_dataset
from prismo.data.loader import Loader
if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    dataset = open_dataset({str(synthetic)!r}, "libero_spatial_no_noops")
    for batch in itertools.islice(Loader(dataset, 4, num_workers=1), 5):
        assert all(torch.equal(batch.images[i], dataset[j].images) for i, j in enumerate(batch.index.tolist()))
    print("equal")
"""
    script = synthetic.parent / "spawned.py"
    script.write_text(program)
    done = subprocess.run(
        [sys.executable, str(script)], env=quiet_environment(), capture_output=True, text=True, check=False
    )
    assert done.stdout == "equal\n", done.stderr[-2000:]


@pytest.mark.parametrize(("ranks", "share"), [(1, 1.5), (4, 0.5)])
def test_too_little_shared_memory_is_an_error_not_a_crash(
    small: WindowDataset, monkeypatch: pytest.MonkeyPatch, ranks: int, share: float
) -> None:
    """Also where each rank alone would fit: a write into missing shared memory ends a process without a word."""
    slots, free = 3, shutil.disk_usage("/dev/shm").free
    batch_size = int(share * free / slots / math.prod(small.pixel_shape))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    with pytest.raises(ValueError, match=rf"{ranks} processes need .* MB of shared memory, /dev/shm has .*--shm-size"):
        next(iter(Loader(small, batch_size, num_workers=1, world_size=ranks)))


def test_batches_move_to_a_device(small: WindowDataset) -> None:
    batch = next(iter(Loader(small, 2, num_workers=0, collate_text=note_worker)))
    moved = batch.to("meta")
    assert moved.images.device.type == moved.text["length"].device.type == "meta"
    assert moved.seeds.device.type == "cpu"
    assert len(moved) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches(small: WindowDataset) -> None:
    batch = next(iter(Loader(small, 4, num_workers=1, pin_memory=True, collate_text=note_worker)))
    assert batch.images.is_pinned()
    assert batch.text["length"].is_pinned()
    assert torch.equal(batch.to("cuda").images.cpu(), batch.images)
