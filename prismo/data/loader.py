"""Batches for the trainer: worker processes decode, collate and tokenise; the position in the data is two integers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from prismo.data.dataset import Sample, WindowDataset
from prismo.data.images import sample_seeds
from prismo.data.order import EpochOrder, Position, RankSampler

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
        """Called by torch's DataLoader when it pins."""
        return self._map(lambda _, x: x.pin_memory())

    def __getstate__(self) -> dict[str, Any]:
        """Between processes only the images travel as a shared tensor; for the rest that costs more than copying."""
        state = dict(self.__dict__, text={name: x.numpy() for name, x in self.text.items()})
        return {k: v.numpy() if isinstance(v, Tensor) and k != "images" else v for k, v in state.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["text"] = {name: torch.from_numpy(x) for name, x in state["text"].items()}
        for name, value in state.items():
            object.__setattr__(self, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)

    def _map(self, function: Callable[[str, Tensor], Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: function(name, v) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changed, text={name: function(name, v) for name, v in self.text.items()})


class _BatchFetcher(Dataset["Batch"]):
    """Makes a whole batch in the worker, for DataLoader's batched fetching.

    Images are decoded straight into the batch, in the layout they are decoded in and in the memory that the training
    process will see: every copy or transpose of the pixels would cost about as much as decoding them.
    """

    def __init__(self, dataset: WindowDataset, seed: int, collate_text: CollateText | None) -> None:
        self.dataset, self.seed, self.collate_text = dataset, seed, collate_text

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch:
        pixels = _pixels((len(keys), self.dataset.num_images, *self.dataset.image_size, 3))
        samples = [self.dataset.sample(index, image) for (_, index), image in zip(keys, pixels.numpy(), strict=True)]
        epoch, index = torch.tensor(keys).unbind(1)
        return Batch(
            images=pixels.permute(0, 1, 4, 2, 3),
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


def _pixels(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised uint8 tensor; in a worker, in memory shared with the training process."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    # As torch's own collate function does it.
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.tensor([], dtype=torch.uint8).set_(storage).view(shape)


def _identity(batch: Batch) -> Batch:
    return batch


class Loader:
    """Iterates over this rank's batches from the current position on.

    After every batch `state_dict()` holds two integers, the epoch and the samples of all ranks taken in it. A loader
    that is given them continues with exactly the batches that were left, also with another number of ranks as long as
    ranks x batch size stay the same (with another product the samples are the same, cut into other batches).
    """

    def __init__(self, make: Callable[[Position], DataLoader[Batch]], order: EpochOrder, samples_per_step: int) -> None:
        self._make, self.order, self._samples_per_step = make, order, samples_per_step
        self._position = Position()

    @property
    def samples_per_epoch(self) -> int:
        return self.order.size

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._make(self._position):
            self._position = self.order.after(self._position, self._samples_per_step)
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._position.epoch, "sample": self._position.sample}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._position = Position(int(state["epoch"]), int(state["sample"]))


def make_loader(
    dataset: WindowDataset,
    batch_size: int,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int | None = None,
    collate_text: CollateText | None = None,
    shuffle: bool = True,
    epochs: int | None = None,
    pin_memory: bool = False,
) -> Loader:
    """Batches of `batch_size` for one rank.

    Args:
        num_workers: decoding processes of this rank; None takes this rank's share of the machine's cores, 8 at most.
            0 decodes in the calling process, which is for debugging.
        collate_text: called in the workers with the samples of a batch, for example to tokenise.
        epochs: None never ends (training); 1 gives every window once (validation), where the last batch may be
            smaller and one rank may get one sample less than another.
        pin_memory: page-locked batches, for asynchronous copies to a GPU.
    """
    if num_workers is None:
        num_workers = max(1, min(8, (os.cpu_count() or 1) // world_size))
    order = EpochOrder(
        tuple(source.num_windows for source in dataset.sources),
        tuple(source.weight for source in dataset.sources),
        seed,
        shuffle,
    )

    def make(start: Position) -> DataLoader[Batch]:
        sampler = RankSampler(order, batch_size, rank=rank, world_size=world_size, start=start, epochs=epochs)
        return DataLoader(
            _BatchFetcher(dataset, seed, collate_text),
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=_identity,
            pin_memory=pin_memory,
            prefetch_factor=2 if num_workers else None,
        )

    return Loader(make, order, batch_size * world_size)
