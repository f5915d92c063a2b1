"""Merging: predictions, bytes, statistics, and refusal of everything that would silently give wrong weights."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from prismo.data.normalize import load_statistics
from prismo.merging.merge import merge, verify_merge
from prismo.models.component_files import save_component
from prismo.models.film import add_film, load_film_backbone
from prismo.models.lora import add_lora, merged_weight, save_adapter
from prismo.models.openvla import OpenVLAForActionPrediction, PrismaticProcessor
from prismo.models.weight_files import stored_tensors
from prismo.testing.tiny import make_tiny_openvla
from tests.golden import close, figures, salt, sizes, weight
from tests.models.adapted import SPEC, action_states, load, randomize_lora

ADAPTER = Path("lora_adapter") / "adapter_model.safetensors"
LM_HEAD = "base_model.model.language_model.lm_head.base_layer.weight"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in stored_tensors(folder).items()}


def test_merged_predicts_what_base_and_adapter_predict(merged, trained, batch):
    before = action_states(load(merged), batch)
    torch.testing.assert_close(before, action_states(trained[1], batch), atol=1e-4, rtol=1e-4)


def test_merged_weights_equal_those_of_stock_peft(base, merged, trained):
    stock = PeftModel.from_pretrained(load(base), trained[0] / "lora_adapter").merge_and_unload().state_dict()
    ours = tensors_of(merged)
    assert ours.keys() == stock.keys()
    for name, value in stock.items():
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=1e-5)


def test_merged_weights_are_the_golden_ones():
    golden, shapes = figures("lora.npz"), sizes("state_shapes.json")
    config = sizes("adapter_config.json")

    def merge_one(module: str) -> torch.Tensor:
        a, b = (f"base_model.model.{module}.lora_{x}.weight" for x in "AB")
        lora = sizes("lora_shapes.json")
        factors = (weight(salt("lora"), name, lora[name]) for name in (a, b))
        name = f"{module}.weight"
        return merged_weight(weight(salt(), name, shapes[name]), *factors, config["lora_alpha"] / config["r"])

    close(merge_one("vision_backbone.featurizer.patch_embed.proj")[::97, 0, ::5, ::5], golden["conv"])
    close(merge_one("language_model.model.layers.0.self_attn.q_proj")[::9, ::9], golden["q0"])
    close(merge_one("vision_backbone.fused_featurizer.blocks.3.attn.qkv")[::301, ::97], golden["qkv"])


def test_bf16_bases_are_rounded_once(tiny_base, checkpoint, tmp_path):
    rewrite(checkpoint, base_fingerprint=None)
    report = merge(tiny_base, checkpoint, tmp_path / "out", progress=False)
    assert report.checks.weight_error <= 1
    base, out, lora = tensors_of(tiny_base), tensors_of(tmp_path / "out"), load_file(checkpoint / ADAPTER)
    name = "language_model.model.layers.0.mlp.down_proj"
    a, b = (lora[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    exact = base[f"{name}.weight"].double() + SPEC.scale * (b @ a)
    assert torch.equal(out[f"{name}.weight"], exact.bfloat16())
    assert not torch.equal(out[f"{name}.weight"], base[f"{name}.weight"])


def test_the_result_is_a_complete_checkpoint(base, merged):
    names = {p.name for p in merged.iterdir()}
    assert {
        "config.json",
        "model.safetensors.index.json",
        "merge.json",
        "dataset_statistics.json",
        "training_config.json",
        "action_head--latest_checkpoint.pt",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names
    assert not any(name.startswith(".") for name in names)
    assert set(load_statistics(merged / "config.json")) == {"libero_spatial_no_noops"}
    assert set(load_statistics(base / "config.json")) == {"bridge_orig"}
    assert json.loads((merged / "config.json").read_text())["attention"] == "bidirectional"
    PrismaticProcessor.from_pretrained(merged)
    OpenVLAForActionPrediction.from_pretrained(merged)


def test_default_output_is_the_checkpoint_folder_as_in_the_original(base, checkpoint, merged):
    merge(base, checkpoint, progress=False)
    ours, elsewhere = tensors_of(checkpoint), tensors_of(merged)
    assert all(torch.equal(ours[name], value) for name, value in elsewhere.items())
    assert (checkpoint / ADAPTER).is_file()


def test_bytes_do_not_depend_on_shards_or_threads(base, trained, merged, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        merge(base, trained[0], tmp_path / "out", shard_bytes=500_000, progress=False)
    finally:
        torch.set_num_threads(threads)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > len(list(merged.glob("model-*.safetensors")))
    one, other = tensors_of(merged), tensors_of(tmp_path / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)


def rewrite(checkpoint: Path, tensors: dict | None = None, **metadata: str | None) -> None:
    """Store the adapter anew with other tensors or metadata."""
    kept = {key: value for key, value in metadata.items() if value is not None}
    save_file(tensors or load_file(checkpoint / ADAPTER), checkpoint / ADAPTER, metadata={"format": "pt"} | kept)


def test_double_merges_are_refused(base, checkpoint, tmp_path):
    rewrite(checkpoint)  # as the original: no fingerprint of the base in the adapter
    merge(base, checkpoint, tmp_path / "merged", progress=False)
    with pytest.raises(ValueError, match="twice"):  # known from merge.json
        merge(tmp_path / "merged", checkpoint, tmp_path / "out", progress=False)
    merge(base, checkpoint, progress=False)
    with pytest.raises(ValueError, match="twice"):
        merge(checkpoint, checkpoint, progress=False)
    (checkpoint / "merge.json").unlink()
    with pytest.raises(ValueError, match="twice"):  # merged by the original: adapter beside weights, no marker
        merge(checkpoint, checkpoint, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_merged_weights_are_replaced_only_on_request(base, checkpoint):
    merge(base, checkpoint, progress=False, shard_bytes=500_000)
    with pytest.raises(ValueError, match=r"already holds merged weights .*--overwrite True"):
        merge(base, checkpoint, progress=False)
    merge(base, checkpoint, progress=False, overwrite=True)
    verify_merge(base, checkpoint, checkpoint, progress=False)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    assert {p.name for p in checkpoint.glob("model*.safetensors")} == set(index.values())
    with pytest.raises(ValueError, match="base itself"):
        merge(base, checkpoint, base, overwrite=True, progress=False)


def test_a_second_adapter_on_merged_weights_is_fine_and_both_are_recorded(base, merged, tmp_path, batch):
    model = load(merged)
    add_lora(model, SPEC)
    randomize_lora(model, seed=1)
    shutil.copytree(merged, tmp_path / "second", ignore=shutil.ignore_patterns("model*", "config.json", "merge.json"))
    save_adapter(model, tmp_path / "second", SPEC, base=str(merged))
    merge(merged, tmp_path / "second", progress=False)
    torch.testing.assert_close(
        action_states(load(tmp_path / "second"), batch), action_states(model, batch), atol=1e-4, rtol=1e-4
    )
    assert len(json.loads((tmp_path / "second" / "merge.json").read_text())["adapters"]) == 2


def test_another_base_is_refused(base, checkpoint, tmp_path):
    other = make_tiny_openvla(tmp_path / "other", seed=1, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"trained on other weights .*'openvla/openvla-7b'"):
        merge(other, checkpoint, progress=False)
    # Adapters of the original carry no fingerprint, but a copy of lm_head.
    rewrite(checkpoint, load_file(checkpoint / ADAPTER) | {LM_HEAD: tensors_of(base)["language_model.lm_head.weight"]})
    with pytest.raises(ValueError, match=r"another base model .*lm_head"):
        merge(other, checkpoint, progress=False)
    merge(base, checkpoint, progress=False)


def test_a_base_with_a_flipped_byte_is_refused(base, checkpoint, tmp_path):
    """The quick fingerprint looks at the first bytes of a tensor only."""
    flipped = Path(shutil.copytree(base, tmp_path / "flipped"))
    stored = stored_tensors(flipped)["language_model.lm_head.weight"]
    with stored.file.open("r+b") as file:
        file.seek(stored.start + stored.size - 3)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ValueError, match="not those that training read"):
        merge(flipped, checkpoint, tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").iterdir())


def test_adapters_of_another_size_are_refused_before_anything_is_written(checkpoint, tmp_path):
    wider = make_tiny_openvla(tmp_path / "wider", hidden_size=48)
    with pytest.raises(ValueError, match=r"lora_[AB]\.weight has shape \[.*\], expected \["):
        merge(wider, checkpoint, progress=False)
    assert not list(checkpoint.glob("model*"))


def test_missing_statistics_are_an_error(base, checkpoint):
    (checkpoint / "dataset_statistics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset_statistics\.json"):
        merge(base, checkpoint, progress=False)
    assert not list(checkpoint.glob("model*"))


def test_bad_bases_are_one_clear_error(base, checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a checkpoint folder nor a hub id"):
        merge(tmp_path / "nowhere", checkpoint, progress=False)
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    shard = sorted(broken.glob("model*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated"):
        merge(broken, checkpoint, progress=False)


def test_a_hub_id_is_found_in_the_local_cache(base, checkpoint, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--openvla--openvla-7b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(base, repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    merge("openvla/openvla-7b", checkpoint, progress=False)
    verify_merge(base, checkpoint, checkpoint, progress=False)
    with pytest.raises(FileNotFoundError, match="no folder openvla/other-7b"):
        merge("openvla/other-7b", checkpoint, progress=False)


def test_a_full_disk_leaves_earlier_files_as_they_were(base, checkpoint):
    before = {p.name: p.read_bytes() for p in checkpoint.iterdir() if p.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, hard))  # the kernel refuses the write, as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            merge(base, checkpoint, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in checkpoint.iterdir() if p.is_file()} == before
    assert {p.name for p in checkpoint.iterdir() if p.is_dir()} == {"lora_adapter"}


@pytest.mark.parametrize("fault", ["not applied", "applied twice", "one row", "not a number", "copied tensor"])
def test_verification_finds(base, trained, merged, tmp_path, fault):
    folder = Path(shutil.copytree(merged, tmp_path / "faulty"))
    wrong, right = tensors_of(base), tensors_of(merged)
    name = "language_model.model.layers.2.self_attn.v_proj.weight"
    if fault == "not applied":
        change = wrong[name]
    elif fault == "applied twice":
        change = 2 * right[name] - wrong[name]
    elif fault in ("one row", "not a number"):
        change = right[name].clone()
        change[20] = wrong[name][20] if fault == "one row" else torch.nan
    else:
        name = "language_model.model.embed_tokens.weight"
        change = right[name].clone()
        change[7, 7] += 1e-3
    for shard in folder.glob("model*.safetensors"):
        stored = load_file(shard)
        if name in stored:
            save_file(stored | {name: change}, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name):
        verify_merge(base, trained[0], folder, progress=False)


def test_film_runs_keep_the_vision_lora_in_the_backbone_file(base, trained, tmp_path, batch):
    model = load(base)
    add_film(model)
    add_lora(model, SPEC)
    randomize_lora(model)
    folder = tmp_path / "film"
    folder.mkdir()
    shutil.copy(trained[0] / "dataset_statistics.json", folder)
    save_adapter(model, folder, SPEC, base=str(base))
    with pytest.raises(FileNotFoundError, match="vision_backbone"):
        merge(base, folder, progress=False)
    save_component(model.vision_backbone, folder, "vision_backbone", "latest")
    merge(base, folder, progress=False)
    name = "vision_backbone.featurizer.blocks.0.attn.qkv.weight"
    assert torch.equal(tensors_of(folder)[name], tensors_of(base)[name])
    elsewhere = merge(base, folder, tmp_path / "elsewhere", progress=False).folder  # without the adapter's scale
    for merged in (folder, elsewhere):
        loaded = load(merged)
        load_film_backbone(loaded, merged)
        torch.testing.assert_close(action_states(loaded, batch), action_states(model, batch), atol=1e-4, rtol=1e-4)


@pytest.mark.processes
def test_the_script_with_the_original_flags(base, checkpoint):
    script = Path(__file__).resolve().parents[2] / "vla-scripts" / "merge_lora_weights_and_save.py"
    flags = ["--base_checkpoint", str(base), "--lora_finetuned_checkpoint_dir", str(checkpoint)]
    first, again = (
        subprocess.run([sys.executable, script, *flags], check=False, capture_output=True, text=True, timeout=300)
        for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert re.search(r"is complete: \d+ weights merged, \d+ copied \(\d+\.\d MB, \d+ s\)", first.stdout)
    assert "every weight is base + adapter" in first.stdout
    assert again.returncode == 2
    assert "overwrite" in again.stderr.splitlines()[-1]
    assert "Traceback" not in again.stderr
    assert load_statistics(checkpoint / "config.json").keys() == {"libero_spatial_no_noops"}
    assert OpenVLAForActionPrediction.from_pretrained(checkpoint).config.attention == "bidirectional"
