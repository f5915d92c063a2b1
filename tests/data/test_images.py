"""Our image arithmetic beside TensorFlow's own results and the figures that the original documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from prismo.data import images
from prismo.data.images import (
    Augmentation,
    augment,
    center_crop,
    decode_image,
    encode_jpeg,
    jpeg_round_trip,
    observation_image,
    prepare_images,
    resize_lanczos3,
    sample_seeds,
)

IMAGES = ("smooth", "256x256", "480x640", "128x128")


@pytest.fixture(scope="module")
def golden(tensorflow: Path) -> dict[str, np.ndarray]:
    return dict(np.load(tensorflow / "images.npz"))


def chw(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def differences(ours: Tensor, theirs: np.ndarray) -> Tensor:
    return (ours.permute(1, 2, 0).int() - torch.from_numpy(theirs).int()).abs()


def picture(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, (*shape[:-2], 3, *shape[-2:]), generator=torch.Generator().manual_seed(seed)).byte()


# --- beside TensorFlow ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGES)
def test_bytes_equal_tensorflow(golden: dict[str, np.ndarray], name: str) -> None:
    """Decoding, JPEG round trip, resize, center crop and the whole chain at evaluation: not one value differs."""
    image = golden[f"{name}/image"]
    np.testing.assert_array_equal(decode_image(golden[f"{name}/jpeg"].item()), golden[f"{name}/decoded"])
    np.testing.assert_array_equal(jpeg_round_trip(image), golden[f"{name}/decoded"])
    resized = resize_lanczos3(chw(image), 224)
    assert differences(resized, golden[f"{name}/resized"]).sum() == 0
    assert differences(center_crop(resized), golden[f"{name}/cropped"]).sum() == 0
    assert differences(observation_image(image), golden[f"{name}/observation"]).sum() == 0


@pytest.mark.parametrize("name", IMAGES)
def test_the_quick_resize_is_off_by_one_in_few_values(golden: dict[str, np.ndarray], name: str) -> None:
    """Artificial ramps have more ties to round than pictures."""
    off = differences(resize_lanczos3(chw(golden[f"{name}/image"]), 224, exact=False), golden[f"{name}/resized"])
    assert off.max() <= 1
    assert off.float().mean() < (2e-3 if name == "smooth" else 1e-4)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("number", range(3))
def test_augmentation_follows_tensorflow(golden: dict[str, np.ndarray], name: str, number: int) -> None:
    """The same crop and colour changes; a few values differ by one level because a mean is summed in another order."""
    draws = images._applied(golden["draws"][number].astype(np.float32)[None], 0.9, (224, 224))
    columns = images._to_columns(chw(golden[f"{name}/resized"])[None])
    off = differences(images._augment(columns, draws)[0].byte(), golden[f"{name}/augmented{number}"])
    assert off.max() <= 1
    assert off.float().mean() < 1e-4


# --- documented figures -----------------------------------------------------------------------------------------------


def test_lanczos_weights() -> None:
    starts, weights = images._lanczos3_taps(256, 224)
    expected = {
        0: (0, [0.8878951, 0.1719908, -0.0778431, 0.0179572]),
        1: (0, [-0.041017, 0.8158813, 0.3069512, -0.106086, 0.0242705]),
        111: (124, [0.0176622, -0.0765643, 0.1691642, 0.8733141, 0.0493458, -0.0428156, 0.0098935]),
    }
    for x, (start, values) in expected.items():
        assert starts[x] == start
        np.testing.assert_allclose(weights[x, : len(values)], values, atol=1e-6)
        assert not weights[x, len(values) :].any()


def test_center_crop_geometry() -> None:
    """On a ramp of 224 values, row i becomes 5.721816 + 0.9486833 i."""
    ramp = torch.arange(224, dtype=torch.uint8)[None, :, None].expand(3, 224, 224)
    expected = 5.721816 + 0.9486833 * torch.arange(224)
    cropped = center_crop(ramp)[0, :, 100].float()
    assert (cropped - torch.trunc(expected * 255.5 / 255)).abs().max() <= 1
    assert cropped[0] == 5
    assert cropped[-1] == 217


def test_resize_to_the_same_size_changes_nothing() -> None:
    image = picture(0, 224, 224)
    assert torch.equal(resize_lanczos3(image, 224), image)


def test_jpeg_keeps_a_picture_recognisable() -> None:
    y, x = np.mgrid[0:64, 0:64]
    image = np.stack([2 * x, 2 * y, x + y], -1).astype(np.uint8)
    assert np.abs(jpeg_round_trip(image).astype(int) - image).mean() < 3


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_pixels_depend_on_the_seed_alone() -> None:
    """Not on the place in the batch, the batch size, or what was augmented before."""
    batch = picture(1, 5, 2, 96, 80)
    seeds = sample_seeds(7, 3, torch.arange(100, 105))
    whole = prepare_images(batch, 64, seeds)
    assert whole.shape == (5, 2, 3, 64, 64)
    assert whole.dtype == torch.uint8
    order = torch.tensor([4, 0, 2])
    assert torch.equal(prepare_images(batch[order], 64, seeds[order]), whole[order])
    assert torch.equal(prepare_images(batch.contiguous(memory_format=torch.contiguous_format), 64, seeds), whole)
    for other in (sample_seeds(8, 3, torch.arange(100, 105)), sample_seeds(7, 4, torch.arange(100, 105))):
        changed = prepare_images(batch, 64, other)
        assert not any(torch.equal(changed[b, v], whole[b, v]) for b in range(5) for v in range(2))


def test_views_of_a_sample_differ() -> None:
    batch = picture(2, 1, 1, 64, 64).expand(1, 2, 3, 64, 64)
    out = prepare_images(batch, 64, sample_seeds(0, 0, torch.tensor([0])))
    assert not torch.equal(out[0, 0], out[0, 1])


def test_without_seeds_images_are_only_resized() -> None:
    batch = picture(3, 2, 2, 96, 96)
    assert torch.equal(prepare_images(batch, 64), resize_lanczos3(batch, 64, exact=False))


def draws_of(count: int, options: Augmentation) -> np.ndarray:
    return images._draws(sample_seeds(0, 0, torch.arange(count)), options)


def test_crops_slide_along_the_diagonal_only_by_default() -> None:
    """The original's quirk is kept unless it is switched off."""
    top, left = draws_of(500, Augmentation())[:, :2].T
    assert np.array_equal(top, left)
    top, left = draws_of(500, Augmentation(diagonal_crop=False))[:, :2].T
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.15


def test_draws_cover_their_ranges_evenly() -> None:
    draws = draws_of(4000, Augmentation(diagonal_crop=False))
    room = 1 - np.sqrt(0.9)
    ranges = [(0, room), (0, room), (-0.2, 0.2), (0.8, 1.2), (0.8, 1.2), (-0.05, 0.05)]
    for values, (low, high) in zip(draws.T, ranges, strict=True):
        assert values.min() >= low
        assert values.max() <= high
        counts = np.histogram(values, bins=10, range=(low, high))[0]
        assert counts.min() > 300, "4000 draws in 10 bins"
    correlation = np.corrcoef(draws.T) - np.eye(6)
    assert np.abs(correlation).max() < 0.08


def test_strengths_of_zero_leave_the_picture() -> None:
    image = picture(4, 1, 48, 48)
    nothing = Augmentation(crop_area=1.0, brightness=0, contrast=(1, 1), saturation=(1, 1), hue=0)
    assert (augment(image, torch.tensor([5]), nothing).int() - image.int()).abs().max() <= 1


# --- errors -----------------------------------------------------------------------------------------------------------


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected images uint8 \[..., 3, H, W\], got torch.float32"):
        resize_lanczos3(torch.zeros(3, 8, 8), 4)
    with pytest.raises(ValueError, match=r"got torch.uint8 \[8, 8, 3\]"):
        resize_lanczos3(torch.zeros(8, 8, 3, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="one seed per image"):
        augment(picture(0, 2, 8, 8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="not a readable JPEG or PNG"):
        decode_image(b"\xff\xd8 no picture")
    with pytest.raises(ValueError, match="RGB image uint8"):
        observation_image(np.zeros((8, 8, 4), np.uint8))
    data = encode_jpeg(np.zeros((16, 24, 3), np.uint8))
    for shape in ((24, 16, 3), (16, 23, 3), (32, 24, 3)):
        with pytest.raises(ValueError, match="24"):
            decode_image(data, np.empty(shape, np.uint8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_pictures() -> None:
    batch = picture(6, 4, 2, 256, 256)
    seeds = sample_seeds(0, 0, torch.arange(4))
    assert torch.equal(resize_lanczos3(batch.cuda(), 224).cpu(), resize_lanczos3(batch, 224))
    off = (prepare_images(batch.cuda(), 224, seeds).cpu().int() - prepare_images(batch, 224, seeds).int()).abs()
    assert off.max() <= 1
    assert off.float().mean() < 1e-4
