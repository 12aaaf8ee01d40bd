"""What this machine has for training: `python -m videomae.doctor [--json]`.

Versions, GPUs, attention back ends, kernels, decoders, limits, and what is missing, with the command that installs it.
Exit code 0: pre-training can run here; 1: it cannot, and the last lines say why. Nothing but Python is taken for
granted: what does not import is a finding, too.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

from videomae.command_line import Parser, run_main

PROG = "python -m videomae.doctor"
PROJECT = "videomae-engine"


class Package(NamedTuple):
    """A requirement of pyproject.toml. extra: which one it is of, none where it is always needed."""

    module: str
    distribution: str
    use: str
    extra: str = ""


PACKAGES = (
    Package("torch", "torch", "everything"),
    Package("triton", "triton", "the kernels"),
    Package("numpy", "numpy", "frames"),
    Package("pandas", "pandas", "boxes"),
    Package("einops", "einops", "shapes"),
    Package("av", "av", "reading videos"),
    Package("decord", "decord2", "reading videos, by --data.reader decord"),
    Package("simplejpeg", "simplejpeg", "prepared sets of jpeg"),
    Package("fsspec", "fsspec", "data by URL"),
    Package("safetensors", "safetensors", "weights"),
    Package("tyro", "tyro", "commands"),
    Package("tqdm", "tqdm", "progress bars"),
    Package("tensorboard", "tensorboard", "TensorBoard"),
    Package("PIL", "pillow", "pictures"),
    Package("matplotlib", "matplotlib", "plots"),
    Package("huggingface_hub", "huggingface_hub", "weights by hub id", "hub"),
    Package("s3fs", "s3fs", "data from s3://", "s3"),
    Package("gcsfs", "gcsfs", "data from gs://", "gcs"),
    Package("aiohttp", "aiohttp", "data from https://", "http"),
    Package("torchcodec", "torchcodec", "--data.reader torchcodec", "torchcodec"),
    Package("flash_attn", "flash-attn", "--attention flash-attn", "flash-attn"),
    Package("flash_attn.cute", "flash-attn-4", "--attention flash-attn-4", "flash-attn-4"),
    Package("xformers", "xformers", "--attention xformers", "xformers"),
)
_ONLY_ON_GPU = ("flash-attn", "flash-attn-4", "xformers")
# without these there are other ways
_SPARED = ("decord", "tensorboard", "matplotlib")
_CODECS = ("h264", "hevc", "vp9", "av1", "mpeg4")  # of most videos
_SHARED_NEEDED = 1 << 30  # bytes of shared memory, which NCCL takes between GPUs; clips do not lie there
_FILES_NEEDED = 1024


@dataclass
class Report:
    """What was found. sections: lines of name and text, by title. stops: why pre-training cannot run here. missing:
    what could be installed, and how."""

    sections: dict[str, dict[str, str]] = field(default_factory=dict)
    stops: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)

    @property
    def can_train(self) -> bool:
        return not self.stops

    def __str__(self) -> str:
        width = max(len(name) for lines in self.sections.values() for name in lines) + 2
        lines: list[str] = []
        for title, found in self.sections.items():
            lines += [title, *(f"  {name:<{width}}{text}" for name, text in found.items()), ""]
        if self.missing:
            lines += ["missing"]
            lines += [f"  {each['name']:<{width}}{each['use']}: {each['install']}" for each in self.missing] + [""]
        lines += [f"warning: {text}" for text in self.warnings]
        lines += [f"cannot train: {text}" for text in self.stops]
        return "\n".join([*lines, "pre-training can run here" if self.can_train else "pre-training cannot run here"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what there is; 0 where pre-training can run, else 1."""
    parser = Parser(PROG, (__doc__ or "").strip())
    parser.add_argument("--json", action="store_true", help="the same as an object")
    given = parser.parse_args(arguments)
    report = examine()
    print(json.dumps(asdict(report) | {"can_train": report.can_train}, indent=1) if given.json else report)
    return 0 if report.can_train else 1


def examine() -> Report:
    """Look at everything. Does not raise, whatever is missing."""
    report = Report()
    torch = _tried("torch")
    looks: dict[str, Callable[[Report, Any], dict[str, str]]] = {
        "versions": _versions,
        "devices": _devices,
        "attention": _attention,
        "kernels": _kernels,
        "videos": _videos,
        "machine": _machine,
    }
    for title, look in looks.items():
        # whatever a broken installation raises is what the user wants to be told
        try:
            report.sections[title] = look(report, torch)
        except Exception as error:  # noqa: BLE001
            report.sections[title] = {"failed": _short(error)}
            report.warnings.append(f"{title} could not be looked at: {_short(error)}")
    return report


def _tried(module: str) -> Any:
    """The module, or the exception that its import raised."""
    try:
        return import_module(module)
    # a broken package may raise anything
    except Exception as error:  # noqa: BLE001
        return error


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _install(package: Package) -> str:
    """The command that installs it."""
    root = Path(__file__).resolve().parent.parent
    is_clone = (root / "pyproject.toml").is_file()
    # in the clone's folder, where all commands are given
    target = f"{'.' if is_clone else PROJECT}{f'[{package.extra}]' if package.extra else ''}"
    # it is compiled against the torch that is there
    apart = ["--no-build-isolation"] if package.extra == "flash-attn" else []
    return shlex.join(["pip", "install", *apart, *(["-e"] if is_clone else []), target])


def _versions(report: Report, torch: Any) -> dict[str, str]:
    own = _version_of(PROJECT)
    lines = {
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        PROJECT: own or "not installed: run from its folder",
    }
    has_gpu = _has_gpu(torch)
    for package in PACKAGES:
        found = _tried(package.module)
        version = _version_of(package.distribution)
        if not isinstance(found, Exception):
            lines[package.distribution] = version or str(getattr(found, "__version__", "version unknown"))
            continue
        is_absent = isinstance(found, ModuleNotFoundError) and version is None
        if not is_absent:
            lines[package.distribution] = f"{version or ''} does not import: {_short(found)}".strip()
        if package.extra in _ONLY_ON_GPU and not has_gpu:
            continue
        if is_absent or not package.extra:
            install = _install(package) if is_absent else f"pip install --force-reinstall {package.distribution}"
            report.missing.append({"name": package.distribution, "use": package.use, "install": install})
        if not package.extra and package.module not in _SPARED:
            how = "is not installed" if is_absent else "does not import"
            report.stops.append(f"{package.distribution} {how} ({package.use}): {install}")
    return lines


def _has_gpu(torch: Any) -> bool:
    return not isinstance(torch, Exception) and torch.cuda.is_available()


def _devices(report: Report, torch: Any) -> dict[str, str]:
    if isinstance(torch, Exception):
        return {"torch": _short(torch)}
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    lines = {"torch": f"built for {built}"}
    driver = _driver()
    if driver:
        lines["driver"] = driver
    if not torch.cuda.is_available():
        why = "torch is a build without CUDA" if torch.version.cuda is None else "torch finds none"
        lines["gpu"] = f"none ({why}): training runs on the CPU"
        if driver:
            report.warnings.append(f"there is a GPU driver, {driver}, but {why}: install the CUDA build of torch")
        return lines
    for i in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(i)
        free = torch.cuda.mem_get_info(i)[0]
        lines[f"cuda:{i}"] = (
            f"{seen.name}, {seen.total_memory / 1e9:.0f} GB ({free / 1e9:.0f} free), sm_{seen.major}{seen.minor}"
        )
    return lines


def _driver() -> str | None:
    """Of NVIDIA, as nvidia-smi tells; None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


def _attention(report: Report, torch: Any) -> dict[str, str]:
    if isinstance(torch, Exception):
        return {"none": "without torch"}
    from videomae.attention import BACKENDS, choose

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # the encoder of ViT-B: 160 visible tokens, heads 64 wide
    how: dict[str, Any] = {"device": device, "dtype": dtype, "length": 160, "head_width": 64}
    lines = {}
    for name, backend in BACKENDS.items():
        refusal = backend.refusal(device, dtype, how["length"], how["head_width"])
        lines[name] = "needs a GPU" if backend.needs_gpu and device.type != "cuda" else refusal or "usable"
    chosen = choose("auto", **how)
    return {"auto": f"{chosen.name} ({chosen.why})", **lines}


def _kernels(report: Report, torch: Any) -> dict[str, str]:
    state = os.environ.get("TRITON_INTERPRET")
    compilers = [shutil.which(name) for name in (os.environ.get("CC"), "gcc", "clang", "cc") if name]
    compiler = next(filter(None, compilers), None)
    lines = {"C compiler": compiler or "none: Triton needs one on a GPU (apt-get install gcc)"}
    lines["TRITON_INTERPRET"] = f"{state}: kernels run in the interpreter, slowly" if state == "1" else "not set"
    if isinstance(torch, Exception):
        return lines
    if _has_gpu(torch) and state == "1":
        report.warnings.append("TRITON_INTERPRET=1 is set: unset it to train on the GPU")
    if not _has_gpu(torch):
        runs = "the kernels, in Triton's interpreter" if state == "1" else "their references, in plain PyTorch"
        return {"compiled": f"not needed without a GPU; what runs: {runs}", **lines}
    problem = _tiny_launch(torch)
    if problem:
        report.stops.append(f"a kernel does not run on the GPU: {problem}")
    return {"compiled": problem or "a small kernel was compiled, run, and gave the right values", **lines}


def _tiny_launch(torch: Any) -> str:
    """Why a kernel of ours does not run on the GPU; "" when it does, with the right values."""
    try:
        from kernels.layer_norm import layer_norm, layer_norm_ref

        x = torch.linspace(-1, 1, 4 * 64, device="cuda").view(4, 64)
        weight, bias = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
        found, wanted = (op(x, None, weight, bias, 1e-5, None) for op in (layer_norm, layer_norm_ref))
        torch.testing.assert_close(found[0], wanted[0])
    # Triton, its compiler and the driver each have exceptions of their own
    except Exception as error:  # noqa: BLE001
        return _short(error)
    return ""


def _videos(report: Report, torch: Any) -> dict[str, str]:
    lines = {}
    av = _tried("av")
    if isinstance(av, Exception):
        lines["av"] = _absent("av", av)
    else:
        codecs = [name for name in _CODECS if name in av.codecs_available]
        lacking = [name for name in _CODECS if name not in codecs]
        lines["av"] = f"decodes {', '.join(codecs)}" + (f"; not {', '.join(lacking)}" if lacking else "")
        if "h264" not in codecs:
            report.warnings.append("PyAV's FFmpeg has no H.264, which most videos are in")
    for name in ("decord", "torchcodec"):
        found = _tried(name)
        lines[name] = "usable" if not isinstance(found, Exception) else _absent(name, found)
    program = shutil.which("ffmpeg")
    lines["ffmpeg"] = f"{program}; not needed" if program else "no program of that name; not needed"
    return lines


def _absent(module: str, error: Exception) -> str:
    """Why it does not import; also for what it needs itself."""
    return "not installed" if isinstance(error, ModuleNotFoundError) and error.name == module else _short(error)


def _machine(report: Report, torch: Any) -> dict[str, str]:
    pool = _tried("videomae.data.pool")
    cores = pool.available_cpus() if not isinstance(pool, Exception) else os.cpu_count() or 1
    lines = {"cores": f"{cores} for this process, of {os.cpu_count()} that the machine has"}
    shared = Path("/dev/shm")
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        lines["shared memory"] = f"{usage.total / 1e9:.1f} GB in /dev/shm, {usage.free / 1e9:.1f} free; clips need none"
        if usage.free < _SHARED_NEEDED and _has_gpu(torch) and torch.cuda.device_count() > 1:
            report.warnings.append("less than 1 GB of shared memory is free; in a container: docker run --shm-size 8g")
    else:
        lines["shared memory"] = "no /dev/shm"
    resource = _tried("resource")
    if not isinstance(resource, Exception):
        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        lines["open files"] = f"{now:,}, at most {most:,}" if most > 0 else f"{now:,}"
        if now < _FILES_NEEDED:
            report.warnings.append(f"only {now} files may be open: ulimit -n {_FILES_NEEDED * 4}")
    return lines


if __name__ == "__main__":
    run_main(main)
