"""Policies: whole folders pass, and one wrong thing is named by the check that is meant for it, and by no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prismo.models.lora import LoraSpec, add_lora, lora_parameters, save_adapter
from prismo.models.openvla import OpenVLAForActionPrediction
from prismo.models.weight_files import fingerprint, stored_tensors
from prismo.testing.tiny import make_tiny_openvla
from prismo.verify import Options, Report, page, verify
from prismo.verify.facts import Facts
from tests.verify.conftest import (
    DATASET,
    Copy,
    changed,
    changed_state,
    changed_weights,
    differing,
    found,
    look,
    statuses,
    truncate,
)

HEAD = "action_head--latest_checkpoint.pt"
STATISTICS = "dataset_statistics.json"

# ----------------------------------------------------------------------------------------------------- nothing wrong


def test_a_fine_tuned_policy_passes(tiny_policy: Path, facts: Facts) -> None:
    report = look(tiny_policy, "test/policy", facts, forward=True)
    assert set(statuses(report).values()) == {"ok"}, page(report)
    assert "head l1, attention bidirectional" in found(report, "settings")
    assert "2,306,208 parameters in 148 tensors" in found(report, "counts")


def test_without_an_id_the_architecture_is_what_counts(tiny_policy: Path) -> None:
    report = verify(str(tiny_policy), Options())
    assert report.compared_with is None
    assert not report.differs, page(report)
    unknown = {name for name, status in statuses(report).items() if status == "not known"}
    assert unknown == {"configuration", "counts", "images", "statistics of this id"}


def test_vanilla_openvla_passes(tiny_vanilla: Path, facts: Facts) -> None:
    report = look(tiny_vanilla, "test/vanilla", facts, forward=True)
    assert not report.differs, page(report)
    assert "head discrete, attention causal" in found(report, "settings")
    assert found(report, "prediction").startswith("1 action,")


def test_spatialvla_passes(tiny_spatialvla: Path, facts: Facts) -> None:
    report = look(tiny_spatialvla, "test/svla", facts, forward=True)
    assert not report.differs, page(report)
    assert found(report, "prediction").startswith("4 actions,")
    assert "3 actions as published" in found(report, "action grid")


@pytest.fixture(scope="module")
def unmerged(tiny_policy: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What our trainer leaves without merging: an adapter for `tiny_base`, side modules and the processor."""
    folder = tmp_path_factory.mktemp("unmerged") / "run--10_chkpt"
    folder.mkdir()
    for path in tiny_policy.iterdir():
        if not path.name.startswith(("model", "config")):
            (folder / path.name).write_bytes(path.read_bytes())
    model = OpenVLAForActionPrediction.from_pretrained(tiny_base, self_test=False)
    spec = LoraSpec(rank=4)
    add_lora(model, spec)
    for name, parameter in lora_parameters(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    save_adapter(model, folder, spec, base=str(tiny_base), base_fingerprint=fingerprint(stored_tensors(tiny_base)))
    return folder


def test_an_adapter_passes_with_its_base(unmerged: Path) -> None:
    report = verify(str(unmerged), Options())
    assert not report.differs, page(report)
    assert "of rank 4 fit, trained on this base model" in found(report, "adapter")
    assert statuses(report)["black image"] == "ok"


# --------------------------------------------------------------------------------------------------- one thing wrong


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(pattern: str) -> Callable[[Path], None]:
    return lambda folder: truncate(min(folder.glob(pattern)))


def drop_tensor(folder: Path) -> None:
    with changed_weights(folder) as tensors:
        del tensors["projector.fc3.bias"]


def add_tensor(folder: Path) -> None:
    with changed_weights(folder) as tensors:
        tensors["projector.fc4.weight"] = torch.ones(2, 2, dtype=torch.bfloat16)


def reshape_tensor(folder: Path) -> None:
    with changed_weights(folder) as tensors:
        tensors["projector.fc3.weight"] = torch.ones(32, 33, dtype=torch.bfloat16)


def retype_tensor(folder: Path) -> None:
    with changed_weights(folder) as tensors:
        tensors["projector.fc3.weight"] = tensors["projector.fc3.weight"].float()


def remove_shard(folder: Path) -> None:
    min(folder.glob("model-*.safetensors")).unlink()


def lie_in_the_index(folder: Path) -> None:
    with changed(folder / "model.safetensors.index.json") as index:
        index["weight_map"]["projector.fc9.bias"] = index["weight_map"]["projector.fc3.bias"]


def edit(name: str, *keys: str | int, value: Any) -> Callable[[Path], None]:
    """Set one entry of a JSON file."""

    def change(folder: Path) -> None:
        with changed(folder / name) as content:
            for key in keys[:-1]:
                content = content[key]  # noqa: PLW2901 (the same object below it)
            content[keys[-1]] = value

    return change


def swap_words(folder: Path) -> None:
    with changed(folder / "tokenizer.json") as tokenizer:
        ids = tokenizer["model"]["vocab"]
        ids["▁plate"], ids["▁bow"] = ids["▁bow"], ids["▁plate"]


def pad_with_the_end(folder: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        with changed(folder / name) as content:
            content["pad_token"] = "</s>"


def edit_head(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def edit_it(folder: Path) -> None:
        with changed_state(folder / HEAD) as state:
            value = change(state.pop(f"module.model.{name}"))
            if value is not None:
                state[f"module.model.{name}"] = value

    return edit_it


def retype_head(folder: Path) -> None:
    with changed_state(folder / HEAD) as state:
        state.update({name: value.half() for name, value in state.items()})


def rename_dataset(folder: Path) -> None:
    with changed(folder / STATISTICS) as statistics:
        statistics["libero_goal_no_noops"] = statistics.pop(DATASET)


def only(report: Report, check: str, text: str) -> None:
    """This check found a difference, and no other did."""
    assert differing(report) == {check}, page(report)
    assert text in found(report, check)


NAN = float("nan")
WRONG = {
    "a missing file": (remove("tokenizer_config.json"), "files", "`tokenizer_config.json`: expected a file"),
    "no tokenizer": (remove("tokenizer.json"), "files", "`tokenizer.json or tokenizer.model`: expected a file"),
    "no statistics": (remove(STATISTICS), "files", f"`{STATISTICS}`: expected a file"),
    "no action head": (remove(HEAD), "files", HEAD),
    "a missing shard": (remove_shard, "weight files", "which is not there"),
    "a truncated shard": (cut("model-*.safetensors"), "weight files", "truncated"),
    "another index": (lie_in_the_index, "weight files", "disagree about 1 tensors: `projector.fc9.bias`"),
    "a missing tensor": (drop_tensor, "tensor names", "missing: expected `projector.fc3.bias`"),
    "another tensor": (add_tensor, "tensor names", "unknown: expected nothing, found `projector.fc4.weight`"),
    "a wrong shape": (reshape_tensor, "tensor shapes", "expected [32, 32], found [32, 33]"),
    "a wrong type": (retype_tensor, "tensor types", "`projector.fc3.weight`: expected BF16, found F32"),
    "another setting": (
        edit("config.json", "llm_max_length", value=4096),
        "configuration",
        "`llm_max_length`: expected 2048, found 4096",
    ),
    "a broken configuration": (cut("config.json"), "configuration", "not valid JSON"),
    "a truncated head": (cut(HEAD), "action head", "truncated"),
    "a head without a tensor": (edit_head("fc2.bias", lambda _: None), "action head", "expected `model.fc2.bias`"),
    "a head of another shape": (
        edit_head("fc2.weight", lambda value: torch.cat([value, value])),
        "action head",
        "expected [7, 32], found [14, 32]",
    ),
    "a head of another type": (retype_head, "action head", "type: expected F32, found F16"),
    "statistics with NaN": (
        edit(STATISTICS, DATASET, "action", "q99", 2, value=NAN),
        "statistics",
        "q99 is not finite",
    ),
    "quantiles the wrong way round": (
        edit(STATISTICS, DATASET, "action", "q01", 1, value=0.95),
        "statistics",
        "action: q01[1] is 0.95, above q99[1] 0.9",
    ),
    "a state of kilometres": (
        edit(STATISTICS, DATASET, "proprio", value={
            name: [1000.0 * sign] * 8
            for name, sign in (("mean", 0), ("std", 1), ("min", -1), ("max", 1), ("q01", -1), ("q99", 1))
        }),
        "statistics",
        "quantiles reach 1000, plausible are 6.283",
    ),
    "quantiles of another dataset": (
        edit(STATISTICS, DATASET, "action", "q99", value=[0.5] * 7),
        "statistics of this id",
        "action q99",
    ),
    "another number of steps": (
        edit(STATISTICS, DATASET, "num_transitions", value=999),
        "statistics of this id",
        "steps: expected 1,000, found 999",
    ),
    "statistics of another dataset": (rename_dataset, "statistics of this id", f"expected `{DATASET}`"),
    "other token ids": (swap_words, "tokenizer", "prompt ids"),
    "another padding token": (pad_with_the_end, "tokenizer", "id of PAD: expected 32000, found 2"),
    "ImageNet's unrounded numbers": (
        edit("preprocessor_config.json", "tvf_normalize_params", 0, "mean", value=[0.485, 0.456, 0.406]),
        "images",
        "found [[[0.485, 0.456, 0.406]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_one_wrong_thing_is_named_by_its_check(name: str, tiny_policy: Path, facts: Facts, copy: Copy) -> None:
    break_it, check, text = WRONG[name]
    folder = copy(tiny_policy)
    break_it(folder)
    only(look(folder, "test/policy", facts), check, text)


def test_a_model_that_was_used_as_a_base_by_the_original(tiny_vanilla: Path, facts: Facts, copy: Copy) -> None:
    """OFT's scripts write their model code into every folder that they load; read as evidence, it says parallel."""
    folder = copy(tiny_vanilla)
    (folder / "modeling_prismatic.py").write_text("from prismatic.vla.constants import NUM_ACTIONS_CHUNK\n")
    report = look(folder, "test/vanilla", facts)
    only(report, "settings", "attention: expected causal, found bidirectional (the model code in its folder")


def test_an_attention_function_that_was_replaced(
    tiny_policy: Path, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def causal(module: Any, query: Any, key: Any, value: Any, mask: Any, **rest: Any) -> Any:
        return original(module, query, key, value, None, **{**rest, "is_causal": True})

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", causal)
    report = look(tiny_policy, "test/policy", facts, forward=True)
    only(report, "self-test", "a later token does not influence an earlier one")
    assert statuses(report)["prediction"] == "skipped"


def blind_openvla(folder: Path) -> None:
    with changed_weights(folder) as tensors:
        tensors["projector.fc3.weight"].zero_()


@pytest.mark.parametrize(
    ("break_it", "check", "text"),
    [
        (blind_openvla, "self-test", "the image does not influence the output"),
        (edit_head("fc2.bias", lambda bias: bias * NAN), "prediction", "predicts actions that are not finite"),
        (edit_head("fc2.bias", lambda bias: bias + 40), "prediction", "number 0 of the action: expected -1.801"),
    ],
)
def test_one_wrong_thing_that_only_a_prediction_shows(
    break_it: Callable[[Path], None], check: str, text: str, tiny_policy: Path, facts: Facts, copy: Copy
) -> None:
    folder = copy(tiny_policy)
    break_it(folder)
    only(look(folder, "test/policy", facts, forward=True), check, text)


# ------------------------------------------------------------------------------------------------------- SpatialVLA


def other_grid(folder: Path) -> None:
    with changed(folder / "processor_config.json") as processor:
        bins = processor["bin_policy"]["rotation"]["yaw_bins"]
        bins[12] = (bins[11] + bins[12]) / 2


def drop_spatial_table(folder: Path) -> None:
    with changed_weights(folder) as tensors:
        del tensors["spatial_embed_tokens.weight"]


@pytest.mark.parametrize(
    ("break_it", "check", "text"),
    [
        (remove("tokenizer.json"), "files", "`tokenizer.json`"),
        (drop_spatial_table, "tensor names", "missing: expected `spatial_embed_tokens.weight`"),
        (cut("model.safetensors"), "weight files", "truncated"),
        (other_grid, "action grid", "bin edges of yaw"),
        (other_grid, "action grid", "action of [1443, 5772, 8193]"),
        (edit("config.json", "bos_token_id", value=5), "tokenizer", "id of '<bos>': expected 5, found 2"),
        (
            edit("processor_config.json", "statistics", "droid/1.0.0", "action", "q01", 0, value=NAN),
            "statistics",
            "`droid/1.0.0` action: q01 is not finite",
        ),
    ],
)
def test_one_wrong_thing_in_spatialvla(
    break_it: Callable[[Path], None], check: str, text: str, tiny_spatialvla: Path, facts: Facts, copy: Copy
) -> None:
    folder = copy(tiny_spatialvla)
    break_it(folder)
    only(look(folder, "test/svla", facts), check, text)


def test_a_spatialvla_that_does_not_see(tiny_spatialvla: Path, facts: Facts, copy: Copy) -> None:
    folder = copy(tiny_spatialvla)
    with changed_weights(folder) as tensors:
        tensors["multi_modal_projector.linear.weight"].zero_()
    report = look(folder, "test/svla", facts, forward=True)
    assert differing(report) == {"black image"}, page(report)


# --------------------------------------------------------------------------------------------------------- adapters


def drop_factor(folder: Path) -> None:
    edit_adapter(folder, lambda tensors: tensors.pop(min(tensors)))


def reshape_factor(folder: Path) -> None:
    edit_adapter(folder, lambda tensors: tensors.update({min(tensors): torch.ones(3, 3)}))


def edit_adapter(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "lora_adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("break_it", "check", "text"),
    [
        (drop_factor, "adapter", "is incomplete"),
        (reshape_factor, "adapter", "has shape [3, 3]"),
        (cut("lora_adapter/adapter_model.safetensors"), "adapter", "truncated"),
        (remove("lora_adapter/adapter_model.safetensors"), "files", "`lora_adapter/adapter_model.safetensors`"),
    ],
)
def test_one_wrong_thing_in_an_adapter(
    break_it: Callable[[Path], None], check: str, text: str, unmerged: Path, copy: Copy
) -> None:
    folder = copy(unmerged)
    break_it(folder)
    only(verify(str(folder), Options(forward=False)), check, text)


def test_an_adapter_on_another_base(unmerged: Path, tmp_path: Path) -> None:
    other = make_tiny_openvla(tmp_path / "other", seed=1)
    report = verify(str(unmerged), Options(base_checkpoint=str(other), forward=False))
    only(report, "adapter", "expected the one that it was trained on, found another in")


def test_an_adapter_without_its_base_is_checked_as_far_as_it_goes(unmerged: Path, copy: Copy) -> None:
    folder = copy(unmerged)
    with changed(folder / "lora_adapter" / "adapter_config.json") as config:
        config["base_model_name_or_path"] = "nobody/has-this-model"
    report = verify(str(folder), Options())
    assert not report.differs, page(report)
    assert "nobody/has-this-model is not on this machine; give --base_checkpoint" in found(report, "weight files")
    done = statuses(report)
    assert (done["files"], done["statistics"], done["tokenizer"]) == ("ok", "ok", "ok")
    assert done["prediction"] == "skipped"
