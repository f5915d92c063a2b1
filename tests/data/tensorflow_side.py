"""What the data tests need from TensorFlow, in one process of its own (it must not share one with MuJoCo).

    python tensorflow_side.py OUT INPUT_FOLDER...

Writes into OUT: RLDS datasets made by tensorflow-datasets with their values (`written.npz`), results of TensorFlow's
image operations (`images.npz`), the original's scaling (`scaling.npz`), and for every INPUT_FOLDER, an RLDS version
folder, the values that tensorflow-datasets reads from it (`read_{i}.npz`).
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_lengths import LENGTHS, UNNAMED

INSTRUCTIONS = ("pick up the bowl", "nimm die Schüssel ☕", "把碗放在盘子上")


class Builder(tfds.core.GeneratorBasedBuilder):
    """A dataset in the published layout with what else occurs in the wild: PNG cameras of another size, float64 and
    integer features, tensors stored as compressed bytes, images without a fixed size."""

    name = "liber_o10"  # the published libero_10 has this prefix, unlike its folder
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        f = tfds.features
        observation = f.FeaturesDict(
            {
                "image": f.Image(shape=(64, 64, 3), encoding_format="jpeg"),
                "wrist_image": f.Image(shape=(64, 64, 3), encoding_format="jpeg"),
                "png": f.Image(shape=(48, 80, 3), encoding_format="png"),
                "any_size": f.Image(),
                "state": f.Tensor(shape=(8,), dtype=np.float32),
                "double": f.Tensor(shape=(2,), dtype=np.float64),
                "matrix": f.Tensor(shape=(2, 3), dtype=np.int32),
                "zipped": f.Tensor(shape=(3,), dtype=np.float32, encoding="zlib"),
            }
        )
        steps = f.FeaturesDict(
            {
                "observation": observation,
                "action": f.Tensor(shape=(7,), dtype=np.float32),
                "reward": f.Scalar(dtype=np.float32),
                "is_first": f.Scalar(dtype=np.bool_),
                "is_last": f.Scalar(dtype=np.bool_),
                "language_instruction": f.Text(),
            }
        )
        episode = {"steps": f.Dataset(steps), "episode_metadata": f.FeaturesDict({"file_path": f.Text()})}
        return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict(episode))

    def _split_generators(self, _: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(0), "val": self._generate_examples(1)}

    def _generate_examples(self, split: int) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, length in enumerate(LENGTHS if split == 0 else LENGTHS[:5]):
            rng = np.random.default_rng([split, number])
            text = INSTRUCTIONS[number % 3] if number != UNNAMED else ""
            steps = [make_step(rng, t, length, text) for t in range(length)]
            yield f"{split}-{number}", {"steps": steps, "episode_metadata": {"file_path": f"demo_{number}.hdf5"}}


def make_step(rng: np.random.Generator, t: int, length: int, text: str) -> dict[str, Any]:
    def image(height: int, width: int) -> np.ndarray:
        smooth = np.linspace(0, 200, width)[None, :, None] + rng.normal(0, 20, (height, width, 3))
        return smooth.clip(0, 255).astype(np.uint8)

    return {
        "observation": {
            "image": image(64, 64),
            "wrist_image": image(64, 64),
            "png": image(48, 80),
            "any_size": image(20 + t % 3, 30),
            "state": rng.normal(size=8).astype(np.float32),
            "double": rng.normal(size=2),
            "matrix": rng.integers(-(2**20), 2**20, (2, 3)).astype(np.int32),
            "zipped": rng.normal(size=3).astype(np.float32),
        },
        "action": np.append(rng.normal(size=6), rng.choice([-1, 1])).astype(np.float32),
        "reward": np.float32(t == length - 1),
        "is_first": t == 0,
        "is_last": t == length - 1,
        "language_instruction": text,
    }


def write_datasets(out: Path) -> None:
    builder = Builder(data_dir=out / "tfds")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=4))
    target = out / "data" / "libero_10_no_noops"
    target.mkdir(parents=True)
    Path(builder.data_dir).rename(target / "1.0.0")
    read_dataset(target / "1.0.0", out / "written.npz")


def read_dataset(folder: Path, path: Path) -> None:
    """All values as tensorflow-datasets reads them: `{split}/{episode}/{entry}`."""
    builder = tfds.builder_from_directory(str(folder))
    values: dict[str, Any] = {}
    for split in builder.info.splits:
        for number, episode in enumerate(builder.as_dataset(split=split, shuffle_files=False)):
            steps = [tf.nest.map_structure(lambda x: x.numpy(), step) for step in episode["steps"]]
            collect(values, f"{split}/{number}/steps", steps)
            for name, value in episode["episode_metadata"].items():
                values[f"{split}/{number}/episode_metadata/{name}"] = value.numpy()
    np.savez(path, **values)


def collect(values: dict[str, Any], prefix: str, steps: list[Any]) -> None:
    if isinstance(steps[0], dict):
        for name in steps[0]:
            collect(values, f"{prefix}/{name}", [step[name] for step in steps])
    elif len({np.shape(step) for step in steps}) == 1:
        values[prefix] = np.stack(steps)
    else:
        for t, step in enumerate(steps):
            values[f"{prefix}/{t}"] = step


# Crop top and left, brightness, contrast, saturation, hue.
DRAWS = np.array(
    [[0.0123, 0.04, 0.13, 0.87, 1.17, -0.031], [0.05, 0.001, -0.19, 1.13, 0.81, 0.049], [0, 0, 0, 1, 1, 0]], np.float32
)


def image_operations(path: Path) -> None:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:256, 0:256]
    smooth = np.stack([128 + 100 * np.sin(x / 20), 128 + 100 * np.cos(y / 30), (x + y) / 2], -1).astype(np.uint8)
    noise = {size: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((256, 256), (480, 640), (128, 128))}
    values = {"draws": DRAWS}
    for name, image in {"smooth": smooth, **{f"{h}x{w}": image for (h, w), image in noise.items()}}.items():
        jpeg = tf.io.encode_jpeg(image, quality=95)
        decoded = tf.io.decode_image(jpeg)
        resized = resize(image)
        values |= {
            f"{name}/image": image,
            f"{name}/jpeg": jpeg.numpy(),
            f"{name}/decoded": decoded.numpy(),
            f"{name}/resized": resized.numpy(),
            f"{name}/cropped": center_crop(resized).numpy(),
            f"{name}/observation": center_crop(resize(decoded)).numpy(),
            **{f"{name}/augmented{i}": augment(resized, draw).numpy() for i, draw in enumerate(DRAWS)},
        }
    np.savez(path, **values)


def resize(image: Any) -> Any:
    image = tf.image.resize(image, (224, 224), method="lanczos3", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)


def crop(image: Any, top: Any, left: Any, side: Any) -> Any:
    image = tf.image.convert_image_dtype(image, tf.float32)
    box = tf.stack([[top], [left], [top + side], [left + side]], axis=1)
    return tf.clip_by_value(tf.image.crop_and_resize(image[None], box, [0], (224, 224))[0], 0, 1)


def center_crop(image: Any) -> Any:
    side = tf.sqrt(0.9)
    image = crop(image, (1 - side) / 2, (1 - side) / 2, side)
    return tf.image.convert_image_dtype(image, tf.uint8, saturate=True)


def augment(image: Any, draw: np.ndarray) -> Any:
    top, left, brightness, contrast, saturation, hue = draw
    image = crop(image, top, left, tf.sqrt(0.9))
    for change, amount in (
        (tf.image.adjust_brightness, brightness),
        (tf.image.adjust_contrast, contrast),
        (tf.image.adjust_saturation, saturation),
        (tf.image.adjust_hue, hue),
    ):
        image = tf.clip_by_value(change(image, amount), 0, 1)
    return tf.image.convert_image_dtype(image, tf.uint8, saturate=True)


def scaling(path: Path) -> None:
    """The original's training rule (bounds_q99) in float32, with a masked and a motionless dimension."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 4)).astype(np.float32)
    x[:, 2] = 0.25
    low, high = np.quantile(x.astype(np.float64), [0.01, 0.99], axis=0)
    mask = np.array([True, True, True, False])
    scaled = tf.clip_by_value(2 * (tf.constant(x) - low) / (high - low + 1e-8) - 1, -1, 1)
    scaled = tf.where(x.min(0) == x.max(0), 0.0, tf.where(mask, scaled, x))
    np.savez(path, x=x, low=low, high=high, mask=mask, scaled=scaled.numpy())


def main() -> None:
    out, *folders = map(Path, sys.argv[1:])
    write_datasets(out)
    image_operations(out / "images.npz")
    scaling(out / "scaling.npz")
    for number, folder in enumerate(folders):
        read_dataset(folder, out / f"read_{number}.npz")


if __name__ == "__main__":
    main()
