"""Weight files on disk and on the Hugging Face hub: find them, read what they hold, write whole or not at all.

No code from a file ever runs: pickles are read with weights_only=True and the few harmless classes of `_INERT`.
"""

import argparse
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.launch import check
from videomae.data.sampling import KeyFrameClip, Sampling
from videomae.pickles import check_file

# what official files hold beside tensors: the command line, and numpy.float64 learning rates in the optimizer's groups,
# under the names that numpy 1 and numpy 2 pickle them with
_MAKE_SCALAR = numpy.float64(0).__reduce__()[0]
_INERT: list[Any] = [
    argparse.Namespace,
    numpy.dtype,
    type(numpy.dtype("float64")),
    (_MAKE_SCALAR, "numpy.core.multiarray.scalar"),
    (_MAKE_SCALAR, "numpy._core.multiarray.scalar"),
]
# what torch.load raises for broken files, found by truncating and scrambling some thousand of them
_BROKEN = (
    pickle.UnpicklingError,
    struct.error,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
_WRAPPERS = ("model", "module")
_PREFIXES = ("module.", "backbone.")
_SAFETENSORS, _BIN = "model.safetensors", "pytorch_model.bin"
_PREPROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json")
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
_MOST, _MOST_CUBES = 1 << 20, 1 << 22  # of any size, and of a clip: far beyond every model's


@dataclass(frozen=True)
class Stated:
    """What a source says about its model beside the tensors; None where it says nothing. notes: for the reader."""

    kind: str | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    decoder_width: int | None = None
    decoder_heads: int | None = None
    frames: int | None = None
    image_size: tuple[int, int] | None = None
    cube: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: tuple[str, ...] | None = None
    class_ids: tuple[int, ...] | None = None
    key_clip: KeyFrameClip | None = None
    aligned: bool | None = None
    normalized: bool | None = None
    sampling: Sampling | None = None
    positions_of: tuple[int, int, int] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """ValueError for what no model can be: nothing is built, or made room for, because a file claims it."""
        rows = (self.image_size, self.cube, self.positions_of)
        counts = [self.width, self.depth, self.heads, self.decoder_width, self.decoder_heads, self.frames]
        counts += [count for row in rows for count in row or ()]
        whole = all(count is None or (type(count) is int and 0 < count <= _MOST) for count in counts)
        check(whole, f"sizes must be whole numbers from 1 to {_MOST}; got {counts}")
        sides = (self.frames or 16, *(self.image_size or (224, 224)))
        cubes = prod(-(-side // step) for side, step in zip(sides, self.cube or (2, 16, 16), strict=True))
        cubes = max(cubes, prod(self.positions_of or ()))
        check(cubes <= _MOST_CUBES, f"a clip must have at most {_MOST_CUBES:,} cubes; got {cubes:,}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            right = values is None or all(type(value) in (int, float) and abs(value) < 1e9 for value in values)
            check(right, f"{name} must be finite numbers; got {values}")


@dataclass(frozen=True)
class Stored:
    """A source as it was found: tensors by name, wrappers and prefixes taken off; metadata is safetensors'.

    config and preprocessor are Hugging Face's config.json and preprocessor_config.json, empty where there is none.
    """

    source: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)


def read(source: str | Path | Mapping[str, Any]) -> Stored:
    """What a file, a folder, a Hugging Face hub id or a dict holds; tensors on the CPU, or where the dict has them.

    ValueError when nothing is there, when it cannot be read, or when it holds more than plain data.
    """
    if isinstance(source, Mapping):
        return Stored("a dict", _unwrap(source, "a dict"))
    path = Path(source).expanduser()
    if not path.exists():
        is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and path.suffix not in _SUFFIXES
        check(bool(is_hub_id), f"no such file or folder, and no Hugging Face hub id: {source}")
        path = _download(str(source))
    files = _files_in(path, str(source)) if path.is_dir() else [path]
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        found, notes = _read_file(file)
        tensors.update(found)
        metadata.update(notes)
    config, preprocessor = _read_config(path)
    return Stored(str(source), tensors, metadata, config, preprocessor)


def _files_in(folder: Path, source: str) -> list[Path]:
    for name in (_SAFETENSORS, _BIN):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = _read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ValueError(f"{index} has no weight_map")
            names = sorted({str(shard) for shard in shards.values()})
            there = set(os.listdir(folder))
            for shard in names:
                # a name such as ../x would leave the folder
                check(Path(shard).name == shard, f"{index} names a shard outside its folder: {shard}")
                # a name that no file can have may not be asked for
                is_there = shard in there and (folder / shard).is_file()
                check(is_there, f"{index} names a shard that is missing: {shard}")
            return [folder / shard for shard in names]
    states = sorted(folder.glob("*model_states.pt"))
    check(len(states) <= 1, f"{source} holds {len(states)} *model_states.pt files: give the one that is meant")
    wanted = f"{_SAFETENSORS}, {_BIN}, an index of their shards, nor one *model_states.pt"
    check(len(states) == 1, f"no weights in {source}: neither {wanted}")
    return states


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and preprocessor of a Hugging Face or timm folder, or of a file in one; both empty elsewhere."""
    if path.is_file() and path.name not in (_SAFETENSORS, _BIN):
        return {}, {}
    folder = path if path.is_dir() else path.parent
    config = _read_json(folder / "config.json")
    # a run folder of ours has a config.json too, with neither Hugging Face's model_type nor timm's pretrained_cfg
    if not {"model_type", "pretrained_cfg"} & set(config):
        return {}, {}
    preprocessors = (_read_json(folder / name) for name in _PREPROCESSORS)
    return config, next((found for found in preprocessors if found), {})


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
                return _held(_unwrap(tensors, str(path)), path), file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    # a file that may not be opened is not a damaged one
    path.open("rb").close()
    try:
        check_file(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged, or no PyTorch file: {error}") from error
    try:
        # mapped, an official file's optimizer state is never read
        with torch.serialization.safe_globals(_INERT):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _BROKEN as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise ValueError(
                f"{path} holds {refused[1]}, which is not plain data: it is not read, as that could run code"
            ) from error
        raise ValueError(f"{path} is damaged, or no PyTorch file ({type(error).__name__})") from error
    check(isinstance(loaded, Mapping), f"{path} must hold a dict of tensors; got {type(loaded).__name__}")
    return _held(_unwrap(loaded, str(path)), path), {}


def _held(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors, if the file has all of them: empty ones, and one number that is repeated, can claim any shape."""
    for name, x in tensors.items():
        whole = 0 < x.numel() * x.element_size() <= x.untyped_storage().nbytes()
        check(whole, f"{path} has {name} of the shape {tuple(x.shape)}, but not so many numbers")
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    check(isinstance(value, dict), f"{path} must hold a JSON object; got {type(value).__name__}")
    return value


def _unwrap(loaded: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The tensors inside wrappers, without the prefixes of torch.compile, data parallelism and backbones."""
    # in a loop: a file may have more wrappers than Python has levels of calls
    while wrapper := next((name for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)), None):
        loaded = loaded[wrapper]
    tensors: dict[str, Tensor] = {}
    for name, value in loaded.items():
        check(isinstance(name, str), f"{source} must name its tensors with strings; got {name!r:.80}")
        kind = f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
        is_weight = isinstance(value, Tensor) and value.is_floating_point()
        check(is_weight, f"{source} must hold floating-point tensors; got {kind} for {name}")
        short = name.replace("_orig_mod.", "")
        while short.startswith(_PREFIXES):
            short = short.split(".", 1)[1]
        check(short not in tensors, f"{source} holds {short} twice, under different prefixes")
        tensors[short] = value
    check(len(tensors) > 0, f"{source} holds no tensors")
    return tensors


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(f"{hub_id} is no local path, and huggingface_hub is not installed to download it") from error
    try:
        # many repositories hold the same weights in both formats: the pickle only where there is nothing else
        folder = Path(snapshot_download(hub_id, allow_patterns=["*config.json", "model*.safetensors*"]))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(hub_id, allow_patterns=["*config.json", "pytorch_model*"]))
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{hub_id} is no local path and could not be had from the Hugging Face hub: {reason}"
        ) from error
    return folder


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let write fill a temporary file beside path, flush it to disk, then rename it: nobody reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
