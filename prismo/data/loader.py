"""Batches for the trainer: worker processes decode, collate and tokenise; the position in the data is two integers."""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from prismo.data.dataset import Sample, WindowDataset
from prismo.data.images import sample_seeds
from prismo.data.order import EpochOrder, Position, RankSampler
from prismo.util.processes import end_with

T = TypeVar("T")
_PREFETCH = 2  # batches that a worker is ahead
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
CollateText = Callable[[Sequence[Sample]], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Batch:
    """A collated batch. B samples, V views, K actions of the chunk, A action and P proprio numbers.

    Attributes:
        images: uint8 [B, V, 3, H, W] as stored (channels-last in memory); give them to `images.prepare_images`.
        actions: float32 [B, K, A], normalised.
        action_mask: bool [B, K], False behind an episode's end.
        proprio: float32 [B, P], normalised.
        seeds: int64 [B], augmentation seeds from (run seed, epoch, window index); they stay on the CPU.
        index, epoch, episode, step: int64 [B], see `dataset.Sample`.
        instructions, dataset_names: B strings.
        text: what `collate_text` made of the samples, for example input_ids and labels.
    """

    images: Tensor
    actions: Tensor
    action_mask: Tensor
    proprio: Tensor
    seeds: Tensor
    index: Tensor
    epoch: Tensor
    episode: Tensor
    step: Tensor
    instructions: list[str]
    dataset_names: list[str]
    text: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.instructions)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The batch with its numbers on `device`; `seeds` stay on the CPU, where they are used."""
        return self._map(lambda name, x: x if name == "seeds" else x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which a copy to a GPU can overlap with computing."""
        return self._map(lambda _, x: x.pin_memory())

    def __getstate__(self) -> dict[str, Any]:
        """Between processes tensors travel as arrays: a shared tensor each would cost more than copying them."""
        state = dict(self.__dict__, text={name: x.numpy() for name, x in self.text.items()})
        return {name: value.numpy() if isinstance(value, Tensor) else value for name, value in state.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["text"] = {name: torch.from_numpy(x) for name, x in state["text"].items()}
        for name, value in state.items():
            object.__setattr__(self, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)

    def _map(self, function: Callable[[str, Tensor], Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: function(name, v) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changed, text={name: function(name, v) for name, v in self.text.items()})


class _Slots:
    """Image memory that the workers write and the training process reads, reused from batch to batch.

    Fresh shared memory for every batch, which is what torch's DataLoader would take, costs more than decoding a JPEG:
    the kernel clears and maps each page anew. A fixed number of slots also bounds the use of /dev/shm.
    """

    def __init__(self, count: int, shape: tuple[int, ...], ranks: int) -> None:
        # Memory is taken when it is first written, so what the other ranks will need still counts as free.
        needed, free = ranks * count * math.prod(shape), shutil.disk_usage("/dev/shm").free
        if needed > free:
            raise ValueError(
                f"the workers of {ranks} processes need {needed >> 20} MB of shared memory, /dev/shm has {free >> 20} "
                "MB: start the container with a larger --shm-size, or use fewer workers or a smaller batch"
            )
        self.pixels = torch.empty((count, *shape), dtype=torch.uint8).share_memory_()
        self._free = torch.multiprocessing.get_context().SimpleQueue()
        for slot in range(count):
            self._free.put(slot)

    def acquire(self) -> int:
        """A free slot; called in a worker."""
        return self._free.get()

    def take(self, slot: int, size: int) -> Tensor:
        """The first `size` samples of a slot as a tensor of its own; the slot is free again."""
        pixels = self.pixels[slot, :size].clone()
        self._free.put(slot)
        return pixels


class _Fetcher(Dataset["tuple[int, Batch]"]):
    """Makes whole batches in a worker, for DataLoader's batched fetching.

    Images are decoded straight into a slot; the batch that travels has none, and `Loader` puts them in. Without slots
    (no workers) they are in the batch at once.
    """

    def __init__(
        self, dataset: WindowDataset, seed: int, collate_text: CollateText | None, slots: _Slots | None
    ) -> None:
        self.dataset, self.seed, self.collate_text, self.slots = dataset, seed, collate_text, slots

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> tuple[int, Batch]:
        slot = self.slots.acquire() if self.slots else 0
        if self.slots:
            pixels = self.slots.pixels[slot, : len(keys)]
        else:
            pixels = torch.empty((len(keys), *self.dataset.pixel_shape), dtype=torch.uint8)
        samples = [self.dataset.sample(key[1], image) for key, image in zip(keys, pixels.numpy(), strict=True)]
        epoch, index = torch.tensor(keys).unbind(1)
        batch = Batch(
            images=_NO_IMAGES if self.slots else _channels_first(pixels),
            actions=torch.stack([sample.actions for sample in samples]),
            action_mask=torch.stack([sample.action_mask for sample in samples]),
            proprio=torch.stack([sample.proprio for sample in samples]),
            seeds=sample_seeds(self.seed, epoch, index),
            index=index,
            epoch=epoch,
            episode=torch.tensor([sample.episode for sample in samples]),
            step=torch.tensor([sample.step for sample in samples]),
            instructions=[sample.instruction for sample in samples],
            dataset_names=[sample.dataset_name for sample in samples],
            text=self.collate_text(samples) if self.collate_text else {},
        )
        return slot, batch


_NO_IMAGES = torch.empty(0, dtype=torch.uint8)


def _channels_first(pixels: Tensor) -> Tensor:
    """[B, V, H, W, 3] as [B, V, 3, H, W], without moving a byte: a transpose would cost as much as decoding."""
    return pixels.permute(0, 1, 4, 2, 3)


def _as_fetched(fetched: T) -> T:
    return fetched


@dataclass(eq=False)
class Loader:
    """Iterates over batches of `batch_size` for one rank, from the current position on.

    After every batch `state_dict()` holds two integers, the epoch and the samples of all ranks taken in it. A loader
    that is given them continues with exactly the batches that were left, also with another number of ranks as long as
    ranks x batch size stay the same (with another product the samples are the same, cut into other batches).

    Args:
        num_workers: decoding processes of this rank; None takes `usual_workers`. 0 decodes in the calling process,
            which is for debugging.
        collate_text: called in the workers with the samples of a batch, for example to tokenise.
        epochs: None never ends (training); 1 gives every window once (validation), where the last batch may be
            smaller and one rank may get one sample less than another.
        pin_memory: page-locked batches, for asynchronous copies to a GPU.
    """

    dataset: WindowDataset
    batch_size: int
    _: KW_ONLY
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    num_workers: int | None = None
    collate_text: CollateText | None = None
    shuffle: bool = True
    epochs: int | None = None
    pin_memory: bool = False

    def __post_init__(self) -> None:
        sources = self.dataset.sources
        counts, weights = tuple(s.num_windows for s in sources), tuple(s.weight for s in sources)
        self.order, self._position = EpochOrder(counts, weights, self.seed, self.shuffle), Position()

    @property
    def samples_per_epoch(self) -> int:
        return self.order.size

    def __iter__(self) -> Generator[Batch]:
        slots, workers = None, usual_workers(self.world_size) if self.num_workers is None else self.num_workers
        if workers:
            shape = (self.batch_size, *self.dataset.pixel_shape)
            slots = _Slots(workers * _PREFETCH + 1, shape, _local_ranks(self.world_size))
        with _started(self._fetch(slots, workers)) as fetched:
            for slot, batch in fetched:
                images = batch.images if slots is None else _channels_first(slots.take(slot, len(batch)))
                complete = replace(batch, images=images)
                self._position = self.order.after(self._position, self.batch_size * self.world_size)
                yield complete.pin_memory() if self.pin_memory else complete

    def _fetch(self, slots: _Slots | None, workers: int) -> DataLoader[tuple[int, Batch]]:
        sampler = RankSampler(self.order, self.batch_size, self.rank, self.world_size, self._position, self.epochs)
        return DataLoader(
            _Fetcher(self.dataset, self.seed, self.collate_text, slots),
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=_as_fetched,
            prefetch_factor=_PREFETCH if workers else None,
            worker_init_fn=functools.partial(_set_up_worker, os.getpid()),
        )

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._position.epoch, "sample": self._position.sample}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._position = Position(int(state["epoch"]), int(state["sample"]))


@contextmanager
def _started(loader: DataLoader[tuple[int, Batch]]) -> Generator[Iterator[tuple[int, Batch]]]:
    """The loader's batches; its workers are gone when the block ends, however it ends."""
    others = set(multiprocessing.active_children())
    # A signal in the instant before a worker ignores it would kill it, perhaps with a lock that the others wait for.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    workers = set(multiprocessing.active_children()) - others
    try:
        yield batches
    finally:
        if isinstance(batches, _MultiProcessingDataLoaderIter):
            batches._shutdown_workers()  # as its __del__ does, which an exception's traceback would put off
        for worker in workers:  # the interpreter would wait at its exit for one that hangs
            worker.kill()
            worker.join()


def _set_up_worker(parent: int, number: int) -> None:
    """First thing in a data worker: it ends with the training process, and with nothing else.

    Terminals and clusters send SIGTERM and SIGINT to every process of a job; a worker that dies of it takes the update
    along that the training process is about to finish.
    """
    end_with(parent)
    for name in _STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


def _local_ranks(world_size: int) -> int:
    """Ranks on this machine, as torchrun says; without it all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or world_size)


def usual_workers(world_size: int) -> int:
    """Decoding processes of a rank: its share of the machine's cores that it may use, 8 at most."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // _local_ranks(world_size)))
