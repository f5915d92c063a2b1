"""How a merge appears in its folder: whole, or recognisably not, whatever happens on the way."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from prismo.merging.merge import merge, resolve_base
from prismo.merging.publish import prepared
from prismo.models.component_files import save_component
from prismo.models.folder import TRAINING_CONFIG
from prismo.models.heads import L1RegressionActionHead
from prismo.models.openvla import PrismaticProcessor
from prismo.policies.checkpoint import checkpoint_hash, open_checkpoint
from prismo.policies.openvla import processor_folder
from prismo.util.files import write_json
from tests.disk import small_disk

HEAD = "action_head--latest_checkpoint.pt"


@pytest.fixture(scope="module")
def older(base, trained, tmp_path_factory) -> Path:
    """The merged folder of another run on the same base, whose head has another step in its name."""
    run = Path(shutil.copytree(trained[0], tmp_path_factory.mktemp("older") / "run--20_chkpt"))
    (run / HEAD).unlink()
    save_component(L1RegressionActionHead(32), run, "action_head", 20)
    return merge(base, run, run.with_name("older"), progress=False, verify=False).folder


def identity(folder: Path) -> str:
    """Hash of the policy that evaluation would run, or its refusal."""
    try:
        return checkpoint_hash(open_checkpoint(folder))
    except FileNotFoundError as error:
        return str(error).replace(str(folder), "")


def kill_before(number: int, work: Callable[[], object]) -> bool:
    """Do `work` in a process that ends before its n-th change of the file system; False if there are fewer."""
    child = os.fork()
    if not child:
        changes = itertools.count()

        def counted(change: Callable) -> Callable:
            def call(*args: object, **options: object) -> object:
                if next(changes) == number:
                    os._exit(9)
                return change(*args, **options)

            return call

        for name in ("replace", "unlink", "rmdir", "mkdir", "link"):
            setattr(os, name, counted(getattr(os, name)))
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def publish(source: Path, output: Path) -> None:
    """Let the files of a merged folder appear in another one, as `merge` does with what it wrote."""
    with prepared(output) as temporary:
        for path in source.iterdir():
            if path.is_file():
                os.link(path, temporary / path.name)


def killed_states(source: Path, start: Path, root: Path) -> list[Path]:
    """`start` after a kill before every change that publishing makes, and after all of them."""
    for number in itertools.count():
        state = Path(shutil.copytree(start, root / str(number), copy_function=os.link))
        if not kill_before(number, lambda state=state: publish(source, state)):
            return [root / str(i) for i in range(number + 1)]
    raise AssertionError


@pytest.mark.processes
def test_a_kill_in_a_new_folder(base, trained, merged, tmp_path):
    """It left a policy without action head and statistics, which counted as one with discrete tokens."""
    (tmp_path / "empty").mkdir()
    states = killed_states(merged, tmp_path / "empty", tmp_path / "states")
    found = [identity(state) for state in states]
    assert len(states) > 20
    assert "found nothing" in found[0]
    assert found[-1] == identity(merged)
    unfinished = [state for state, what in zip(states, found, strict=True) if "unfinished merge" in what]
    assert set(found[1:]) == {found[states.index(unfinished[0])], found[-1]}
    with pytest.raises(FileNotFoundError, match="unfinished merge"):
        resolve_base(unfinished[-1])
    for state in (unfinished[0], unfinished[-1]):
        merge(base, trained[0], state, progress=False, verify=False)  # without overwrite
        assert identity(state) == identity(merged)
        assert not list(state.glob(".*"))


@pytest.mark.processes
def test_a_kill_while_an_older_merge_is_replaced(base, trained, merged, older, tmp_path):
    states = killed_states(merged, older, tmp_path / "states")
    found = [identity(state) for state in states]
    assert found[0] == identity(older)
    assert found[-1] == identity(merged) != found[0]
    kinds = [what for what, _ in itertools.groupby(found)]
    assert len(kinds) == 3, kinds
    assert "unfinished merge" in kinds[1]
    half = states[found.index(kinds[1]) + 3]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, hard))  # the second attempt fails, too
    try:
        with pytest.raises(OSError, match="File too large"):
            merge(base, trained[0], half, progress=False, verify=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert identity(half) == kinds[1]
    merge(base, trained[0], half, progress=False, verify=False)
    assert identity(half) == identity(merged)


@pytest.mark.processes
def test_a_kill_in_the_checkpoint_itself(base, trained, tmp_path):
    """The adapter is never touched, so until the merged model is whole the unmerged one is evaluated."""
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    adapter = run / "lora_adapter" / "adapter_config.json"
    adapter.write_text(adapter.read_text().replace("openvla/openvla-7b", str(base)))
    whole = merge(base, Path(shutil.copytree(run, tmp_path / "whole")), progress=False, verify=False).folder
    added = tmp_path / "added"
    added.mkdir()
    for path in whole.iterdir():
        if path.is_file() and not (run / path.name).exists():
            os.link(path, added / path.name)
    states = killed_states(added, run, tmp_path / "states")
    found = [identity(state) for state in states]
    assert [what for what, _ in itertools.groupby(found)] == [identity(run), identity(whole)]
    own = [processor_folder(open_checkpoint(state)) == state for state in states]
    PrismaticProcessor.from_pretrained(states[own.index(True)])  # the first that does without the base's
    merge(base, states[found.index(identity(whole)) - 1], progress=False, verify=False)


@pytest.mark.parametrize("files", [6, 9, 14])
def test_a_full_disk_changes_nothing(base, trained, tmp_path, files):
    """There was room for the weights but not for all files beside them, and what lay there counted as a policy."""
    with small_disk(tmp_path / "disk", size="64m", files=files) as disk:
        (disk / "merged").mkdir()
        with pytest.raises(OSError, match="No space left"):
            merge(base, trained[0], disk / "merged", progress=False, verify=False)
        assert not list((disk / "merged").iterdir())
        subprocess.run(["mount", "-o", "remount,nr_inodes=100", str(disk)], check=True)
        merge(base, trained[0], disk / "merged", progress=False, verify=False)


def test_ruins_of_an_older_version_are_replaced(base, trained, merged, tmp_path):
    """Config and weights without the rest, and a truncated tokenizer."""
    folder = tmp_path / "merged"
    folder.mkdir()
    for path in merged.glob("model*"):
        shutil.copy(path, folder)
    shutil.copy(merged / "config.json", folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"already holds merged weights .*--overwrite True"):
        merge(base, trained[0], folder, progress=False)
    merge(base, trained[0], folder, progress=False, overwrite=True)
    assert identity(folder) == identity(merged)
    PrismaticProcessor.from_pretrained(folder)


def test_nothing_of_another_run_stays(base, trained, merged, older, tmp_path):
    """Its head has another name, so two heads would lie there, or one of a policy that has none."""
    folder = Path(shutil.copytree(older, tmp_path / "merged"))
    merge(base, trained[0], folder, progress=False, verify=False, overwrite=True)
    assert identity(folder) == identity(merged)
    run = Path(shutil.copytree(trained[0], tmp_path / "tokens"))
    for name in (HEAD, TRAINING_CONFIG):
        (run / name).unlink()
    merge(base, run, folder, progress=False, verify=False, overwrite=True)
    assert open_checkpoint(folder).head == "discrete"
    assert not (folder / TRAINING_CONFIG).exists()


def test_files_in_the_way(base, trained, tmp_path):
    """Nothing is replaced without being asked, and the adapter of another run never."""
    folder = tmp_path / "mine"
    folder.mkdir()
    write_json(folder / "dataset_statistics.json", {})
    with pytest.raises(ValueError, match=r"already holds dataset_statistics\.json; choose an empty folder"):
        merge(base, trained[0], folder, progress=False)
    other = Path(shutil.copytree(trained[0], tmp_path / "other"))
    with pytest.raises(ValueError, match="is the checkpoint of another run"):
        merge(base, trained[0], other, progress=False, overwrite=True)
    assert not list(folder.glob("model*"))
    assert not list(other.glob("model*"))


def test_damaged_files_are_found_before_merging(base, trained, tmp_path):
    broken = Path(shutil.copytree(base, tmp_path / "base"))
    (broken / "tokenizer.json").write_text((base / "tokenizer.json").read_text()[:-100])
    with pytest.raises(ValueError, match=r"tokenizer\.json: not valid JSON"):
        merge(broken, trained[0], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
