"""The weights in a checkpoint folder: which of its files hold them, in one file or in the shards of an index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastconv.checkpoints.keras_tensors import open_keras
from fastconv.checkpoints.pickled_tensors import open_pickle
from fastconv.checkpoints.stored_tensors import StoredTensor, listed, open_safetensors
from fastconv.folders import read_json, what_is_there

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Format:
    """A format of weights: its one file, or else the index of its shards, their names, and what opens each."""

    open: Callable[[Path], AbstractContextManager[dict[str, StoredTensor]]]
    file: str
    index: str | None = None
    shards: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(name for name in (self.file, self.index, self.shards) if name)


# In the order that transformers looks for them.
_FORMATS = (
    _Format(open_safetensors, WEIGHTS, INDEX, "model-*.safetensors"),
    _Format(open_pickle, "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"),
    _Format(open_keras, "tf_model.h5"),
)
# What a checkpoint's folder holds, for `find_folder`: of the formats, one is enough.
FILES: tuple[str | tuple[str, ...], ...] = ("config.json", *(kind.files for kind in _FORMATS))


@contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of a checkpoint by name, of the first format that the folder has; they can be read until the exit.

    Raises FileNotFoundError (no weights, a missing shard), ValueError (a file that is something else, or not whole, or
    that holds more than tensors), ImportError (tf_model.h5 without h5py).
    """
    with ExitStack() as opened:
        for kind in _FORMATS:
            if (folder / kind.file).is_file():
                yield opened.enter_context(kind.open(folder / kind.file))
                return
            if kind.index and (folder / kind.index).is_file():
                yield _open_shards(folder, kind.index, kind.open, opened)
                return
        names = [name for kind in _FORMATS for name in (kind.file, kind.index) if name]
        hint = (
            "; a TensorFlow 1 checkpoint must be converted first: fastconv convert"
            if any(folder.glob("*.ckpt*.index"))
            else ""
        )
        raise FileNotFoundError(
            f"no {', '.join(names[:-1])} or {names[-1]} in {str(folder)!r}: {what_is_there(folder)}{hint}"
        )


def _open_shards(
    folder: Path,
    index: str,
    open_shard: Callable[[Path], AbstractContextManager[dict[str, StoredTensor]]],
    opened: ExitStack,
) -> dict[str, StoredTensor]:
    places = read_json(folder / index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{str(folder / index)!r} must hold a weight_map of names to files, got {places!r:.80}")
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(places.values())):
        names = [name for name, place in places.items() if place == shard]
        if Path(shard).name != shard:
            raise ValueError(f"{str(folder / index)!r} names the shard {shard!r}, expected a file of that folder")
        if not (folder / shard).is_file():
            raise FileNotFoundError(
                f"the shard {shard!r} is missing in {str(folder)!r}; {index} says that it holds {listed(names)}"
            )
        stored = opened.enter_context(open_shard(folder / shard))
        if absent := [name for name in names if name not in stored]:
            raise ValueError(f"{str(folder / shard)!r} lacks {listed(absent)}, which {index} says it holds")
        found.update({name: stored[name] for name in names})
    return found
