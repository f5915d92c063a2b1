"""The alignment loss: value, masks, frozen teacher, errors."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from prismo.align import AlignProjector, AlignRecipe, SpatialForcing, VGGTAggregator
from prismo.align.random_teacher import random_vggt
from prismo.align.spatial_forcing import token_cosine
from prismo.models.component_files import load_component, save_component
from tests.align.conftest import TINY

BATCH, VIEWS, SIDE, HIDDEN = 2, 3, 4, 24
TOKENS = VIEWS * SIDE**2


@pytest.fixture
def spatial_forcing(teacher: VGGTAggregator) -> SpatialForcing:
    torch.manual_seed(0)
    return SpatialForcing(teacher, hidden_size=HIDDEN)


@pytest.fixture
def batch() -> SimpleNamespace:
    generator = torch.Generator().manual_seed(1)
    return SimpleNamespace(
        images=torch.rand(BATCH, VIEWS, 3, 56, 56, generator=generator),
        hidden=torch.randn(BATCH, TOKENS, HIDDEN, generator=generator).requires_grad_(),
    )


def test_recipe_defaults_and_preset() -> None:
    assert AlignRecipe() == AlignRecipe(-1, -1, "bilinear", False, False, "cosine", 0.5, True)
    assert AlignRecipe.spatial_forcing() == AlignRecipe(24, -1, "bilinear", True, True, "cosine", 0.5, True)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"pooling_func": "bilinaer"}, "Did you mean 'bilinear'"),
        ({"align_loss_type": "l2"}, "unknown align_loss_type 'l2'"),
        ({"align_loss_coeff": -1.0}, "align_loss_coeff must be"),
        ({"align_loss_coeff": float("nan")}, "align_loss_coeff must be"),
    ],
)
def test_bad_settings(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignRecipe(**setting)


@pytest.mark.parametrize("recipe", [AlignRecipe.spatial_forcing(), AlignRecipe(vggt_layers_align=0)])
def test_loss_is_the_weighted_mean_over_all_tokens(
    recipe: AlignRecipe, teacher: VGGTAggregator, batch: SimpleNamespace
) -> None:
    spatial_forcing = SpatialForcing(teacher, hidden_size=HIDDEN, recipe=recipe)
    loss, metrics = spatial_forcing(batch.images, batch.hidden)
    target = spatial_forcing.targets(batch.images, (SIDE, SIDE))
    x = batch.hidden
    if recipe.use_vlm_norm:
        x = F.layer_norm(x, (HIDDEN,))
    weights = spatial_forcing.projector
    x = F.gelu(x @ weights.fc1.weight.T + weights.fc1.bias) @ weights.fc2.weight.T + weights.fc2.bias
    expected = (1 - F.cosine_similarity(x, target, dim=-1)).mean()
    assert metrics["align_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    assert metrics["align_cosine"].item() == pytest.approx(1 - expected.item(), abs=1e-5)
    by_view = [metrics[f"align_cosine_view{i}"].item() for i in range(VIEWS)]
    assert sum(by_view) / VIEWS == pytest.approx(1 - expected.item(), abs=1e-5)


def test_cosine_is_normalised_over_channels() -> None:
    # Along any other axis these tokens, equal up to a positive factor per token, would not give exactly 1.
    target = torch.randn(2, 5, 7)
    factor = torch.tensor([0.1, 1, 10, 100, 1000])[None, :, None]
    assert torch.allclose(token_cosine(target * factor, target), torch.ones(2, 5))
    assert torch.allclose(token_cosine(-target, target), -torch.ones(2, 5))


def test_cosine_is_fp32_under_autocast() -> None:
    a, b = torch.randn(4, 512), torch.randn(4, 512)
    with torch.autocast("cpu", torch.bfloat16):
        cosine = token_cosine(a.bfloat16(), b)
    assert cosine.dtype == torch.float32
    assert torch.allclose(cosine, F.cosine_similarity(a.bfloat16().double(), b.double(), dim=-1).float(), atol=1e-6)


def test_a_zero_token_has_a_finite_gradient() -> None:
    zero = torch.zeros(1, 8, requires_grad=True)
    token_cosine(zero, torch.randn(1, 8)).sum().backward()
    assert zero.grad.isfinite().all()


def test_gradients_reach_vla_and_projector_only(spatial_forcing: SpatialForcing, batch: SimpleNamespace) -> None:
    loss, metrics = spatial_forcing(batch.images, batch.hidden)
    loss.backward()
    assert batch.hidden.grad.abs().sum() > 0
    assert all(p.grad is not None for p in spatial_forcing.parameters())
    assert all(p.grad is None for p in spatial_forcing.teacher.parameters())
    assert not any(value.requires_grad for value in metrics.values())


def test_training_raises_the_cosine(spatial_forcing: SpatialForcing, batch: SimpleNamespace) -> None:
    optimizer = torch.optim.Adam([*spatial_forcing.parameters(), batch.hidden], lr=3e-3)
    cosines = []
    for _ in range(30):
        loss, metrics = spatial_forcing(batch.images, batch.hidden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosines.append(metrics["align_cosine"].item())
    assert cosines[-1] > cosines[0] + 0.3


def test_teacher_is_frozen_and_invisible(spatial_forcing: SpatialForcing) -> None:
    names = {"projector." + n for n in ("vlm_norm.weight", "vlm_norm.bias", "fc1.weight", "fc1.bias")}
    names |= {"projector.fc2.weight", "projector.fc2.bias"}
    assert set(spatial_forcing.state_dict()) == names
    assert {name for name, _ in spatial_forcing.named_parameters()} == names
    assert not list(spatial_forcing.buffers())
    parent = nn.ModuleList([spatial_forcing]).train()
    assert parent.training
    assert not spatial_forcing.teacher.training


def test_teacher_goes_back_to_eval(
    spatial_forcing: SpatialForcing, batch: SimpleNamespace, teacher: VGGTAggregator
) -> None:
    nn.ModuleList([teacher]).train()  # a parent that owns the teacher itself
    assert teacher.training
    loss, _ = spatial_forcing(batch.images, batch.hidden)
    assert not teacher.training
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_moving_takes_the_teacher_along_and_keeps_its_dtype(spatial_forcing: SpatialForcing) -> None:
    spatial_forcing.to(torch.bfloat16)
    assert spatial_forcing.projector.fc1.weight.dtype == torch.bfloat16
    assert spatial_forcing.teacher.camera_token.dtype == torch.float32
    if torch.cuda.is_available():
        spatial_forcing.cuda()
        assert spatial_forcing.teacher.camera_token.is_cuda
        spatial_forcing.cpu()


def ddp_rank(rank: int, folder: Path) -> None:
    """One of two processes: other images and another teacher on each, one step under DistributedDataParallel."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    teacher = random_vggt(config=TINY, seed=rank)
    torch.manual_seed(rank)
    wrapped = DistributedDataParallel(SpatialForcing(teacher, hidden_size=HIDDEN))
    loss, _ = wrapped(torch.rand(1, 1, 3, 56, 56), torch.randn(1, SIDE**2, HIDDEN, requires_grad=True))
    loss.backward()
    result = {"grad": wrapped.module.projector.fc1.weight.grad, "pos_embed": teacher.patch_embed.pos_embed}
    torch.save(result, folder / f"rank{rank}.pt")
    dist.barrier()
    # No clean-up: a process group freed under the GIL and gloo's thread can wait for each other forever.
    os._exit(0)


@pytest.mark.processes
def test_ddp_synchronises_the_projector_and_not_the_teacher(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(ddp_rank, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first["grad"].abs().sum() > 0
    assert torch.equal(first["grad"], second["grad"])
    assert not torch.equal(first["pos_embed"], second["pos_embed"])


@pytest.mark.parametrize("norm", [True, False])
def test_projector_layout_and_initialisation(norm: bool) -> None:
    with torch.device("meta"):
        published = AlignProjector(4096, 2048, use_vlm_norm=norm)
    assert sum(p.numel() for p in published.parameters()) == 12_587_008 + 8_192 * norm
    projector = AlignProjector(64, 32, use_vlm_norm=norm)
    keys = {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"} | (
        {"vlm_norm.weight", "vlm_norm.bias"} if norm else set()
    )
    assert set(projector.state_dict()) == keys
    assert projector.fc1.bias.abs().sum() == projector.fc2.bias.abs().sum() == 0
    bound = (6 / (64 + 32)) ** 0.5  # Xavier uniform
    assert 0.95 * bound < projector.fc1.weight.abs().max() <= bound


def test_projector_file(spatial_forcing: SpatialForcing, teacher: VGGTAggregator, tmp_path: Path) -> None:
    path = save_component(spatial_forcing.projector, tmp_path, "align_projector", 7)
    assert path.name == "align_projector--7_checkpoint.pt"
    restored = SpatialForcing(teacher, hidden_size=HIDDEN)
    load_component(restored.projector, tmp_path, "align_projector")
    for name, value in spatial_forcing.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name])
    without_norm = SpatialForcing(teacher, hidden_size=HIDDEN, recipe=AlignRecipe())
    with pytest.raises(ValueError, match="use_vlm_norm"):
        load_component(without_norm.projector, tmp_path, "align_projector")


def test_cosine_map(spatial_forcing: SpatialForcing, batch: SimpleNamespace) -> None:
    _, metrics = spatial_forcing(batch.images, batch.hidden, return_map=True)
    cosine = metrics["align_cosine_map"]
    assert cosine.shape == (BATCH, VIEWS, SIDE, SIDE)
    assert cosine[:, 1].mean().item() == pytest.approx(metrics["align_cosine_view1"].item(), abs=1e-6)
    assert "align_cosine_map" not in spatial_forcing(batch.images, batch.hidden)[1]


def test_bf16_hidden_states_without_autocast(spatial_forcing: SpatialForcing, batch: SimpleNamespace) -> None:
    loss, _ = spatial_forcing(batch.images, batch.hidden)
    low, _ = spatial_forcing(batch.images.bfloat16(), batch.hidden.bfloat16())
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(loss.item(), rel=1e-2)


def test_rectangular_patch_grid(teacher: VGGTAggregator) -> None:
    hidden = torch.randn(1, 2 * 15, HIDDEN)
    spatial_forcing = SpatialForcing(teacher, hidden_size=HIDDEN, grid=(3, 5))
    _, metrics = spatial_forcing(torch.rand(1, 2, 3, 84, 140), hidden, return_map=True)
    assert metrics["align_cosine_map"].shape == (1, 2, 3, 5)


# Masks


def test_masks_that_are_all_true_change_nothing(spatial_forcing: SpatialForcing, batch: SimpleNamespace) -> None:
    plain, _ = spatial_forcing(batch.images, batch.hidden)
    masked, _ = spatial_forcing(
        batch.images,
        batch.hidden,
        torch.ones(BATCH, TOKENS, dtype=torch.bool),
        view_mask=torch.ones(BATCH, VIEWS, dtype=torch.bool),
        pixel_mask=torch.ones(BATCH, VIEWS, 56, 56, dtype=torch.bool),
    )
    assert masked.item() == pytest.approx(plain.item(), rel=1e-5)


def test_token_mask_is_a_mean_per_sample(spatial_forcing: SpatialForcing, batch: SimpleNamespace) -> None:
    mask = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    mask[0, :5], mask[1, 7] = True, True
    _, full = spatial_forcing(batch.images, batch.hidden, return_map=True)
    _, metrics = spatial_forcing(batch.images, batch.hidden, mask, return_map=True)
    cosine = full["align_cosine_map"].flatten(1)
    expected = ((1 - cosine[0, :5]).mean() + (1 - cosine[1, 7])) / 2
    assert metrics["align_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(metrics["align_cosine_map"].flatten(1), cosine * mask, atol=1e-6)


def test_samples_without_tokens_are_left_out(spatial_forcing: SpatialForcing, batch: SimpleNamespace) -> None:
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[0] = False
    one, _ = spatial_forcing(batch.images, batch.hidden, mask)
    alone, _ = spatial_forcing(batch.images[1:], batch.hidden[1:])
    assert one.item() == pytest.approx(alone.item(), rel=1e-5)


def test_nothing_to_align_gives_zero_and_no_nan(spatial_forcing: SpatialForcing, batch: SimpleNamespace) -> None:
    images = torch.full_like(batch.images, float("nan"))
    loss, metrics = spatial_forcing(images, batch.hidden, view_mask=torch.zeros(BATCH, VIEWS, dtype=torch.bool))
    assert loss.item() == 0
    assert all(value.isfinite().all() for value in metrics.values())
    loss.backward()
    assert batch.hidden.grad.abs().sum() == 0
    assert all(p.grad.isfinite().all() for p in spatial_forcing.parameters())


def filled(batch: SimpleNamespace, pixels: Tensor, tokens: Tensor, value: float) -> tuple[Tensor, Tensor]:
    """The batch with other content where `pixels` [B, V, H, W] and `tokens` [B, T] are False."""
    images = torch.where(pixels[:, :, None], batch.images, value)
    return images, torch.where(tokens[..., None], batch.hidden, value)


@pytest.mark.parametrize("first", [True, False])
def test_content_of_missing_views_has_no_influence(
    first: bool, spatial_forcing: SpatialForcing, batch: SimpleNamespace
) -> None:
    view_mask = torch.ones(BATCH, VIEWS, dtype=torch.bool)
    view_mask[0, 0 if first else 2] = False
    pixels = view_mask[..., None, None].expand(-1, -1, 56, 56)
    tokens = view_mask.repeat_interleave(SIDE**2, dim=1)
    plain, _ = spatial_forcing(batch.images, batch.hidden, view_mask=view_mask)
    plain.backward()
    assert batch.hidden.grad[~tokens].abs().sum() == 0
    for value in (0.0, 1e4, float("nan")):
        loss, metrics = spatial_forcing(*filled(batch, pixels, tokens, value), view_mask=view_mask)
        assert torch.equal(loss, plain), value
        assert all(metric.isfinite() for metric in metrics.values())


def test_a_missing_view_is_the_same_as_none(spatial_forcing: SpatialForcing, batch: SimpleNamespace) -> None:
    view_mask = torch.tensor([[True, True, False]] * BATCH)
    recipe_without_shift = SpatialForcing(
        spatial_forcing.teacher, HIDDEN, AlignRecipe(use_vggt_pe=True, use_vlm_norm=True, gain_feat_1move=False)
    )
    recipe_without_shift.load_state_dict(spatial_forcing.state_dict())
    masked, _ = recipe_without_shift(batch.images, batch.hidden, view_mask=view_mask)
    absent, _ = recipe_without_shift(batch.images[:, :2], batch.hidden[:, : 2 * SIDE**2])
    assert masked.item() == pytest.approx(absent.item(), rel=1e-5)


@pytest.mark.parametrize("shift", [True, False])
def test_content_of_padding_pixels_has_no_influence(
    shift: bool, teacher: VGGTAggregator, batch: SimpleNamespace
) -> None:
    spatial_forcing = SpatialForcing(teacher, HIDDEN, AlignRecipe(gain_feat_1move=shift))
    pixels = torch.ones(BATCH, VIEWS, 56, 56, dtype=torch.bool)
    pixels[0, 1, :14], pixels[1, 0, :, 42:] = False, False  # a row and a column of patches
    patches = pixels[:, :, ::14, ::14].flatten(1)
    # With the shift, position j of `vision_hidden` holds the hidden state of patch j + 1.
    tokens = torch.cat([patches[:, 1:], torch.ones(BATCH, 1, dtype=torch.bool)], dim=1) if shift else patches
    plain, _ = spatial_forcing(batch.images, batch.hidden, pixel_mask=pixels, return_map=True)
    for value in (0.0, 1e4, float("nan")):
        loss, metrics = spatial_forcing(*filled(batch, pixels, tokens, value), pixel_mask=pixels, return_map=True)
        assert torch.equal(loss, plain), value
        counted = metrics["align_cosine_map"].flatten(1) != 0
        assert torch.equal(counted, (patches & tokens) if shift else patches)


# Errors, and costs that must not come back


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda x: x * 255, "found values from .* to 25"),
        (lambda x: (x - 0.485) / 0.229, r"images must be in \[0, 1\]"),
        (lambda x: x * 2 - 1, r"images must be in \[0, 1\]"),
        (
            lambda x: (0.3 + 0.5 * x) * 2 - 1,
            r"images must be in \[0, 1\], found values from -0.4 to 0.6",
        ),  # a grey batch
        (lambda x: x * float("nan"), "found values from nan"),
        (lambda x: (x * 255).byte(), "divide uint8 by 255"),
        (lambda x: x[:, 0], "floats .batch, views, 3, height, width."),
        (lambda x: x.movedim(2, -1), "floats .batch, views, 3, height, width."),
        (lambda x: x[:1], "vision_hidden must be .batch=1,"),
        (lambda x: x[:, :2], "48 vision tokens do not fit 2 views of square"),
    ],
)
def test_bad_images(convert, message: str, spatial_forcing: SpatialForcing, batch: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=message):
        spatial_forcing(convert(batch.images), batch.hidden)


def test_bicubic_overshoot_is_no_error(spatial_forcing: SpatialForcing, batch: SimpleNamespace) -> None:
    edges = (batch.images > 0.5).float().flatten(0, 1)
    resized = F.interpolate(edges, size=(80, 80), mode="bicubic").unflatten(0, (BATCH, VIEWS))
    assert resized.min() < -0.05
    assert spatial_forcing(resized, batch.hidden)[0].isfinite()
    noise = (torch.rand(BATCH * VIEWS, 3, 64, 64, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    resized = F.interpolate(noise, size=(252, 252), mode="bicubic").unflatten(0, (BATCH, VIEWS))
    fresh = SpatialForcing(spatial_forcing.teacher, hidden_size=HIDDEN)  # that looks at its first batch
    assert fresh(resized, batch.hidden)[0].isfinite()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"mask": torch.ones(BATCH, TOKENS)}, "mask must be boolean"),
        ({"view_mask": torch.ones(BATCH, TOKENS, dtype=torch.bool)}, "view_mask must be boolean [2, 3]"),
        ({"pixel_mask": torch.ones(BATCH, 56, 56, dtype=torch.bool)}, "pixel_mask must be boolean [2, 3, 56, 56]"),
    ],
)
def test_bad_masks(masks: dict, message: str, spatial_forcing: SpatialForcing, batch: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        spatial_forcing(batch.images, batch.hidden, **masks)


def test_bad_hidden_size_layer_and_teacher(teacher: VGGTAggregator, batch: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="hidden_size=8"):
        SpatialForcing(teacher, hidden_size=8)(batch.images, batch.hidden)
    with pytest.raises(ValueError, match="vggt_layers_align=24 is out of range: the teacher has 3 layers"):
        SpatialForcing(teacher, hidden_size=8, recipe=AlignRecipe(vggt_layers_align=24))
    with pytest.raises(TypeError, match="expected a teacher"):
        SpatialForcing(nn.Linear(2, 2), hidden_size=8)


def test_hidden_states_without_gradient_are_reported(
    spatial_forcing: SpatialForcing, batch: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        spatial_forcing(batch.images, batch.hidden.detach())
        spatial_forcing(batch.images, batch.hidden.detach())
    assert [record.message[:36] for record in caplog.records] == ["vision_hidden carries no gradient, s"]


class _Synchronisations(TorchDispatchMode):
    """Counts operations that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket._qualified_op_name in {
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::masked_select",
            "aten::equal",
        }:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_only_the_first_batch_synchronises(spatial_forcing: SpatialForcing, batch: SimpleNamespace) -> None:
    masks = {
        "view_mask": torch.ones(BATCH, VIEWS, dtype=torch.bool),
        "pixel_mask": torch.ones(BATCH, VIEWS, 56, 56, dtype=torch.bool),
    }
    with _Synchronisations() as first:
        spatial_forcing(batch.images, batch.hidden, **masks)
    with _Synchronisations() as second:
        loss, _ = spatial_forcing(batch.images, batch.hidden, **masks)
        loss.backward()
    assert len(first.seen) == 3  # the range check: that this counts at all
    assert second.seen == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_synchronisation_on_the_gpu(teacher: VGGTAggregator, batch: SimpleNamespace) -> None:
    spatial_forcing = SpatialForcing(teacher, hidden_size=HIDDEN).cuda()
    images, hidden = batch.images.cuda(), batch.hidden.detach().cuda().requires_grad_()
    view_mask = torch.ones(BATCH, VIEWS, dtype=torch.bool, device="cuda")
    try:
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            with torch.autocast("cuda", torch.bfloat16):
                loss, _ = spatial_forcing(images, hidden, view_mask=view_mask)
            loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        spatial_forcing.cpu()
    assert loss.isfinite()
