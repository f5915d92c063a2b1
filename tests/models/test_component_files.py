"""Component files: published names and keys, both prefixes, and errors that say what to do."""

import os
import pickle
import resource

import pytest
import torch
from torch import nn

from prismo.models.component_files import find_component, has_component, load_component, read_component, save_component
from prismo.models.heads import DiffusionActionHead, L1RegressionActionHead
from prismo.models.projectors import ProprioProjector


def small_head(**changes) -> L1RegressionActionHead:
    return L1RegressionActionHead(**{"input_dim": 8, "action_dim": 3, "chunk": 2} | changes)


def assert_same(left: nn.Module, right: nn.Module) -> None:
    for name, value in left.state_dict().items():
        assert torch.equal(value, right.state_dict()[name]), name


@pytest.mark.parametrize(
    ("step", "name"), [(10000, "action_head--10000_checkpoint.pt"), ("latest", "action_head--latest_checkpoint.pt")]
)
def test_round_trip_under_the_published_name(tmp_path, step, name):
    head, other = small_head(), small_head()
    assert save_component(head, tmp_path, "action_head", step) == tmp_path / name
    assert load_component(other, tmp_path, "action_head") == tmp_path / name
    assert_same(head, other)


def test_keys_on_disk_are_those_that_the_original_loaders_expect(tmp_path):
    head = small_head()
    path = save_component(head, tmp_path, "action_head", 1, dtype=torch.bfloat16)
    on_disk = torch.load(path, weights_only=True)
    assert set(on_disk) == {f"module.{name}" for name in head.state_dict()}
    assert {value.dtype for value in on_disk.values()} == {torch.bfloat16}
    path = save_component(nn.Linear(2, 2), tmp_path, "vision_backbone", 1)
    assert set(torch.load(path, weights_only=True)) == {"weight", "bias"}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_files_with_and_without_wrapper_prefixes_load(tmp_path, prefix):
    head, other = small_head(), small_head()
    torch.save(
        {prefix + name: value for name, value in head.state_dict().items()},
        tmp_path / "action_head--150000_checkpoint.pt",
    )
    load_component(other, tmp_path, "action_head")
    assert_same(head, other)


def test_a_module_named_module_keeps_its_name(tmp_path):
    inner = nn.ModuleDict({"module": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    save_component(inner, tmp_path, "vision_backbone", "latest")
    assert "module.weight" in read_component(tmp_path / "vision_backbone--latest_checkpoint.pt")


def test_several_files_need_a_step(tmp_path):
    first, second, loaded = small_head(), small_head(), small_head()
    save_component(first, tmp_path, "action_head", 1)
    save_component(second, tmp_path, "action_head", 2)
    with pytest.raises(ValueError, match="several files for action_head"):
        load_component(loaded, tmp_path, "action_head")
    load_component(loaded, tmp_path, "action_head", step=1)
    assert_same(first, loaded)


def test_missing_files_and_unknown_stems(tmp_path):
    save_component(small_head(), tmp_path, "action_head", 5)
    with pytest.raises(FileNotFoundError, match=r"no proprio_projector.*action_head--5_checkpoint.pt"):
        find_component(tmp_path, "proprio_projector")
    with pytest.raises(FileNotFoundError, match=r"no action_head--7_checkpoint.pt"):
        find_component(tmp_path, "action_head", step=7)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_component(tmp_path / "nowhere", "action_head")
    with pytest.raises(FileNotFoundError, match=r"no action_heads--\*_.*files there: action_head--5_checkpoint.pt"):
        find_component(tmp_path, "action_heads")


def test_what_is_no_file(tmp_path):
    """A broken link of a hub cache, a folder, a pipe that would never end."""
    path = tmp_path / "action_head--5_checkpoint.pt"
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="is no file"):
        find_component(tmp_path, "action_head")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is no file"):
        has_component(tmp_path, "action_head")


def test_modules_that_do_not_fit_are_named(tmp_path):
    save_component(small_head(), tmp_path, "action_head", 5)
    with pytest.raises(ValueError, match="of an L1 head: pass --action_head l1"):
        load_component(DiffusionActionHead(input_dim=8, action_dim=3, chunk=2), tmp_path, "action_head")
    with pytest.raises(ValueError, match=r"layer_norm1.weight has shape \[24\], expected \[32\]"):
        load_component(small_head(action_dim=4), tmp_path, "action_head")
    save_component(ProprioProjector(8, 4), tmp_path, "proprio_projector", 5)
    with pytest.raises(ValueError, match=r"fc1.weight has shape \[8, 4\], expected \[8, 7\]"):
        load_component(ProprioProjector(8, 7), tmp_path, "proprio_projector")


def test_a_failed_load_leaves_the_module_as_it_was(tmp_path):
    save_component(small_head(), tmp_path, "action_head", 5)
    other = small_head(action_dim=4)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit"):
        load_component(other, tmp_path, "action_head")
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_broken_and_hostile_files(tmp_path):
    path = save_component(small_head(), tmp_path, "action_head", 5)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot read"):
        load_component(small_head(), tmp_path, "action_head")

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trap"), "w"))

    path.write_bytes(pickle.dumps({"module.x": Trap()}, protocol=2))
    with pytest.raises(ValueError, match="cannot read"):
        load_component(small_head(), tmp_path, "action_head")
    assert not (tmp_path / "trap").exists()
    torch.save({}, path)
    with pytest.raises(ValueError, match="holds no tensors"):  # it counted as a checkpoint without this module
        load_component(small_head(), tmp_path, "action_head")
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="state dict"):
        load_component(small_head(), tmp_path, "action_head")


def test_a_full_disk_keeps_the_old_file(tmp_path):
    head, loaded = small_head(), small_head()
    save_component(head, tmp_path, "action_head", "latest")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the kernel refuses the write, as on a full disk
    try:
        with pytest.raises((OSError, RuntimeError)):
            save_component(small_head(), tmp_path, "action_head", "latest")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    load_component(loaded, tmp_path, "action_head")
    assert_same(head, loaded)
    assert [p.name for p in tmp_path.iterdir()] == ["action_head--latest_checkpoint.pt"]
