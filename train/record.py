"""What a run writes before its first step, so that every number can be traced: settings, plan, versions, commit, kernel
tiles, command."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.tiles import table_hash

_PACKAGES = ("torch", "triton", "numpy", "einops", "decord2", "decord", "av", "safetensors", "pillow", "pandas")


def write_config(
    out: Path,
    config: dict[str, Any],
    facts: dict[str, Any],
    *,
    resumed_at: int | None,
    processes: Sequence[dict[str, Any]] = (),
) -> None:
    """Write out/config.json, or add to its `resumed` list when the run goes on. processes: `process_facts` of each, of
    several."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.json"
    part = {"command": sys.argv, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "plan": facts, **surroundings()}
    if processes:
        part["processes"] = list(processes)
    if resumed_at is not None and path.exists():
        written = json.loads(path.read_text())
        written.setdefault("resumed", []).append({"step": resumed_at, "config": config, **part})
    else:
        written = {"config": config, **part}
    temporary = path.with_suffix(".writing")
    temporary.write_text(json.dumps(written, indent=2) + "\n")
    os.replace(temporary, path)


def move_aside(out: Path) -> None:
    """Rename a run folder to the first free OUT.1, OUT.2, ...: nothing is overwritten."""
    if out.exists():
        free = next(path for n in range(1, 1 << 20) if not (path := out.with_name(f"{out.name}.{n}")).exists())
        out.rename(free)
        print(f"the run in {out} was moved to {free}", file=sys.stderr)


def process_facts(rank: int, device: torch.device) -> dict[str, Any]:
    """Where one of a run's processes is."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "rank": rank,
        "host": platform.node(),
        "clock": time.time(),
        "device": str(device),
        "gpu": None if gpu is None else gpu.name,
        "gpu_bytes": None if gpu is None else gpu.total_memory,
        "driver": _driver() if gpu else None,
    }


def _driver() -> str | None:
    """As the kernel module states it."""
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0] if path.exists() else None


def surroundings() -> dict[str, Any]:
    """Versions, commit and machine."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": _commit(),
        "versions": versions,
        "kernel_tiles": table_hash(),
        "host": platform.node(),
        "system": platform.platform(),
        "gpu": gpu,
    }


def _commit() -> str | None:
    """The source's commit, with -dirty when it was changed since; None outside a checkout."""
    where = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--match", "nothing"],
            cwd=where,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
