"""Inputs, float64 answers and expected launches, for the C library's test.

python -m kernels.aot.golden --out golden.bin --arch 90

Format: "VMKGOLD1", then records of name [32 bytes], type [8 bytes], count (uint64), data, zeros to a multiple of 8.
Allowed errors lie beside the answers, as `<answer>_allowed`: for tokens and gradient, sums in float32 of bfloat16
values, twice what rounding the largest result to bfloat16 costs; for the loss, a float32 sum, 1e-5 of it.
"""

import struct
from pathlib import Path

import torch
from torch import Tensor

from kernels.aot.catalogue import CUBE, arch_option, target_for
from kernels.aot.specialise import TYPES, specialise
from kernels.cube_embed import _forward as cube_embed_forward
from kernels.cube_embed import cube_embed_ref, fold_values
from kernels.launch import IMAGENET_MEAN, IMAGENET_STD, Launch, recording
from kernels.pixel_loss import _forward as pixel_loss_forward
from kernels.pixel_loss import pixel_loss_ref
from kernels.tiles import assuming
from videomae.command_line import Parser, run_main

# N = 2 x 6 x 7 cubes: all of them fill more than a tile of rows, and D more than a tile of columns
B, T, H, W, D, V, M = 2, 4, 96, 112, 144, 5, 7
N, K = T // CUBE[0] * (H // CUBE[1]) * (W // CUBE[2]), 3 * CUBE[0] * CUBE[1] * CUBE[2]
SCALE = 3.0
Records = dict[str, Tensor | bytes]


def inputs() -> dict[str, Tensor]:
    """Random, of the dtypes that the library takes; weights of the size that training gives them."""
    generator = torch.Generator().manual_seed(0)
    normal = {
        name: torch.randn(*shape, generator=generator)
        for name, shape in {"weight": (D, 3, *CUBE), "bias": (D,), "positions": (N, D), "pred": (B, M, K)}.items()
    }
    index, masked = (
        torch.stack([torch.randperm(N, generator=generator)[:count] for _ in range(B)]) for count in (V, M)
    )
    frames = torch.randint(0, 256, (B, T, H, W, 3), dtype=torch.uint8, generator=generator)
    # a constant cube has no variance to divide by
    first = masked[0, 0] // (H // 16 * (W // 16)), masked[0, 0] // (W // 16) % (H // 16), masked[0, 0] % (W // 16)
    t, y, x = (int(place) * step for place, step in zip(first, CUBE, strict=True))
    frames[0, t : t + CUBE[0], y : y + CUBE[1], x : x + CUBE[2]] = 77
    normal["weight"] *= 0.05
    return {"frames": frames, "index": index, "masked": masked, **normal, "pred": normal["pred"].bfloat16()}


def answers(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tokens of the visible and of all cubes, the loss and its gradient, each with the error it may have."""
    weight, bias, positions = (given[name].double() for name in ("weight", "bias", "positions"))
    found = {}
    for name, index in (("tokens_visible", given["index"]), ("tokens_all", None)):
        found[name] = cube_embed_ref(given["frames"], weight, bias, positions, index, IMAGENET_MEAN, IMAGENET_STD)
    pred = given["pred"].double().requires_grad_()
    constants = (CUBE, True, None, SCALE, IMAGENET_MEAN, IMAGENET_STD)
    loss = pixel_loss_ref(pred, given["frames"], given["masked"], *constants)
    found["gradient"] = torch.autograd.grad(loss, pred)[0]
    rounding = torch.finfo(torch.bfloat16).eps / 2
    found |= {f"{name}_allowed": 2 * rounding * value.abs().max()[None] for name, value in found.items()}
    return found | {"loss": loss.detach()[None], "loss_allowed": 1e-5 * loss.detach()[None]}


def _line(launch: Launch) -> str:
    """A launch as the C test writes it: name, grid, threads, then each argument with its type, and numbers' values."""
    values = {**dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)), **launch.options}
    words = [specialise(launch).name, str(launch.grid[0]), str(32 * launch.options.get("num_warps", 4))]
    for parameter in launch.kernel.params:
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            continue
        if isinstance(value, Tensor):
            words.append(f"{parameter.name}:*{TYPES[value.dtype]}")
        elif isinstance(value, int):
            words.append(f"{parameter.name}:i32={value}")
        else:
            words.append(f"{parameter.name}:fp32={struct.unpack('<I', struct.pack('<f', value))[0]}")
    return " ".join(words)


def launches(given: dict[str, Tensor], architecture: int) -> str:
    """What the Python ops would start for these inputs on that architecture, in the C test's order; one a line."""
    with assuming(target_for(architecture)), recording() as found:
        for index in (given["index"], None):
            tensors = (given["frames"], given["weight"], given["bias"], given["positions"], index)
            cube_embed_forward(*tensors, fold_values(given["frames"], IMAGENET_MEAN, IMAGENET_STD), torch.bfloat16)
        for writes in (False, True):
            options = (None, None, None, CUBE, True, "mse", SCALE, writes)
            pixel_loss_forward(given["pred"], given["frames"], given["masked"], *options)
    return "".join(_line(launch) + "\n" for launch in found)


def packed(records: Records) -> bytes:
    """The file."""
    kinds = {**TYPES, torch.float64: "fp64"}
    parts = [b"VMKGOLD1"]
    for name, value in records.items():
        if isinstance(value, Tensor):
            flat, kind = value.detach().contiguous().flatten(), kinds[value.dtype]
            count, data = flat.numel(), flat.view(torch.uint8).numpy().tobytes()
        else:
            # C wants the zero at the end
            count, kind, data = len(value) + 1, "text", value + b"\0"
        if len(name) >= 32:
            raise ValueError(f"a record's name must be shorter than 32 bytes; got {name}")
        parts.append(struct.pack("<32s8sQ", name.encode(), kind.encode(), count) + data + bytes(-len(data) % 8))
    return b"".join(parts)


def main() -> None:
    parser = Parser("python -m kernels.aot.golden", (__doc__ or "").strip())
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument(
        "--arch", type=arch_option, nargs="+", required=True, help="compute capabilities: 80 90 100 120"
    )
    arguments = parser.parse_args()
    given = inputs()
    sizes = torch.tensor([B, T, H, W, D, V, M, N, K])
    records: Records = {"sizes": sizes, "scale": torch.tensor([SCALE]).double(), **given, **answers(given)}
    for architecture in arguments.arch:
        records[f"launches_{architecture}"] = launches(given, architecture).encode()
    arguments.out.write_bytes(packed(records))


if __name__ == "__main__":
    run_main(main)
