"""The action grid against the published numbers, its round trip, its fitting, and the adaption of embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from prismo.data.normalize import parse_statistics, unnormalize
from prismo.models.spatialvla.action_tokenizer import (
    OFFICIAL_GAUSSIANS,
    RANGES,
    VARIABLES,
    ActionTokenizer,
    Gaussian,
    fit_gaussians,
    load_gaussians,
    save_gaussians,
    to_spherical,
)
from prismo.models.spatialvla.modeling import SpatialVLAForConditionalGeneration
from prismo.models.spatialvla.rediscretize import interpolate_rows, rediscretize
from prismo.util.schema import JsonObject, read_json

# Gaussians that the authors ship for the fractal dataset (gs_fractal.json).
FRACTAL = {
    "theta": Gaussian(1.61574, 0.59767),
    "phi": Gaussian(0.01512, 1.19268),
    "r": Gaussian(0.45576, 0.32478),
    "roll": Gaussian(-0.15984, 0.30541),
    "pitch": Gaussian(0.07138, 0.31518),
    "yaw": Gaussian(-0.01093, 0.30193),
}
DECODED = [
    ((1443, 5772, 8193), (0.438721, 0.339466, 0.020114, -0.137355, 0.058635, 0.373122, 1)),
    ((1699, 6044, 8193), (0.437359, 0.338412, -0.048085, -0.06155, 0.134456, 0.373122, 1)),
    ((1973, 6077, 8193), (0.495406, 0.659605, -0.171007, -0.06155, 0.296482, 0.480915, 1)),
    ((1973, 5550, 8193), (0.495406, 0.659605, -0.171007, -0.215814, 0.212945, 0.618858, 1)),
    ((0, 4096, 8192), (-0.032616, -0.009765, 0.092307, -0.856065, -0.839251, -0.845502, 0)),
    ((4095, 8191, 8193), (-0.217351, 0.053921, -1.0, 0.838123, 0.855015, 0.849017, 1)),
    ((2048, 6144, 8192), (-0.089474, -0.026788, -0.030928, 0.013474, -0.839251, -0.845502, 0)),
]
ENCODED = [
    ((0, 0, 0, 0, 0, 0, 0), (120, 6263, 8192), (0.034029, 0.001099, 0.092307, 0.013474, -0.016395, -0.032815, 0)),
    ((1,) * 7, (431, 8191, 8193), (0.754896, 0.762491, 0.953912, 0.838123, 0.855015, 0.849017, 1)),
    (
        (-1, -1, -1, -1, -1, -1, 0),
        (2831, 4096, 8192),
        (-0.804653, -0.775138, -0.901612, -0.856065, -0.839251, -0.845502, 0),
    ),
    (
        (0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.5),
        (58, 5073, 8193),
        (0.073525, -0.125137, 0.3935, -0.391359, 0.495662, -0.611202, 1),
    ),
    (
        (0, 0, -0.3, 0, 0, 0, 0.49),
        (3961, 6263, 8192),
        (0.04267, 0.001378, -0.27035, 0.013474, -0.016395, -0.032815, 0),
    ),
]


@pytest.fixture(scope="module")
def tokens() -> ActionTokenizer:
    return ActionTokenizer.from_gaussians(OFFICIAL_GAUSSIANS)


def test_layout(tokens: ActionTokenizer) -> None:
    assert tokens.size == 8194
    assert tokens.slots == (slice(0, 4096), slice(4096, 8192), slice(8192, 8194))


def test_published_bins_come_from_the_gaussians(tokens: ActionTokenizer, published: Path) -> None:
    stored = ActionTokenizer.from_bin_policy(read_json(published / "processor_config.json", JsonObject)["bin_policy"])
    for name in VARIABLES:
        np.testing.assert_allclose(stored.edges[name], tokens.edges[name], atol=1e-7)


@pytest.mark.parametrize(("offsets", "action"), DECODED)
def test_decode(tokens: ActionTokenizer, offsets: tuple[int, ...], action: tuple[float, ...]) -> None:
    np.testing.assert_allclose(tokens.decode(np.array(offsets)), action, atol=1.5e-6)


@pytest.mark.parametrize(("action", "offsets", "decoded"), ENCODED)
def test_encode(
    tokens: ActionTokenizer, action: tuple[float, ...], offsets: tuple[int, ...], decoded: tuple[float, ...]
) -> None:
    assert tuple(tokens.encode(np.array(action, float))) == offsets
    np.testing.assert_allclose(tokens.decode(np.array(offsets)), decoded, atol=1.5e-6)


@pytest.mark.parametrize(
    ("key", "physical"),
    [
        ("fractal20220817_data/0.1.0", (0.06521, 0.051102, -0.002057, 0.054104, -0.010653, 0.170761, 1)),
        ("bridge_orig/1.0.0", (0.012303, 0.013589, 0.0077, -0.010684, -0.002471, 0.075, 1)),
    ],
)
def test_published_statistics(tokens: ActionTokenizer, published: Path, key: str, physical: tuple[float, ...]) -> None:
    statistics = parse_statistics(read_json(published / "processor_config.json", JsonObject))
    assert len(statistics) == 28
    action = unnormalize(tokens.decode(np.array([1443, 5772, 8193])), statistics[key].action, "bounds_q99")
    np.testing.assert_allclose(action, physical, atol=2e-6)


def test_every_rotation_and_inner_translation_survives_decoding_and_encoding(tokens: ActionTokenizer) -> None:
    ids = np.arange(4096)
    offsets = np.stack((ids, ids + 4096, 8192 + ids % 2), axis=-1)
    actions = tokens.decode(offsets)
    again = tokens.encode(actions)
    assert (again[:, 1:] == offsets[:, 1:]).all()
    clipped = (np.abs(actions[:, :3]) == 1).any(-1)
    moved = again[:, 0] != offsets[:, 0]
    assert clipped.sum() == 525
    assert moved.sum() == 261
    assert not (moved & ~clipped).any()


def test_error_is_within_half_a_bin(tokens: ActionTokenizer) -> None:
    rng = np.random.default_rng(0)
    actions = np.clip(rng.normal(0, 0.35, (5000, 7)), -1, 1)
    actions[:, 6] = rng.integers(0, 2, 5000)
    offsets = tokens.encode(actions)
    index = (
        *np.unravel_index(offsets[:, 0], tokens.shape("translation")),
        *np.unravel_index(offsets[:, 1] - 4096, tokens.shape("rotation")),
    )
    values = (*to_spherical(actions[:, :3]), *actions[:, 3:6].T)
    for name, i, value in zip(VARIABLES, index, values, strict=True):
        half = np.diff(tokens.edges[name])[i] / 2
        assert (np.abs(tokens.centers(name)[i] - value) <= half + 1e-12).all(), name
    decoded = tokens.decode(offsets)
    half_rotation = np.stack([np.diff(tokens.edges[n])[i] / 2 for n, i in zip(VARIABLES[3:], index[3:], strict=True)])
    assert (np.abs(decoded[:, 3:6] - actions[:, 3:6]) <= half_rotation.T + 1e-12).all()
    np.testing.assert_array_equal(decoded[:, 6], actions[:, 6])
    assert np.abs(decoded[:, :3] - actions[:, :3]).mean() < 0.045


def test_batch_shapes_and_foreign_offsets(tokens: ActionTokenizer) -> None:
    actions = np.random.default_rng(1).uniform(-1, 1, (2, 4, 7))
    offsets = tokens.encode(actions)
    assert offsets.shape == (2, 4, 3)
    np.testing.assert_array_equal(offsets[1, 2], tokens.encode(actions[1, 2]))
    # A token of another slot (or a text token, which lies below all) becomes the nearest end, as in the original.
    np.testing.assert_array_equal(tokens.decode(np.array([-99, 0, 8193])), tokens.decode(np.array([0, 4096, 8193])))
    np.testing.assert_array_equal(tokens.decode(np.array([8193, 8193, 5])), tokens.decode(np.array([4095, 8191, 8192])))


def test_bin_policy_round_trip(tokens: ActionTokenizer) -> None:
    again = ActionTokenizer.from_bin_policy(json.loads(json.dumps(tokens.bin_policy())))
    for name in VARIABLES:
        np.testing.assert_array_equal(again.edges[name], tokens.edges[name])
    with pytest.raises(ValueError, match="phi_bins"):
        ActionTokenizer.from_bin_policy({"translation": {"theta_bins": [0, 1]}, "rotation": {}})


def test_fitted_bins_hold_equal_shares() -> None:
    rng = np.random.default_rng(0)
    actions = np.clip(rng.normal(0.1, 0.3, (40_000, 7)), -1, 1)
    gaussians = fit_gaussians(np.array_split(actions, 7))
    theta, phi, _ = to_spherical(actions[:, :3])
    assert gaussians["x"].mu == pytest.approx(actions[:, 0].mean())
    assert gaussians["theta"].sigma == pytest.approx(theta.std())
    assert gaussians["phi"].mu == pytest.approx(phi.mean())
    grid = ActionTokenizer.from_gaussians(gaussians)
    counts, _ = np.histogram(actions[:, 4], grid.edges["pitch"])
    share = counts[1:-1] / len(actions)  # the outermost bins also hold the clipped values
    assert np.abs(share - 1 / 16).max() < 0.012


def test_gaussian_files(tmp_path: Path) -> None:
    save_gaussians(FRACTAL, tmp_path / "gs.json")
    assert load_gaussians(tmp_path / "gs.json") == FRACTAL
    (tmp_path / "bad.json").write_text('{"theta": 1}')
    with pytest.raises(ValueError, match=r"bad\.json.*sigma"):
        load_gaussians(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="lack phi"):
        ActionTokenizer.from_gaussians({name: g for name, g in FRACTAL.items() if name != "phi"})
    with pytest.raises(ValueError, match="no action"):
        fit_gaussians([])


def test_min_sigma_widens_narrow_distributions() -> None:
    narrow = {name: Gaussian(g.mu, 1e-20) for name, g in FRACTAL.items()}
    with pytest.raises(ValueError, match="raise min_sigma"):
        ActionTokenizer.from_gaussians(narrow)
    wide = ActionTokenizer.from_gaussians(narrow, min_sigma=0.5)
    expected = ActionTokenizer.from_gaussians({name: Gaussian(g.mu, 0.5) for name, g in FRACTAL.items()})
    for name in VARIABLES:
        np.testing.assert_array_equal(wide.edges[name], expected.edges[name])


def probe(tokens: ActionTokenizer) -> torch.Tensor:
    """A table whose rows are their own bin centres, scaled to 0..1 per variable: [8194, 6]."""
    scaled = [(tokens.centers(name) - RANGES[name][0]) / (RANGES[name][1] - RANGES[name][0]) for name in VARIABLES]
    table = np.zeros((tokens.size, 6))
    table[:4096, :3] = np.stack([m.ravel() for m in np.meshgrid(*scaled[:3], indexing="ij")], axis=-1)
    table[4096:8192, 3:] = np.stack([m.ravel() for m in np.meshgrid(*scaled[3:], indexing="ij")], axis=-1)
    return torch.from_numpy(table)


def test_adaption_follows_a_linear_field(tokens: ActionTokenizer) -> None:
    new = ActionTokenizer.from_gaussians(FRACTAL)
    before, wanted = probe(tokens), probe(new)
    adapted = interpolate_rows(before, tokens, new)
    assert torch.equal(before, probe(tokens))  # the table that was passed in stays
    untouched = (before - wanted).abs()
    error = (adapted - wanted).abs()
    for column, rows in zip(range(6), [slice(0, 4096)] * 3 + [slice(4096, 8192)] * 3, strict=True):
        assert untouched[rows, column].mean() > 0.03  # what leaving the rows alone would cost
        assert error[rows, column].mean() < 0.002
    torch.testing.assert_close(adapted[8192:], before[8192:], rtol=0, atol=0)


def test_adaption_to_the_same_grid_changes_nothing(tokens: ActionTokenizer) -> None:
    table = torch.randn(8194, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(interpolate_rows(table, tokens, tokens), table, rtol=0, atol=1e-6)


def test_rediscretize_a_model(fresh: SpatialVLAForConditionalGeneration, tokens: ActionTokenizer) -> None:
    new = ActionTokenizer.from_gaussians(FRACTAL)
    table = fresh.spatial_embed_tokens.weight.detach().clone()
    head = fresh.language_model.lm_head.weight.detach().clone()
    rediscretize(fresh, tokens, new)
    torch.testing.assert_close(fresh.spatial_embed_tokens.weight, interpolate_rows(table, tokens, new))
    assert torch.equal(fresh.language_model.lm_head.weight, head)
    rediscretize(fresh, new, tokens, lm_head=True)
    begin = fresh.config.action_token_begin_idx
    assert torch.equal(fresh.language_model.lm_head.weight[:begin], head[:begin])
    torch.testing.assert_close(fresh.language_model.lm_head.weight[begin:], interpolate_rows(head[begin:], new, tokens))
    uneven = ActionTokenizer.uniform({**tokens.bins, "r": 4})
    with pytest.raises(ValueError, match="equal numbers of bins"):
        interpolate_rows(table, tokens, uneven)
