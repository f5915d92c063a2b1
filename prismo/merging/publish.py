"""How a merged model gets into its folder: whole, or recognisably not as a checkpoint.

Every file is prepared and flushed in a folder inside the target, where a full disk or a kill does no harm, and then
moved. config.json makes a folder a checkpoint: the old one goes first, the new one comes last.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from prismo.merging.card import CARD
from prismo.models.adapter_file import ADAPTER_FOLDER
from prismo.models.folder import CONFIG, MARKER, MERGING, TRAINING_CONFIG, is_model
from prismo.models.weight_files import INDEX
from prismo.util.files import flush_folder
from prismo.util.schema import JsonObject, read_json

_CODE = "*.py"  # the original's model code, which config.json may name; copied, never run
_PROCESSOR = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
# Of the run. In another folder these may be left from an earlier merge, and say something else about this policy.
_OF_RUN = ("*_checkpoint.pt", "dataset_statistics.json", TRAINING_CONFIG)
_MISLEADING = (*_OF_RUN, "processor_config.json", "modeling_prismatic.py")
_WEIGHTS = "model*.safetensors"
# In this order behind all others: without one of them an unmerged checkpoint takes its processor from the base.
_LATE = ("tokenizer.model", "tokenizer.json", "preprocessor_config.json", CONFIG)


def side_files(base_folder: Path, checkpoint_dir: Path, output: Path, *, base_code: bool) -> dict[str, Path]:
    """What lies beside the weights of a complete checkpoint, and is not in `output` yet: name -> file to copy.

    The checkpoint's own files come before those of the base.

    Args:
        base_code: the base's model code also belongs to the result.

    Raises:
        ValueError: one of the JSON files is damaged.
    """
    found: dict[str, Path] = {}
    of_base = (*_PROCESSOR, _CODE) if base_code else _PROCESSOR
    for source, patterns in ((checkpoint_dir, (*_PROCESSOR, _CODE, *_OF_RUN)), (base_folder, of_base)):
        for path in (path for pattern in patterns for path in sorted(source.glob(pattern))):
            if path.is_file():
                found.setdefault(path.name, path)
    for path in found.values():
        if path.suffix == ".json":
            read_json(path, JsonObject)
    in_place = output.resolve() == checkpoint_dir.resolve()
    return {name: path for name, path in found.items() if not (in_place and path.parent == checkpoint_dir)}


def merged_files(folder: Path) -> list[Path]:
    """What belongs to the checkpoint in `folder`, among logs and the state of the trainer that may lie there, too."""
    patterns = (CARD, CONFIG, INDEX, MARKER, _WEIGHTS, *_PROCESSOR, _CODE, *_OF_RUN, f"{ADAPTER_FOLDER}/*")
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def refuse_overwriting(
    base_folder: Path, checkpoint_dir: Path, output: Path, names: Collection[str], overwrite: bool
) -> None:
    """Stop before anything is written where files of that name are in the way.

    What a merge has left that was cut off is none of them.

    Args:
        names: files beside the weights that are going to be written.

    Raises:
        ValueError: naming them and the way out.
    """
    if output.resolve() == base_folder.resolve():
        raise ValueError(f"{output} is the base itself; choose another output folder")
    if output.resolve() != checkpoint_dir.resolve() and (output / ADAPTER_FOLDER).is_dir():
        raise ValueError(f"{output} is the checkpoint of another run; choose another output folder")
    cut_off = (output / MERGING).is_dir() and not (output / CONFIG).exists()
    if overwrite or cut_off:
        return
    present = sorted(path.name for path in output.glob(_WEIGHTS))
    if is_model(output):
        raise ValueError(
            f"{output} already holds merged weights ({present[0]}{', ...' if len(present) > 1 else ''}). They work on "
            "every GPU, so there is no need to merge again; --overwrite True replaces them"
        )
    if present := sorted(name for name in (*names, CONFIG, INDEX, MARKER) if (output / name).exists()):
        raise ValueError(
            f"{output} already holds {present[0]}{', ...' if len(present) > 1 else ''}; choose an empty folder, or "
            "replace these files with --overwrite True"
        )


def check_space(output: Path, weights: int, files: Mapping[str, Path]) -> None:
    """Create `output`, delete what a killed merge had prepared there, and raise OSError if its disk is too small."""
    output.mkdir(parents=True, exist_ok=True)
    for path in (output / MERGING).glob("*"):
        path.unlink()
    needed = weights + sum(path.stat().st_size for path in files.values())
    free = shutil.disk_usage(output).free
    if free < needed * 1.01:
        raise OSError(f"{output} has {free / 1e9:.1f} GB free, the merged model takes {needed / 1e9:.1f} GB")


@contextmanager
def prepared(output: Path) -> Generator[Path]:
    """Yield a folder to fill; when the block ends well its files become those of `output`.

    After an exception in the block `output` is as it was. After a kill while files are moved it is no checkpoint
    (`is_unfinished`), and merging again makes it one.
    """
    temporary = output / MERGING
    cut_off = temporary.is_dir()
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        flush_folder(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if cut_off:
            temporary.mkdir()  # still is
        raise
    _move(temporary, output)


def _move(temporary: Path, output: Path) -> None:
    new = {path.name for path in temporary.iterdir()}
    for name in (CONFIG, INDEX, MARKER):
        (output / name).unlink(missing_ok=True)
    stale = (_WEIGHTS,) if (output / ADAPTER_FOLDER).is_dir() else (_WEIGHTS, *_MISLEADING)
    for path in [path for pattern in stale for path in output.glob(pattern)]:
        path.unlink()
    for name in [*sorted(new.difference(_LATE)), *(name for name in _LATE if name in new)]:
        (temporary / name).replace(output / name)
    temporary.rmdir()
