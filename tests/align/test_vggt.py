"""The VGGT aggregator and its loader."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from prismo.align import VGGTAggregator, VGGTConfig, load_teacher, load_vggt
from prismo.align.random_teacher import random_vggt
from prismo.align.vggt import _rope_table, resize
from prismo.models.vit import apply_rope
from tests.align.conftest import TINY

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def test_published_size() -> None:
    with torch.device("meta"):
        model = VGGTAggregator()
    state = model.state_dict()
    assert len(state) == 1210
    assert sum(value.numel() for value in state.values()) == 909_112_320
    assert state["patch_embed.patch_embed.proj.weight"].shape == (1024, 3, 14, 14)
    assert state["patch_embed.pos_embed"].shape == (1, 1370, 1024)
    assert state["global_blocks.23.attn.q_norm.weight"].shape == (64,)
    assert model.frame_blocks[0].norm1.eps == model.frame_blocks[0].attn.q_norm.eps == 1e-5
    assert model.patch_embed.norm.eps == model.patch_embed.blocks[0].norm1.eps == 1e-6
    assert (model.width, model.layers, model.patch_start_idx) == (2048, 24, 5)


@pytest.mark.parametrize("kind", ["model.pt", "model.safetensors", "folder"])
def test_load_official_layout(kind: str, teacher: VGGTAggregator, vggt_state: State, tmp_path: Path) -> None:
    if kind == "model.safetensors":
        save_file(vggt_state, tmp_path / kind)
    else:
        torch.save(vggt_state, tmp_path / "model.pt")
    loaded = load_vggt(tmp_path if kind == "folder" else tmp_path / kind)
    assert loaded.config == TINY
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    expected = teacher.state_dict()
    assert expected.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_random_teacher_takes_the_sizes_of_a_file(vggt_file: Path) -> None:
    first, second = load_teacher("random", vggt_file), load_teacher("random", vggt_file)
    assert first.config == TINY
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.isfinite(a).all(), name
    other = random_vggt(vggt_file, seed=1)
    assert not torch.equal(first.patch_embed.pos_embed, other.patch_embed.pos_embed)
    assert first.frame_blocks[0].ls1.gamma.unique().tolist() == pytest.approx([0.01])


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("aggregator.camera_token"), "missing: aggregator.camera_token"),
        (without("aggregator.global_blocks.1.ls2.gamma"), "missing: aggregator.global_blocks.1.ls2.gamma"),
        (without("aggregator.patch_embed.pos_embed"), "aggregator.patch_embed.pos_embed is missing"),
        (lambda s: s | {"aggregator.extra": torch.ones(2)}, "unknown: aggregator.extra"),
        (lambda s: s | {"aggregator.camera_token": torch.ones(1, 2, 1, 3)}, "wrong shape: aggregator.camera_token"),
        (lambda s: s | {"aggregator.patch_embed.pos_embed": torch.ones(1, 18, 64)}, "17 patch positions"),
        (lambda s: s | {"language_model.norm": torch.ones(2)}, "not a VGGT checkpoint.*language_model.norm"),
        (lambda s: {k.removeprefix("aggregator."): v for k, v in s.items()}, "not a VGGT checkpoint"),
        (lambda s: s | {"aggregator.camera_token": "text"}, "missing: aggregator.camera_token"),
        (lambda s: {}, "not a VGGT checkpoint"),
        (lambda s: torch.ones(2), "not a VGGT checkpoint"),
    ],
)
def test_files_that_do_not_fit(
    change: Callable[[State], State], message: str, vggt_state: State, tmp_path: Path
) -> None:
    torch.save(change(vggt_state), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        load_vggt(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_truncated_file(name: str, vggt_state: State, tmp_path: Path) -> None:
    path = tmp_path / name
    (save_file if path.suffix == ".safetensors" else torch.save)(vggt_state, path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=f"cannot read VGGT weights from .*{name}"):
        load_vggt(path)


def test_no_code_is_run_from_a_file(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "hacked",))

    torch.save({"aggregator.camera_token": Attack()}, tmp_path / "model.pt")
    (tmp_path / "legacy.pt").write_bytes(pickle.dumps(Attack(), protocol=2))
    for name in ("model.pt", "legacy.pt"):
        with pytest.raises(ValueError, match="cannot read VGGT weights"):
            load_vggt(tmp_path / name)
    assert not (tmp_path / "hacked").exists()


def test_missing_file_and_dtype(tmp_path: Path, vggt_file: Path) -> None:
    for path in (tmp_path, tmp_path / "model.pt", None):
        with pytest.raises(FileNotFoundError, match="facebook/VGGT-1B"):
            load_teacher("vggt", path)
    with pytest.raises(ValueError, match=r"torch\.float16"):
        load_vggt(vggt_file, dtype=torch.float16)
    with pytest.raises(ValueError, match="unknown teacher 'vgt'"):
        load_teacher("vgt", vggt_file)


def test_layers(teacher: VGGTAggregator, images: Tensor) -> None:
    outputs = [teacher(images, layer) for layer in range(3)]
    assert outputs[0].shape == (2, 3, 1 + 2 + 16, 128)
    assert torch.equal(teacher(images, -1), outputs[2])
    assert torch.equal(teacher(images, -3), outputs[0])
    assert not torch.allclose(outputs[0], outputs[1])
    for layer in (3, -4):
        with pytest.raises(ValueError, match="3 layers, choose -3 to 2"):
            teacher(images, layer)


def test_features_are_the_resized_images_patches(teacher: VGGTAggregator) -> None:
    images = torch.rand(1, 2, 3, 28, 28)
    features = teacher.features(images, 0)
    assert features.shape == (1, 2, 4, 4, teacher.width)
    assert torch.equal(features.flatten(2, 3), teacher(resize(images, 56, 14), 0)[:, :, teacher.patch_start_idx :])


def test_nothing_behind_the_layer_is_computed(teacher: VGGTAggregator, images: Tensor) -> None:
    ran = []
    blocks = [*teacher.frame_blocks, *teacher.global_blocks]
    hooks = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks)]
    teacher(images, 1)
    for hook in hooks:
        hook.remove()
    assert ran == [0, 3, 1, 4]


def test_output_is_the_frame_block_beside_the_global_block(teacher: VGGTAggregator, images: Tensor) -> None:
    kept = {}
    hooks = [
        teacher.frame_blocks[1].register_forward_hook(lambda m, i, o: kept.update(frame=o)),
        teacher.global_blocks[1].register_forward_hook(lambda m, i, o: kept.update(globl=o)),
    ]
    output = teacher(images, 1)
    for hook in hooks:
        hook.remove()
    assert kept["frame"].shape == (6, 19, 64)
    assert kept["globl"].shape == (2, 57, 64)
    assert torch.equal(output[..., :64], kept["frame"].view(2, 3, 19, 64))
    assert torch.equal(output[..., 64:], kept["globl"].view(2, 3, 19, 64))


def test_rope_turns_rows_and_columns() -> None:
    # Written out from the definition: the first 32 channels turn with the row, the rest with the column, in pairs
    # (i, i + 16); special tokens sit at the origin and do not turn.
    table = _rope_table(2, 3, 1, 1, torch.device("cpu"), torch.float32)
    x = torch.randn(1, 1, 7, 64)
    turned = apply_rope(x, table)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    for token in range(6):
        for half, position in enumerate((token // 3 + 1, token % 3 + 1)):
            for i in range(16):
                a, b = x[0, 0, token + 1, 32 * half + i], x[0, 0, token + 1, 32 * half + 16 + i]
                angle = torch.tensor(position * 100 ** (-2 * i / 32))
                expected = torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])
                actual = turned[0, 0, token + 1, [32 * half + i, 32 * half + 16 + i]]
                assert torch.allclose(actual, expected, atol=1e-5)


def test_rope_tables_are_built_once(teacher: VGGTAggregator, images: Tensor) -> None:
    teacher(images)
    before = _rope_table.cache_info()
    teacher(images)
    after = _rope_table.cache_info()
    assert after.misses == before.misses
    assert after.hits > before.hits


def test_views_see_each_other_only_in_global_blocks(teacher: VGGTAggregator, images: Tensor) -> None:
    changed = images.clone()
    changed[:, 2] = 0
    before, after = teacher(images, 0), teacher(changed, 0)
    assert torch.equal(before[:, :2, :, :64], after[:, :2, :, :64])
    assert not torch.allclose(before[:, :2, :, 64:], after[:, :2, :, 64:])


@pytest.mark.parametrize("missing", [[2], [1], [0], [0, 2]])
def test_missing_views_leave_the_scene(missing: list[int], teacher: VGGTAggregator, images: Tensor) -> None:
    present = [view for view in range(3) if view not in missing]
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, missing] = False  # sample 1 has all views
    masked = teacher(images, -1, mask)
    alone = teacher(images[:, present], -1)
    assert torch.allclose(masked[0, present], alone[0], atol=1e-5)
    assert torch.allclose(masked[1], teacher(images, -1)[1], atol=1e-5)


def test_a_sample_without_views_gives_no_nan(teacher: VGGTAggregator, images: Tensor) -> None:
    assert teacher(images, -1, torch.zeros(2, 3, dtype=torch.bool)).isfinite().all()


def test_bf16_is_close_to_fp32(teacher: VGGTAggregator, vggt_file: Path, images: Tensor) -> None:
    low = load_vggt(vggt_file, dtype=torch.bfloat16)
    inside = []
    low.frame_blocks[0].register_forward_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        output = low(images)
    assert inside == [False]  # on a GPU the trainer's autocast would widen every LayerNorm output to fp32
    assert output.dtype == torch.bfloat16
    cosine = torch.cosine_similarity(output.float(), teacher(images), dim=-1)
    assert cosine.min() > 0.99


def test_fp32_weights_keep_the_residual_stream_in_fp32_under_autocast(teacher: VGGTAggregator, images: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output = teacher(images)
    assert output.dtype == torch.float32
    assert torch.cosine_similarity(output, teacher(images), dim=-1).min() > 0.99


@pytest.mark.parametrize(
    ("given", "expected"), [((224, 224), (518, 518)), ((480, 640), (392, 518)), ((640, 480), (518, 392))]
)
def test_resize_keeps_the_aspect_ratio(given: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resize(torch.rand(1, 2, 3, *given), 518, 14).shape[-2:] == expected


def test_other_image_shapes_resample_the_positions(teacher: VGGTAggregator) -> None:
    features = teacher.features(torch.rand(1, 2, 3, 48, 96), -1)
    assert features.shape == (1, 2, 2, 4, 128)
    assert features.isfinite().all()


@pytest.mark.slow
def test_compiled_blocks_give_the_same(images: Tensor, teacher: VGGTAggregator, vggt_file: Path) -> None:
    compiled = load_vggt(vggt_file, compile=True)
    with torch.no_grad():
        assert torch.allclose(compiled(images), teacher(images), atol=1e-4)
    assert compiled.state_dict().keys() == teacher.state_dict().keys()


def test_config_defaults_are_vggt_1b() -> None:
    assert VGGTConfig() == VGGTConfig(width=1024, depth=24, patch_depth=24, image_size=518, registers=4)
