"""Position embedding and pooling."""

import pytest
import torch
import torch.nn.functional as F

from prismo.align.pooling import pool, uv_position_embedding


def test_position_embedding_values() -> None:
    # Figures of VGGT's own embedding for its 37 x 37 grid and 2048 channels.
    embedding = uv_position_embedding(37, 37, 2048)
    assert embedding.shape == (37, 37, 2048)
    assert embedding[0, 0, 0:3].tolist() == pytest.approx([-0.0634990186, -0.0630219132, -0.0625467226], abs=1e-8)
    assert embedding[0, 0, 512:515].tolist() == pytest.approx([0.0772520229, 0.0776417330, 0.0780250505], abs=1e-8)
    assert embedding[5, 9, 0].item() == pytest.approx(-0.0337253474, abs=1e-8)
    assert embedding[5, 9, 1024].item() == pytest.approx(-0.0476690307, abs=1e-8)
    assert embedding.double().sum().item() == pytest.approx(138922.825, abs=0.01)


def test_position_embedding_keeps_the_aspect_ratio() -> None:
    # Twice as wide as high: x spans twice the range of y. The lowest frequencies, k = 0, are 1.
    embedding = uv_position_embedding(4, 8, 16) / 0.1
    x, y = torch.asin(embedding[0, :, 0]), torch.asin(embedding[:, 0, 8])
    assert x[-1].item() == pytest.approx(2 / 5**0.5 * 7 / 8, rel=1e-5)
    assert y[-1].item() == pytest.approx(1 / 5**0.5 * 3 / 4, rel=1e-5)
    assert torch.allclose(x, -x.flip(0), atol=1e-6)


@pytest.mark.parametrize("position", [True, False])
def test_pool_adds_the_embedding_and_resamples_each_view(position: bool) -> None:
    features = torch.randn(2, 3, 9, 7, 8)
    pooled = pool(features, (4, 5), position=position)
    assert pooled.shape == (2, 3 * 20, 8)
    for sample in range(2):
        for view in range(3):
            image = features[sample, view].permute(2, 0, 1)[None]
            if position:  # in the original's order: first add, then resample
                image = image + uv_position_embedding(9, 7, 8).permute(2, 0, 1)
            expected = F.interpolate(image, size=(4, 5), mode="bilinear", align_corners=True)[0]
            actual = pooled[sample, view * 20 : (view + 1) * 20]
            assert torch.allclose(actual, expected.flatten(1).T, atol=1e-5)


def test_pool_is_fp32_under_autocast_and_for_bf16_features() -> None:
    features = torch.randn(1, 1, 6, 6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = pool(features.bfloat16(), (3, 3), position=True)
    assert pooled.dtype == torch.float32
    assert torch.allclose(pooled, pool(features.bfloat16().float(), (3, 3), position=True), atol=1e-6)
