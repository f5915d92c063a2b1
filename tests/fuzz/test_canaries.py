"""Code in files of others is never executed: pickles that call something, tags of YAML, code beside the weights."""

from __future__ import annotations

import functools
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from prismo.align.vggt import load_vggt
from prismo.data.dataset import open_dataset
from prismo.testing.tiny import make_tiny_policy, make_tiny_vggt
from prismo.training.config import FinetuneConfig, parse_config
from tests.fuzz.conftest import DATASET
from tests.fuzz.harness import Fuzzer
from tests.fuzz.mutate import Draw, Mutation, writes
from tests.fuzz.test_checkpoints import reader
from tests.fuzz.test_yaml import MIXTURE, ROBOT

MARK = "executed"


class _Canary:
    """Its pickle makes a folder where it is loaded."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


_CALLS = {
    "os.mkdir": _Canary(os.mkdir, MARK),
    "os.system": _Canary(os.system, f"mkdir {MARK}"),
    "eval": _Canary(eval, f"__import__('os').mkdir('{MARK}')"),
    "exec": _Canary(exec, f"import os; os.mkdir('{MARK}')"),
}
_TAGS = ("!!python/object/apply:os.mkdir [executed]", "!!python/object/apply:os.system ['mkdir executed']",
         "!!python/object/new:os.mkdir [executed]", "!!python/name:os.mkdir", "!include executed.yaml")  # fmt: skip


@pytest.fixture(scope="module")
def believed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a teacher, descriptions and flags in one folder."""
    folder = Path(shutil.copytree(dataset, tmp_path_factory.mktemp("fuzz") / "believed"))
    make_tiny_policy(folder, layers=2)
    make_tiny_vggt(folder / "vggt.pt", image_size=56)
    (folder / "robot.yaml").write_text(ROBOT)
    (folder / "mixture.yaml").write_text(MIXTURE.replace(f", {DATASET}: 2", ""))
    (folder / "flags.yaml").write_text("batch_size: 2\n")
    return folder


def use_everything(folder: Path) -> Any:
    """Each in turn; a refusal of one does not keep the others from being read."""
    os.chdir(folder)
    uses = (
        lambda: reader("", DATASET)(folder),
        lambda: load_vggt(folder / "vggt.pt"),
        lambda: open_dataset(folder, folder / "mixture.yaml"),
        lambda: parse_config(FinetuneConfig, ["--config_path", "flags.yaml"]),
    )
    refused = None
    for use in uses:
        try:
            use()
        except Exception as error:
            refused = refused or error
    assert not list(folder.rglob(MARK)), "code of a file was executed"
    if refused:
        raise refused
    return "read"


@st.composite
def canaries(draw: Draw, folder: Path) -> Mutation:
    """Code that runs if the file is believed."""
    kind = draw(st.sampled_from(["pickle", "zip", "extra", "yaml", "code"]))
    modules = sorted(path.name for path in folder.glob("*.pt"))
    if kind == "yaml":
        file, tag = draw(st.sampled_from(["robot.yaml", "mixture.yaml", "flags.yaml"])), draw(st.sampled_from(_TAGS))
        key = {"robot.yaml": "name", "mixture.yaml": "datasets", "flags.yaml": "run_id_note"}[file]
        return writes(file, kind, tag, f"{key}: {tag}\n".encode(), must_fail=True)
    call = draw(st.sampled_from(sorted(_CALLS)))
    if kind == "code":
        file = draw(st.sampled_from(["modeling_prismatic.py", "pytorch_model.bin", "configuration_prismatic.py"]))
        code = pickle.dumps(_CALLS[call]) if file.endswith("bin") else f"import os; os.mkdir('{MARK}')".encode()
        return writes(file, kind, "code", code)
    file = draw(st.sampled_from(modules))
    what = f"{call} in a {kind}"
    if kind == "pickle":
        return writes(file, kind, what, pickle.dumps(_CALLS[call], protocol=draw(st.integers(0, 5))), must_fail=True)
    return Mutation(file, kind, what, functools.partial(_plant, file, call, kind == "extra"), must_fail=True)


def _plant(file: str, call: str, beside: bool, folder: Path) -> None:
    """A .pt file that is one, but for its pickle."""
    state = torch.load(folder / file, weights_only=True)
    torch.save(state | {"module.extra": _CALLS[call]} if beside else _CALLS[call], folder / file)
    assert zipfile.is_zipfile(folder / file)


def test_nothing_is_executed(fuzz: Fuzzer, believed: Path) -> None:
    fuzz(believed, canaries(believed), use_everything, percent=4, legitimate=lambda *_: False)
