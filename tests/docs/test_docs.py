"""Every block of README and docs is run at tiny size, or stands in a list with the reason; every link leads somewhere.

Blocks run as they are written, with tiny checkpoints and a made-up dataset where they expect the published ones
(`tests/docs/shell.py`). What they print or score is the matter of other tests.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import pytest

from prismo.data.normalize import statistics_to_json
from prismo.data.synthetic import write_synthetic_libero
from prismo.embodiment import LIBERO
from prismo.testing.tiny import make_tiny_policy, make_tiny_vggt, tiny_statistics
from prismo.testing.tiny_spatialvla import make_tiny_spatialvla
from tests.docs.pages import PAGES, ROOT, Block, anchors, blocks, fences, links
from tests.docs.shell import Shell, copy

DATASET = "libero_spatial_no_noops"
# Blocks that no test here runs -> why not, and which test runs something like it. A name is page and first line.
NOT_RUN = {
    "README.md: make setup": "network, and minutes: tests/test_setup.py and tests/test_demo.py",
    "docs/install.md: python -m venv .venv && source .venv/bin/activate": "network: it installs packages",
    "docs/install.md: prismo doctor": "looks at this machine: tests/sim/test_doctor.py",
    "docs/data.md: prismo data regenerate --libero_task_suite libero_spatial \\": (
        "needs LIBERO's human demonstrations: tests/sim/test_demos.py"
    ),
    "docs/spatialvla.md: sbatch scripts/train_libero_spatialvla.slurm spatial": (
        "needs Slurm: tests/training/test_spatialvla.py shows what it starts"
    ),
    "docs/align.md: import torch": "tests/align/test_any_vla.py",
    "docs/align.md: from torch import nn": "tests/align/test_any_vla.py",
}
SHELL = blocks("bash")
PYTHON = blocks("python")


def run_here(found: list[Block]) -> list:
    return [pytest.param(block, id=block.name) for block in found if block.name not in NOT_RUN]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Path]:
    """Tiny things in place of what is published, by the name that they have on the hub."""
    root = tmp_path_factory.mktemp("published")
    for name in (DATASET, "my_robot"):
        write_synthetic_libero(root / "data", name, episodes=4, steps=16, image_size=64)
    spatialvla = make_tiny_spatialvla(root / "spatialvla")
    return {
        "openvla/openvla-7b": tiny_base,
        "facebook/VGGT-1B": make_tiny_vggt(root / "model.pt", image_size=56),
        "openvla/modified_libero_rlds": root / "data",
        "IPEC-COMMUNITY/spatialvla-4b-224-pt": spatialvla,
        "IPEC-COMMUNITY/spatialvla-4b-mix-224-pt": spatialvla,
        "haofuly/spatial-forcing-7b-finetuned-libero-spatial": make_tiny_policy(root / "spatial", dataset=DATASET),
        "openvla/openvla-7b-finetuned-libero-goal": make_tiny_policy(
            root / "goal", dataset="libero_goal_no_noops", head="discrete", proprio=False
        ),
    }


def download(published: dict[str, Path], repository: str, folder: Path) -> None:
    """What `hf download` does."""
    source = published[repository]
    copy(source, folder if source.is_dir() else folder / source.name)


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory, published: dict[str, Path]) -> Path:
    """`ckpts`, `data` and the hub's names after all downloads that `ckpts/README.md` and `data/README.md` list."""
    folder = tmp_path_factory.mktemp("downloaded")
    pages = "".join((ROOT / page).read_text() for page in ("ckpts/README.md", "data/README.md"))
    for repository, target in re.findall(r"hf download (\S+) .*?--local-dir ([^\s`]+)", pages):
        if repository in published:
            download(published, repository, folder / target)
    for name in published:
        download(published, name, folder / name)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, downloaded: Path, published: dict[str, Path]) -> Path:
    """Folder of runs: those that blocks name without training them."""
    shell = workspace(tmp_path_factory.mktemp("trained"), downloaded, published)
    assert shell.run("prismo train --config_path my_run.yaml") == 0
    spatialvla = "--vla_path ckpts/spatialvla-4b-224-pt --run_id_override my_spatialvla"
    data = f"--data_root_dir data --dataset_name {DATASET} --merge_lora_during_training False"
    assert shell.run(f"prismo finetune {spatialvla} {data}") == 0
    return shell.folder / "runs"


def workspace(folder: Path, downloaded: Path | None, published: dict[str, Path]) -> Shell:
    """A checkout, the downloads if any, and the YAML files of the pages under the names in their first lines."""
    entries = [ROOT / name for name in ("recipes", "scripts", "vla-scripts")]
    for entry in [*entries, *(downloaded.iterdir() if downloaded else ())]:
        (folder / entry.name).symlink_to(entry)
    for block in blocks("yaml"):
        if name := re.match(r"# (\w+\.yaml)\n", block.text):
            (folder / name[1]).write_text(block.text)
    return Shell(folder, functools.partial(download, published))


@pytest.mark.parametrize("block", run_here(SHELL))
@pytest.mark.processes
def test_a_shell_block_runs(
    block: Block, tmp_path: Path, published: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    if re.search(r"prismo (eval|data collect)", block.text):
        request.getfixturevalue("drawing")
    # What comes after `hf download` in a block finds what it needs, or its folders do not fit.
    before = None if "hf download" in block.text else request.getfixturevalue("downloaded")
    shell = workspace(tmp_path, before, published)
    for run in set(re.findall(r"runs/(my_[a-z]+)", block.text)):
        if f"--run_id_override {run}" not in block.text:
            for folder in request.getfixturevalue("trained").glob(f"{run}*"):
                copy(folder, tmp_path / "runs" / folder.name)
    if steps := re.findall(r"--max_steps (\d+)", block.text):  # sizes hide it if they do not fit
        assert set(re.findall(r"runs/\w+--(\d+)_chkpt", block.text)) <= set(steps)
    assert shell.run(block.text) == 0, f"{block.page}, line {block.line}"


def test_python_blocks_run(downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a page one after the other: later ones use the names of the earlier ones."""
    fit = f"prismo data gaussians --data_root_dir data --dataset_name {DATASET} --output gaussians.json"
    assert workspace(tmp_path, downloaded, {}).run(fit) == 0
    monkeypatch.chdir(tmp_path)
    names: dict[str, dict] = {}
    for block in PYTHON:
        if block.name in NOT_RUN:
            continue
        given = {
            "image": np.zeros((224, 224, 3), np.uint8),
            "statistics": statistics_to_json({"it": tiny_statistics(LIBERO)})["it"],
        }
        code = compile("\n" * block.line + block.text.replace('"cuda"', '"cpu"'), str(ROOT / block.page), "exec")
        exec(code, names.setdefault(block.page, given))
    assert len(names) >= 2


def test_the_list_of_blocks_that_are_not_run_is_up_to_date() -> None:
    present = [block.name for block in SHELL + PYTHON]
    assert sorted(set(present)) == sorted(present), "two blocks of a page begin alike: name them apart"
    assert not [name for name in NOT_RUN if name not in present]


@pytest.mark.parametrize("page", PAGES)
def test_no_block_escapes_by_its_language(page: str) -> None:
    assert fences(page) <= {"", "bash", "python", "yaml", "bibtex"}
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not re.search(r"^ +```", text, re.MULTILINE), "an indented block is not found by the tests"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}: there is no {target}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}: no such heading; there are {anchors(target)}"
