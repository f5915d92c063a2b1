"""Fuzzing: how many cases (`pytest tests/fuzz --fuzz-cases 2000`; 300 otherwise), and the intact folders, read-only."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from prismo.commands.train import train
from prismo.data.dataset import open_dataset
from prismo.data.synthetic import write_synthetic_libero
from prismo.testing.tiny import make_tiny_openvla
from prismo.training.config import FinetuneConfig
from tests.fuzz.harness import Fuzzer

DATASET = "libero_spatial_no_noops"
_COLUMNS = ("clear", "harmless", "other", "unclear", "traceback", "crash", "hang", "escape", "accepted")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-cases", type=int, default=300, help="damaged inputs that tests/fuzz tries in all")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("fuzz")
            item.add_marker("processes")  # what a damaged input may crash is tried in a process of its own


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What happened in how many cases, by property."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    rows = [(report.nodeid, dict(report.user_properties).get("fuzz")) for report in reports]
    if counted := sorted((name, Counter(counts)) for name, counts in rows if counts):
        terminalreporter.section("fuzzed cases")
        total = sum((counts for _, counts in counted), Counter())
        for name, counts in [*counted, ("all", total)]:
            shown = ", ".join(f"{counts[column]} {column}" for column in _COLUMNS if counts[column])
            terminalreporter.write_line(f"{counts.total():5} {name.rpartition('/')[2]}: {shown}")


@pytest.fixture
def fuzz(request: pytest.FixtureRequest, tmp_path: Path) -> Fuzzer:
    cases = request.config.getoption("--fuzz-cases", 300)
    return Fuzzer(cases, tmp_path, lambda counts: request.node.user_properties.append(("fuzz", dict(counts))))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version folder with four shards of one or two episodes, and its index."""
    root = tmp_path_factory.mktemp("fuzz") / "root"
    write_synthetic_libero(root, DATASET, episodes=6, steps=10, image_size=32, shard_bytes=40_000)
    open_dataset(root, DATASET)
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base/`, `root/` with a dataset, and `runs/` with a run of one update; paths within it are relative to it."""
    folder = tmp_path_factory.mktemp("fuzz") / "trained"
    make_tiny_openvla(folder / "base", layers=2)
    write_synthetic_libero(folder / "root", DATASET, episodes=2, steps=10, image_size=32)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert train(FinetuneConfig, training_flags()) == 0
    finally:
        os.chdir(before)
    for path in folder.rglob("*_config.json"):
        path.write_text(path.read_text().replace(f"{folder}/", ""))
    return folder


def training_flags(**changes: object) -> list[str]:
    """Of the run in `trained`, to be started there."""
    values: dict[str, object] = {
        "vla_path": "base",
        "data_root_dir": "root",
        "dataset_name": DATASET,
        "run_root_dir": "runs",
        "run_id_override": "run",
        "use_proprio": True,
        "lora_rank": 2,
        "batch_size": 1,
        "num_workers": 0,
        "device": "cpu",
        "max_steps": 1,
        "merge_lora_during_training": False,
    } | changes
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]
