"""What AdamW remembers of every parameter, as tensors by name; and reading them from PyTorch's distributed checkpoints
without unpickling anything but tensors."""

import io
import pickle
import struct
import warnings
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernels.launch import check
from train.sharding import spread_as, whole
from videomae.pickles import check_pickle

# imported where it is needed, see train/sharding.py
if TYPE_CHECKING:
    from torch.distributed.checkpoint import FileSystemReader

# what the index of a distributed checkpoint of tensors is made of
_CHECKPOINT = "torch.distributed.checkpoint"
_KNOWN = frozenset(
    [(f"{_CHECKPOINT}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")]
    + [(f"{_CHECKPOINT}.metadata", name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata")]
    + [(f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"), (f"{_CHECKPOINT}.filesystem", "_StorageInfo")]
    + [("torch", "Size"), ("torch", "float32"), ("torch.serialization", "_get_layout")]
    + [("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")]
)

# one process alone writes and reads
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


# what a pickle, and tensors that it describes, raise where they are damaged
_BROKEN = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    TypeError,
    LookupError,
    OverflowError,
    AssertionError,
    struct.error,
)


class _Index(pickle._Unpickler):
    """In Python, as the one in C makes room for whatever a damaged length claims; so do arrays of bytes in both."""

    dispatch = {key: load for key, load in pickle._Unpickler.dispatch.items() if key != pickle.BYTEARRAY8[0]}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)


def _reader(folder: Path) -> "FileSystemReader":
    """PyTorch's, whose index is unpickled with nothing but its own types."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Metadata:
            index = (Path(self.path) / ".metadata").read_bytes()
            check_pickle(io.BytesIO(index))
            found = _Index(io.BytesIO(index)).load()
            check(isinstance(found, Metadata), "the index of the optimizer is none")
            files = {info.relative_path for info in found.storage_data.values()}
            check(all(Path(name).name == name for name in files), "the optimizer's index points out of the checkpoint")
            found.storage_meta = StorageMeta(load_id=self.load_id)
            return found

    return Reader(folder)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a distributed checkpoint, whole, on the CPU. Raises ValueError, OSError or RuntimeError where it
    cannot be read."""
    from torch.distributed.checkpoint import CheckpointException
    from torch.distributed.checkpoint import load as load_distributed
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        stated = _reader(folder).read_metadata().state_dict_metadata
        tensors = {name: each for name, each in stated.items() if isinstance(each, TensorStorageMetadata)}
        check(len(tensors) == len(stated), "the optimizer holds more than tensors")
        # nothing makes room for more than is there
        claimed = sum(prod(each.size) * each.properties.dtype.itemsize for each in tensors.values())
        held = sum(path.stat().st_size for path in folder.iterdir())
        check(claimed <= held, f"the optimizer's index tells of {claimed:,} bytes, its files have {held:,}")
        found = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in tensors.items()}
        if found:
            load_distributed(found, storage_reader=_reader(folder), no_dist=True)
        return found
    except CheckpointException as error:
        raise ValueError(f"the optimizer cannot be read: {next(iter(error.failures.values()))[0]}") from error
    except _BROKEN as error:
        raise ValueError(f"the index of the optimizer cannot be read: {error}") from error


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """`PARAMETER.exp_avg` and its like, of every parameter that has been updated, one after another, whole. Where they
    are spread, every process iterates."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, own in optimizer.state.items():
        for key, value in own.items():
            yield f"{names[parameter]}.{key}", whole(value)


def load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse. ValueError where a tensor is of no parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_name: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, _, key = name.rpartition(".")
        by_name.setdefault(parameter, {})[key] = value
    unknown = by_name.keys() - names.values()
    check(
        not unknown,
        f"the checkpoint's optimizer knows {len(unknown)} other parameters: {', '.join(sorted(unknown)[:3])}",
    )
    packed = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    packed["state"] = {
        i: {key: spread_as(value, p) for key, value in by_name[names[p]].items()}
        for i, p in enumerate(order)
        if names[p] in by_name
    }
    # moments and counts; the settings are this run's: of this device, and as they were asked for
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(packed)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
