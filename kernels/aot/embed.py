"""The C library's table: its kernels' machine code, arguments and constants as one C source.

python -m kernels.aot.embed --out tables.c DIR...      # folders that kernels.aot.build wrote

Of all kernels it takes those behind videomae_kernels.h: the cube embedding and the loss, forward, in bfloat16.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kernels.aot.build import MANIFEST
from kernels.launch import IMAGENET_MEAN, IMAGENET_STD
from videomae.command_line import Parser, run_main

# what the library calls it: module, function, and the arguments that are absent
ROLES = {
    "VMK_FOLD": ("kernels.cube_embed", "_fold_kernel", set()),
    "VMK_EMBED_VISIBLE": ("kernels.cube_embed", "_forward_kernel", set()),
    "VMK_EMBED_ALL": ("kernels.cube_embed", "_forward_kernel", {"index"}),
    "VMK_LOSS": ("kernels.pixel_loss", "_loss_kernel", {"factor", "scale", "values", "grad"}),
    "VMK_LOSS_GRADIENT": ("kernels.pixel_loss", "_loss_kernel", {"factor", "scale", "values"}),
}


def choose(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The kernel for each role, with the default tile; ValueError unless there is one and no other."""
    chosen = {}
    for role, (module, function, absent) in ROLES.items():
        found = [
            kernel
            for kernel in manifest["kernels"]
            if (kernel["module"], kernel["function"], kernel["gpu"]) == (module, function, "")
            and {name for name, value in kernel["constants"].items() if value is None} == absent
        ]
        if len(found) != 1:
            names = [kernel["name"] for kernel in found]
            raise ValueError(f"sm_{manifest['architecture']} must have one kernel for {role}; got {names}")
        chosen[role] = found[0]
    return chosen


def _bytes(data: bytes) -> Iterator[str]:
    for start in range(0, len(data), 32):
        yield ",".join(map(str, data[start : start + 32])) + ","


def kernel_source(prefix: str, kernel: dict[str, Any], cubin: bytes) -> tuple[list[str], str]:
    """The lines that define a kernel's arrays, and the table's entry for it without role and architecture."""
    # absent arguments, strings and fractions are of no use for a launch
    constants = {name: int(value) for name, value in kernel["constants"].items() if isinstance(value, int)}
    lines = [f"static const vmk_parameter {prefix}_arguments[] = {{"]
    lines += [f'  {{"{a["name"]}", "{a["type"]}", {int(a["aligned"])}}},' for a in kernel["arguments"]]
    lines += ["};", f"static const vmk_constant {prefix}_constants[] = {{"]
    lines += [f'  {{"{name}", {value}}},' for name, value in constants.items()]
    lines += ["};", f"_Alignas(16) static const unsigned char {prefix}_cubin[] = {{", *_bytes(cubin), "};"]
    fields = [f'"{kernel["name"]}"', f'"{kernel["symbol"]}"']
    fields += [str(kernel[field]) for field in ("shared_bytes", "threads", "trailing_pointers")]
    fields += [f"{prefix}_arguments", str(len(kernel["arguments"])), f"{prefix}_constants", str(len(constants))]
    return lines, ", ".join([*fields, f"{prefix}_cubin", str(len(cubin))])


def source(folders: list[Path]) -> str:
    """The whole C file; architectures in the order given."""
    lines = ["/* Written by kernels/aot/embed.py. */", '#include "videomae_kernels.h"', ""]
    entries = []
    for folder in folders:
        manifest = json.loads((folder / MANIFEST).read_text())
        capability = manifest["architecture"]
        # code for sm_90a and its like runs on that very capability only
        exact = int(manifest["target"].endswith("a"))
        for role, kernel in choose(manifest).items():
            prefix = f"sm{capability}_{role.removeprefix('VMK_').lower()}"
            defined, fields = kernel_source(prefix, kernel, (folder / kernel["cubin"]).read_bytes())
            lines += defined
            entries.append(f"  {{{role}, {capability}, {exact}, {fields}}},")
    lines += ["", "const vmk_kernel vmk_tables[] = {", *entries, "};"]
    lines.append(f"const size_t vmk_tables_count = {len(entries)};")
    for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        lines.append(f"const double vmk_imagenet_{name}[3] = {{{', '.join(map(repr, values))}}};")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = Parser("python -m kernels.aot.embed", (__doc__ or "").strip())
    parser.add_argument("--out", type=Path, required=True, help="the C file to write")
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    arguments = parser.parse_args()
    arguments.out.write_text(source(arguments.folders))


if __name__ == "__main__":
    run_main(main)
