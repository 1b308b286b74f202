"""Reads tensors of a checkpoint by name, from ``safetensors`` files, never pickles."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from attnlab._src.types import ArrayLike

Source = Mapping[str, ArrayLike] | str | os.PathLike[str]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_INSTEAD = (
    "pickles are never read, because reading one can run any code; convert it with "
    "transformers' model.save_pretrained(folder) or "
    "safetensors.torch.save_file(tensors, 'model.safetensors')"
)


class Tensor(NamedTuple):
    """A tensor of a checkpoint that is read on demand.

    Attributes:
        shape: shape of the tensor.
        read: reads the tensor and returns it.
    """

    shape: tuple[int, ...]
    read: Callable[[], ArrayLike]


@contextlib.contextmanager
def tensors_of(source: Source) -> Iterator[dict[str, Tensor]]:
    """The tensors of a checkpoint by name; they can be read inside the context.

    Args:
        source: a dict of arrays (NumPy, JAX or PyTorch) by name; or a ``.safetensors``
            file; or a folder with ``model.safetensors``, or with shards and
            ``model.safetensors.index.json``.

    Raises:
        ValueError: if a file is damaged or not in safetensors format, or if the index
            names a file outside the folder. The message names the file.
        FileNotFoundError: if there is no such file.
        TypeError: if the source is neither a path nor a mapping.
        ImportError: if safetensors is not installed.
    """
    if isinstance(source, Mapping):
        yield {
            name: Tensor(tuple(np.shape(array)), lambda a=array: _numpy(a))
            for name, array in source.items()
        }
        return
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"source: expected a path or arrays by name, got {type(source).__name__}; "
            "the state_dict() of a PyTorch model would do"
        )
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            'reading checkpoints needs safetensors: pip install "attnlab[weights]"'
        ) from error
    with contextlib.ExitStack() as opened:
        files, where = _files(Path(source))
        found: dict[str, Tensor] = {}
        for path in files:
            with _told(
                f"{path}: expected a safetensors file; a download that is "
                "incomplete, or a Git LFS pointer, must be fetched again"
            ):
                file: Any = opened.enter_context(safetensors.safe_open(path, "numpy"))
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    if where.get(name, path) == path:
                        shape = tuple(file.get_slice(name).get_shape())
                        read = functools.partial(_read, path, file, name)
                        found[name] = Tensor(shape, read)
        for name, path in where.items():
            if name not in found:
                raise ValueError(
                    f"{path}: expected a tensor {name!r}, as {_INDEX} says, found none"
                )
        yield found


def _numpy(array: Any) -> ArrayLike:
    """Converts a PyTorch tensor to NumPy, which has no bfloat16; others stay."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        if array.is_floating_point() and array.element_size() < 4:
            array = array.float()  # exact
        return array.numpy()
    return array


def _read(path: Path, file: Any, name: str) -> np.ndarray:
    with _told(f"{path}: tensor {name!r} cannot be read; convert it to float32"):
        return file.get_tensor(name)


@contextlib.contextmanager
def _told(message: str) -> Iterator[None]:
    """Turns any error of safetensors into a ValueError with this message."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{message} ({type(error).__name__}: {error})") from error


def _files(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files of a checkpoint and, if it has an index, the file of each tensor."""
    if path.is_dir():
        if (path / _SINGLE).exists():
            return [path / _SINGLE], {}
        if (path / _INDEX).exists():
            where = _indexed(path)
            return [_existing(shard) for shard in sorted(set(where.values()))], where
        held = sorted(p.name for p in path.iterdir())
        message = f"{path}: expected {_SINGLE} or {_INDEX}, found {held}"
        if any(name.endswith(_PICKLES) for name in held):
            message += f"; {_INSTEAD}"
        raise FileNotFoundError(message)
    return [_existing(path)], {}


def _indexed(folder: Path) -> dict[str, Path]:
    """The file of each tensor, as the index in the folder says."""
    path = folder / _INDEX
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(shards, dict) or not shards:
            raise TypeError(f"'weight_map' is {str(shards)[:40]}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected JSON with a 'weight_map' from tensor names to file "
            f"names ({type(error).__name__}: {error})"
        ) from error
    for name, shard in shards.items():
        if not isinstance(shard, str) or not _inside(shard):
            raise ValueError(
                f"{path}: expected for {name!r} the name of a file in this folder, got "
                f"{shard!r}"
            )
    return {name: folder / shard for name, shard in shards.items()}


def _inside(name: str) -> bool:
    """Whether a relative path stays in its folder, on POSIX and on Windows.

    Symbolic links are not resolved: in the Hugging Face cache, files are links.
    """
    return all(
        kind(name).parts and not kind(name).anchor and ".." not in kind(name).parts
        for kind in (PurePosixPath, PureWindowsPath)
    )


def _existing(path: Path) -> Path:
    if path.suffix in _PICKLES:
        raise ValueError(f"{path}: expected a .safetensors file; {_INSTEAD}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    return path
