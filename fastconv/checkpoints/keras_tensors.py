"""tf_model.h5: the weights of transformers' TFConvBert classes, as Keras wrote them; read with h5py alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastconv.checkpoints.stored_tensors import StoredTensor, what_it_is
from fastconv.checkpoints.tensorflow_layouts import from_tensorflow

# A grouped kernel is (O, I, G) in these files.
_GROUPED = (2, 1, 0)


@contextmanager
def open_keras(file: Path) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of a tf_model.h5 by the names and in the layouts of PyTorch.

    Raises ImportError without h5py, ValueError for a file that is something else, not whole, or of another model.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"reading {str(file)!r} needs h5py: pip install h5py") from error
    try:
        handle = h5py.File(file, "r")
    except OSError as error:
        raise ValueError(f"{str(file)!r} {what_it_is(file)}; expected HDF5: {error}") from error
    with handle as opened:
        datasets: list[tuple[str, Any]] = []
        try:
            # It follows no links, so that all that is read is in this file.
            opened.visititems(
                lambda name, item: datasets.append((name, item)) if isinstance(item, h5py.Dataset) else None
            )
            found = _named(file, datasets)
        except (KeyError, OSError, RuntimeError, TypeError, UnicodeError) as error:  # by what is damaged
            raise ValueError(f"{str(file)!r} {what_it_is(file)}; expected HDF5: {error}") from error
        yield found


def _named(file: Path, datasets: list[tuple[str, Any]]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for path, dataset in datasets:
        # layer of Keras / model / name, such as convbert/tf_conv_bert_model/convbert/encoder/layer_._0/...
        parts = path.removesuffix(":0").split("/")[2:]
        if dataset.external or dataset.is_virtual:
            raise ValueError(f"{str(file)!r} keeps {path} in another file; expected all weights in it")
        name, tensor = from_tensorflow(
            re.sub(r"layer_\._(\d+)", r"layer/\1", "/".join(parts)),
            tuple(dataset.shape),
            str(dataset.dtype),
            partial(_read, file, path, dataset),
            _GROUPED,
        )
        other = found.setdefault(name, tensor)
        if other is tensor:
            continue
        # Keras stores what layers share with each of them.
        if (other.shape, other.dtype) != (tensor.shape, tensor.dtype) or not other.read().equal(tensor.read()):
            raise ValueError(f"{str(file)!r} holds different values of {name}, one of them as {path}; expected one")
    if not any(name.startswith("convbert.") for name in found):
        raise ValueError(
            f"{str(file)!r} has no weights under 'convbert/': of TensorFlow's classes only those of ConvBERT are read; "
            "save others as safetensors with transformers"
        )
    return found


def _read(file: Path, path: str, dataset: Any) -> Any:
    try:
        return dataset[()]
    except OSError as error:
        raise ValueError(f"{str(file)!r} {what_it_is(file)}; {path} can't be read: {error}") from error
