"""The model card of a merged checkpoint: true, complete, runnable, and never in the place of somebody else's page."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from prismo import __version__
from prismo.commands import COMMANDS
from prismo.eval.config import EvalConfig
from prismo.merging.card import CARD, model_card
from prismo.merging.merge import merge
from prismo.models.folder import TRAINING_CONFIG
from prismo.policies.base import PolicyInput
from prismo.util.files import write_json
from prismo.util.flags import parse_flags
from prismo.verify.facts import read_facts

KEY = "libero_spatial_no_noops"


def write(checkpoint: Path, base: str = "openvla/openvla-7b", model_type: str = "openvla") -> ModelCard:
    return ModelCard(model_card(base, model_type, checkpoint, 32, "me/my-policy"), ignore_metadata_errors=False)


def test_the_card_of_a_merge(merged: Path) -> None:
    card = ModelCard.load(merged / CARD)
    assert card.data.license == "llama2"
    assert card.data.pipeline_tag == "robotics"
    assert card.data.library_name == "prismo-vla"
    assert card.data.base_model is None  # a folder is no id
    assert card.data.datasets is None  # ten synthetic episodes are not the published dataset
    assert card.data.tags == ["vision-language-action", "openvla", "libero"]
    assert card.text.startswith("\n# merged\n")
    assert f"rank 4, merged into `base` with prismo {__version__} " in card.text
    assert f"| `{KEY}` | 10 | 1,000 |" in card.text
    assert "| `num_images_in_input` | 2 |" in card.text
    assert "| `alignment` | none |" in card.text
    assert "The log of the run (`metrics.jsonl`) did not lie beside" in card.text


def test_what_the_hub_reads_of_a_published_base_and_dataset(checkpoint: Path) -> None:
    known = read_facts().datasets["libero_spatial"]
    statistics = json.loads((checkpoint / "dataset_statistics.json").read_text())
    statistics[KEY] |= {"num_transitions": known.transitions, "num_trajectories": known.trajectories}
    write_json(checkpoint / "dataset_statistics.json", statistics)
    recipe = {"align_loss_coeff": 0.5, "vla_layers_align": 24}
    write_json(
        checkpoint / TRAINING_CONFIG,
        {
            "dataset_name": KEY,
            "learning_rate": 5e-4,
            "teacher": "vggt",
            "align_recipe": recipe,
        },
    )
    card = write(checkpoint)
    assert card.data.base_model == "openvla/openvla-7b"
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert card.data.datasets == ["openvla/modified_libero_rlds"]
    assert card.data.tags[-1] == "spatial-forcing"
    assert f"`--dataset_name {KEY}`:" in card.text
    for row in ("| `learning_rate` | 0.0005 |", "| `teacher` | vggt |", "| `vla_layers_align` | 24 |"):
        assert row in card.text
    assert "features of a frozen teacher (`vggt`)" in card.text


def test_the_published_datasets_have_as_many_episodes_as_the_facts_say() -> None:
    from prismo.merging.card import _LIBERO_EPISODES  # noqa: PLC0415 (of no other use)

    facts = read_facts()
    for name, episodes in _LIBERO_EPISODES.items():
        assert facts.dataset(name).trajectories == episodes


def test_the_last_figures_before_the_checkpoint(checkpoint: Path) -> None:
    run = checkpoint.with_name("run")
    run.mkdir()
    lines = [
        {"step": 5, "split": "train", "loss": 0.5},
        {"step": 10, "split": "train", "loss": 0.25},
        {"step": 10, "split": "val", "l1_loss": 0.125},
        {"step": 20, "split": "train", "loss": 0.0625},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3')
    text = write(checkpoint).text
    assert "| train | 10 | `loss` | 0.25 |\n| val | 10 | `l1_loss` | 0.125 |" in text
    assert "0.0625" not in text
    assert "No success rate was measured" in text


def test_a_run_of_another_project_and_another_family(checkpoint: Path) -> None:
    (checkpoint / TRAINING_CONFIG).unlink()
    assert "Not known: the checkpoint has no `training_config.json`" in write(checkpoint).text
    (checkpoint / "dataset_statistics.json").unlink()
    card = write(checkpoint, "IPEC-COMMUNITY/spatialvla-4b-224-pt", "spatialvla")
    assert card.data.license == "gemma"
    assert "Nothing in the checkpoint says what it was trained on" in card.text
    assert "prismo eval" not in card.text


def test_code_and_command_run_as_they_stand(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (merged / CARD).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    picture = np.zeros((224, 224, 3), np.uint8)
    names = {"images": (picture, picture), "state": np.zeros(8), "instruction": "pick up the bowl"}
    exec(code, names)
    assert names["actions"].shape == (8, 7)
    assert names["PolicyInput"] is PolicyInput
    (command,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    program, name, *flags = command.split()
    assert (program, name in COMMANDS) == ("prismo", True)
    assert parse_flags(EvalConfig, flags).pretrained_checkpoint == merged.as_posix()
    assert flags == ["--pretrained_checkpoint", merged.as_posix(), "--task_suite_name", "libero_spatial"]


def test_pages_of_others_stay(base: Path, checkpoint: Path, merged: Path, tmp_path: Path) -> None:
    page = checkpoint / CARD
    page.write_text("# Mine\n")
    merge(base, checkpoint, progress=False, verify=False)
    assert page.read_text() == "# Mine\n"

    shutil.copyfile(merged / CARD, page)
    merge(base, checkpoint, progress=False, verify=False, overwrite=True)
    ours = page.read_text()
    assert ours.splitlines()[-1] != (merged / CARD).read_text().splitlines()[-1]  # it names another folder
    assert f"--pretrained_checkpoint {checkpoint.as_posix()} " in ours

    edited = ours.replace("No success rate was measured", "97 % of 500 episodes. No other rate was measured")
    page.write_text(edited)
    merge(base, checkpoint, progress=False, verify=False, overwrite=True)
    assert page.read_text() == edited
    appended = f"{ours}\nTrained on our own robot.\n"
    page.write_text(appended)
    merge(base, checkpoint, progress=False, verify=False, overwrite=True)
    assert page.read_text() == appended
