"""Machine code of one architecture in a folder, for programs that launch it themselves.

python -m kernels.aot.build --arch 90 --out DIR

writes a `<specialisation>.cubin` for each specialisation of the published sizes in bfloat16, and `manifest.json`, which
says how each is launched: its symbol, threads, dynamic shared memory, and arguments in order. No GPU is needed.
"""

import json
import math
from pathlib import Path
from typing import Any

import triton
from triton.backends.nvidia.compiler import sm_arch_from_capability

from kernels.aot.catalogue import arch_option, specialisations
from kernels.aot.specialise import Built, build
from kernels.tiles import table_hash
from videomae.command_line import Parser, run_main

MANIFEST = "manifest.json"


def plain(name: str, value: Any) -> Any:
    """value, if JSON can hold it and gives it back the same; ValueError otherwise."""
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"constant {name} must be a number, a string, a truth value or None; got {value!r}")


def entry(built: Built) -> dict[str, Any]:
    """What the manifest says of one kernel."""
    found = built.specialisation
    return {
        "name": found.name,
        "cubin": f"{found.name}.cubin",
        "module": found.module,
        "function": found.function,
        "symbol": built.symbol,
        "shared_bytes": built.shared_bytes,
        "threads": 32 * found.num_warps,
        "trailing_pointers": built.trailing_pointers,
        # aligned: the machine code relies on a multiple of 16
        "gpu": found.gpu,
        "arguments": [{"name": n, "type": kind, "aligned": n in found.aligned} for n, kind in found.arguments],
        "constants": {name: plain(name, value) for name, value in found.constants},
    }


def manifest(architecture: int, built: list[Built]) -> dict[str, Any]:
    """Everything a program needs beside the cubins. `target` ends in "a" where the code runs on no other GPU."""
    return {
        "architecture": architecture,
        "target": sm_arch_from_capability(architecture),
        "triton": triton.__version__,
        "tiles": table_hash(),
        "kernels": [entry(b) for b in built],
    }


def write(folder: Path, made: dict[str, Any], built: list[Built]) -> None:
    """Cubins, then the manifest; cubins that an earlier manifest names and this one does not are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    if path.exists():
        current = {kernel["cubin"] for kernel in made["kernels"]}
        for kernel in json.loads(path.read_text())["kernels"]:
            if kernel["cubin"] not in current:
                (folder / kernel["cubin"]).unlink(missing_ok=True)
    for b in built:
        (folder / f"{b.specialisation.name}.cubin").write_bytes(b.cubin)
    path.write_text(json.dumps(made, indent=1) + "\n")


def main() -> None:
    parser = Parser("python -m kernels.aot.build", (__doc__ or "").strip())
    parser.add_argument("--arch", type=arch_option, required=True, help="a compute capability: 80 90 100 120")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to; made where missing")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("Triton's interpreter makes no machine code: unset TRITON_INTERPRET")
    built = [build(s, arguments.arch) for s in specialisations(arguments.arch)]
    write(arguments.out, manifest(arguments.arch, built), built)
    print(f"sm_{arguments.arch}: {len(built)} kernels in {arguments.out}")


if __name__ == "__main__":
    run_main(main)
