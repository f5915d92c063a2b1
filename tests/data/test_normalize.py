"""Scaling by the documented formulas, statistics files as they are published, and unnorm_key rules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from prismo.data.normalize import (
    DatasetStats,
    FieldStats,
    dump_statistics,
    load_statistics,
    normalize,
    parse_statistics,
    resolve_unnorm_key,
    statistics_to_json,
    unnormalize,
)


def field(low: list[float], high: list[float], mask: list[bool] | None = None) -> FieldStats:
    low_array, high_array = np.array(low), np.array(high)
    return FieldStats(
        mean=(low_array + high_array) / 2, std=(high_array - low_array) / 4, min=low_array - 1, max=high_array + 1,
        q01=low_array, q99=high_array, mask=None if mask is None else np.array(mask),
    )  # fmt: skip


LIBERO_SPATIAL_PROPRIO = field(
    [-0.2727657300233841, -0.23721413239836692, 0.9160063165426254, 2.77949666261673, -1.3187511622905732,
     -0.41989982962608335, 0.001503719249740243, -0.03989770736545324],
    [0.13529365032911292, 0.3629165390133857, 1.2862326657772063, 3.2829698753356933, 0.9332760351896285,
     0.6325724506378171, 0.039933966137468815, -0.001671919699292631],
)  # fmt: skip
STATE = np.array([-0.211241627, -0.0110906019, 1.17424952, 3.1408954, -0.00284781983, -0.0877393103, 0.0387233651,
                  -0.0387222021])  # fmt: skip


def test_published_proprio_example() -> None:
    expected = [-0.69845515, -0.24641903, 0.39505574, 0.43562248, 0.16863894, -0.3687995, 0.93699698, -0.93849676]
    scaled = normalize(STATE, LIBERO_SPATIAL_PROPRIO, "bounds_q99", rule="evaluation")
    assert scaled.dtype == np.float64
    np.testing.assert_allclose(scaled, expected, atol=1e-7)


def test_training_rule_equals_tensorflow(tensorflow: Path) -> None:
    """Bit for bit in float32: clipping, the mask, and dimensions that never move."""
    g = np.load(tensorflow / "scaling.npz")
    x = g["x"].astype(np.float64)
    stats = FieldStats(x.mean(0), x.std(0), x.min(0), x.max(0), g["low"], g["high"], g["mask"])
    scaled = normalize(g["x"], stats, "bounds_q99")
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled, g["scaled"])
    assert (scaled[:, 2] == 0).all()
    np.testing.assert_array_equal(scaled[:, 3], g["x"][:, 3])


def test_evaluation_clips_masked_dimensions_and_keeps_motionless_ones() -> None:
    stats = FieldStats(*[np.zeros(2)] * 2, np.array([0.0, 5.0]), np.array([2.0, 5.0]), np.zeros(2), np.ones(2),
                       np.array([False, True]))  # fmt: skip
    live = normalize(np.array([3.0, 0.75]), stats, "bounds_q99", rule="evaluation")
    np.testing.assert_allclose(live, [1.0, 0.5], atol=1e-7)
    np.testing.assert_array_equal(normalize(np.array([3.0, 0.75]), stats, "bounds_q99"), [3.0, 0.0])


@pytest.mark.parametrize("kind", ["bounds_q99", "bounds", "normal"])
def test_unnormalize_is_the_inverse(kind: str) -> None:
    rng = np.random.default_rng(0)
    stats = field([-0.5, 0.1, 0.0], [0.5, 0.9, 1.0], [True, True, False])
    x = rng.uniform([-0.4, 0.2, 0.0], [0.4, 0.8, 1.0], (4, 8, 3))
    back = unnormalize(normalize(x, stats, kind, rule="evaluation"), stats, kind)
    np.testing.assert_allclose(back, x, atol=1e-12)


def test_unnormalize_formula_without_clipping() -> None:
    stats = field([-0.5, -0.5], [1.5, 1.5], [True, False])
    out = unnormalize(np.array([[1.5, 1.5]], dtype=np.float32), stats, "bounds_q99")
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, [[0.5 * 2.5 * (2.0 + 1e-8) - 0.5, 1.5]])


def test_vectors_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vectors of 8 numbers, the statistics describe 2.*unnorm_key"):
        normalize(STATE, field([0, 0], [1, 1]), "bounds_q99")
    with pytest.raises(ValueError, match="unknown normalization"):
        normalize(STATE, LIBERO_SPATIAL_PROPRIO, "q99")  # type: ignore[arg-type]


# --- files ------------------------------------------------------------------------------------------------------------


def stats_of(*names: str) -> dict[str, DatasetStats]:
    return {name: DatasetStats(field([0.0], [1.0], [True]), field([0.0, 1.0], [1.0, 2.0]), 10, 2) for name in names}


def test_files_have_the_published_schema(tmp_path: Path) -> None:
    path = tmp_path / "dataset_statistics.json"
    dump_statistics(stats_of("libero_spatial_no_noops"), path)
    text = path.read_text()
    content = json.loads(text)["libero_spatial_no_noops"]
    assert text.startswith('{\n  "libero_spatial_no_noops": {\n    "action": {\n      "mean": [')
    assert list(content) == ["action", "proprio", "num_transitions", "num_trajectories"]
    assert list(content["action"]) == ["mean", "std", "max", "min", "q01", "q99", "mask"]
    assert list(content["proprio"]) == ["mean", "std", "max", "min", "q01", "q99"]
    assert statistics_to_json(load_statistics(path)) == statistics_to_json(stats_of("libero_spatial_no_noops"))


def test_published_variants_are_read() -> None:
    """Inside a model's configuration, without proprio or mask, with the not-a-number values some files hold."""
    entry = statistics_to_json(stats_of("a"))["a"]
    action_only = {"action": {k: v for k, v in entry["action"].items() if k != "mask"}}
    assert parse_statistics({"a": action_only})["a"].proprio is None
    assert parse_statistics({"a": action_only})["a"].action.mask is None
    wrapped = parse_statistics({"model_type": "openvla", "norm_stats": {"bridge_orig": entry}})
    assert list(wrapped) == ["bridge_orig"]
    broken = json.loads(json.dumps(entry).replace('"max": [2.0]', '"max": [Infinity]'))
    stats = parse_statistics({"statistics": {"rh20t/1.0.0": broken}})
    assert np.isinf(stats["rh20t/1.0.0"].action.max)
    assert json.loads(json.dumps(statistics_to_json(stats), allow_nan=False))["rh20t/1.0.0"]["action"]["max"] == [None]


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="prismo data stats"):
        load_statistics(tmp_path / "dataset_statistics.json")
    path = tmp_path / "s.json"
    for content, message in (
        ("{", "not valid JSON"),
        ("{}", "the statistics are empty"),
        ("[]", "should be an object"),
        ('{"a": [1]}', "a should be an object"),
        ('{"a": {"mean": []}}', "a.action is missing"),
        ('{"a": {"action": {"mean": [0]}}}', "a.action.std is missing"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"^[^:]*{path.name}: [^:]*{message}"):
            load_statistics(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mask", ["False"], r"a\.action\.mask\[0\] should be a valid boolean, found 'False'"),
        ("mask", [1], r"mask\[0\] should be a valid boolean"),
        ("mask", [True, True], "vectors of different lengths"),
        ("q01", ["0.5"], r"q01\[0\] should be a valid number"),
        ("q01", [[0.5]], r"q01\[0\] should be a valid number"),
        ("q01", {"0": 0.5}, "q01 should be a valid"),
        ("q01", [], "vectors of different lengths"),
        ("q01", [1.5], r"a\.action: q01\[0\] is 1\.5, above q99\[0\] 1\.0"),
        ("min", [7], r"a\.action: min\[0\] is 7\.0, above max\[0\] 2\.0"),
        ("std", [-0.1], r"a\.action: std\[0\] is -0\.1, below 0"),
    ],
)
def test_statistics_that_cannot_be_are_refused(tmp_path: Path, name: str, value: object, message: str) -> None:
    content = statistics_to_json(stats_of("a"))
    content["a"]["action"][name] = value
    path = tmp_path / "s.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"s\.json: .*{message}"):
        load_statistics(path)


@pytest.mark.parametrize("count", [-1, 1.5, "many"])
def test_counts_are_counts(count: object) -> None:
    with pytest.raises(ValueError, match=r"a\.num_transitions"):
        parse_statistics({"a": statistics_to_json(stats_of("a"))["a"] | {"num_transitions": count}})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_only_a_chosen_entry_must_be_usable(value: float | None) -> None:
    """Published files hold entries of many robots, some with numbers that are not finite."""
    content = statistics_to_json(stats_of("good", "bad", "proprio"))
    content["bad"]["action"]["q99"] = [value]
    content["proprio"]["proprio"]["q99"] = [1.0, value]
    content["good"]["action"]["std"] = content["good"]["proprio"]["std"] = [value] * 2
    content["good"]["action"]["std"] = [value]
    stats = parse_statistics(json.loads(json.dumps(content)))
    assert resolve_unnorm_key(stats, "good") == "good"
    with pytest.raises(ValueError, match=r"statistics of 'bad'.*action q99\[0\] is (nan|inf).*prismo data stats"):
        resolve_unnorm_key(stats, "bad")
    with pytest.raises(ValueError, match=r"statistics of 'proprio'.*proprio q99\[1\] is (nan|inf)"):
        resolve_unnorm_key(stats, "proprio")
    with pytest.raises(ValueError, match=r"action std\[0\] is (nan|inf)"):
        resolve_unnorm_key(stats, "good", "normal")
    content["bad"]["action"]["mask"] = [False]
    content["bad"]["action"] = {k: [*v, v[0]] for k, v in content["good"]["action"].items()} | {
        "q99": [1.0, value], "mask": [True, False]
    }  # fmt: skip
    assert resolve_unnorm_key(parse_statistics(content), "bad") == "bad", "a dimension that is not scaled"


def test_actions_that_never_move_are_refused() -> None:
    """One such dimension is usual in published files (a fixed wrist), all of them are not."""
    one, all_ = (DatasetStats(field([0.0, 0.0, 0.0], high, [True, True, False]), None, 1, 1)
                 for high in ([0.0, 1.0, 1.0], [0.0, 0.0, 1.0]))  # fmt: skip
    assert resolve_unnorm_key({"one": one, "all": all_}, "one") == "one"
    with pytest.raises(ValueError, match=r"statistics of 'all'.*q01 equals q99 in every dimension.*never move"):
        resolve_unnorm_key({"one": one, "all": all_}, "all")
    assert resolve_unnorm_key({"all": all_}, "all", "bounds") == "all"
    with pytest.raises(ValueError, match="unknown normalization 'q99'"):
        resolve_unnorm_key({"all": all_}, "all", "q99")  # type: ignore[arg-type]


def test_unnorm_key_rules() -> None:
    assert resolve_unnorm_key(stats_of("x"), None) == "x"
    assert resolve_unnorm_key(stats_of("libero_goal", "libero_goal_no_noops"), "libero_goal") == "libero_goal"
    several = stats_of("libero_goal_no_noops", "libero_10_no_noops", "bridge_orig/1.0.0")
    assert resolve_unnorm_key(several, "libero_goal") == "libero_goal_no_noops"
    assert resolve_unnorm_key(several, "bridge_orig") == "bridge_orig/1.0.0"
    with pytest.raises(ValueError, match=r"3 datasets.*--unnorm_key: bridge_orig/1.0.0, libero_10_no_noops"):
        resolve_unnorm_key(several, None)
    with pytest.raises(ValueError, match=r"Did you mean 'libero_goal_no_noops'.*libero_10_no_noops"):
        resolve_unnorm_key(several, "libero_gaol")
