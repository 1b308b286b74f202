"""Tensors of a checkpoint, by name: from ``safetensors`` files, never from a pickle."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attnlab.types import ArrayLike

Source = Mapping[str, ArrayLike] | str | os.PathLike[str]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_INSTEAD = (
    "pickles are never read, for reading one runs whatever code it holds; where it was "
    "made, save it with transformers' model.save_pretrained(folder) or "
    "safetensors.torch.save_file(tensors, 'model.safetensors')"
)


class Tensor(NamedTuple):
    """One tensor, not read yet.

    Attributes:
        shape: of the tensor.
        read: returns it.
    """

    shape: tuple[int, ...]
    read: Callable[[], Any]


@contextlib.contextmanager
def tensors_of(source: Source) -> Iterator[dict[str, Tensor]]:
    """The tensors of a checkpoint, which can be read until the context ends.

    Args:
        source: arrays by name; or a ``.safetensors`` file; or a folder with
            ``model.safetensors``, or with its shards and
            ``model.safetensors.index.json``.
    """
    if isinstance(source, Mapping):
        yield {
            name: Tensor(tuple(np.shape(array)), lambda a=array: a)
            for name, array in source.items()
        }
        return
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            'reading checkpoints needs safetensors: pip install "attnlab[weights]"'
        ) from error
    with contextlib.ExitStack() as files:
        found: dict[str, Tensor] = {}
        for path in _files(Path(source)):
            file: Any = files.enter_context(safetensors.safe_open(path, "numpy"))
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                found[name] = Tensor(
                    tuple(file.get_slice(name).get_shape()),
                    lambda file=file, name=name: file.get_tensor(name),
                )
        yield found


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        if (path / _SINGLE).exists():
            return [path / _SINGLE]
        if (path / _INDEX).exists():
            shards = json.loads((path / _INDEX).read_text())["weight_map"].values()
            return [_existing(path / shard) for shard in sorted(set(shards))]
        held = sorted(p.name for p in path.iterdir())
        message = f"{path}: expected {_SINGLE} or {_INDEX}, found {held}"
        if any(name.endswith(_PICKLES) for name in held):
            message += f"; {_INSTEAD}"
        raise FileNotFoundError(message)
    if path.suffix in _PICKLES:
        raise ValueError(f"{path}: expected a .safetensors file; {_INSTEAD}")
    return [_existing(path)]


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    return path
