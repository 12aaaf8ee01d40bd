"""From a kernel start to machine code: the types Triton would give the arguments, the cubin, and what is in it."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.launch import Launch

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8", torch.int64: "i64",
    torch.int32: "i32",
}  # fmt: skip
# the constants that tell one specialisation of a module's kernels from another
NAMED = {
    "attention": ("d", "ROWS"),
    "cube_embed": ("ROWS",),
    "decoder_input": ("BLOCK",),
    "layer_norm": ("BLOCK",),
    "split_heads": ("d", "BLOCK"),
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TENSOR_CORE = {"HMMA": "HMMA", "HGMMA": "HGMMA", "UTCHMMA": "tcgen05"}


@dataclass(frozen=True)
class Specialisation:
    """A kernel with argument types and constants: one cubin for each architecture."""

    name: str
    module: str
    function: str
    arguments: tuple[tuple[str, str], ...]  # name, type as Triton spells it: "*bf16", "i32"
    constants: tuple[tuple[str, Any], ...]  # compile-time values, and arguments whose value is 1 or None
    aligned: tuple[str, ...]  # arguments that are multiples of 16
    num_warps: int
    num_stages: int
    gpu: str = ""  # whose measured tile it has; empty for the default


@dataclass(frozen=True)
class Built:
    """A specialisation compiled for one architecture."""

    specialisation: Specialisation
    architecture: int
    cubin: bytes = field(repr=False)
    symbol: str
    shared_bytes: int
    trailing_pointers: int  # scratch memory that Triton adds after the arguments; null for these kernels
    registers: int
    stack_bytes: int  # of a thread: what was spilled
    instructions: int
    tensor_cores: tuple[str, ...]
    load_bytes: tuple[int, ...]  # widths of one thread's loads from global memory


def specialise(launch: Launch) -> Specialisation:
    """As Triton does at run time: an integer 1 and None become constants, multiples of 16 are remembered as such.

    Counts, which change with the batch and the mask, are exempt: the kernels list them as `do_not_specialize`.
    Tensors count as aligned to 16 bytes, as fresh ones are.
    """
    kernel = launch.kernel
    values = dict(zip(kernel.arg_names, launch.arguments, strict=False))
    values |= {k: v for k, v in launch.options.items() if k in kernel.arg_names}
    arguments, constants, aligned = [], [], []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        fixed = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (fixed and type(value) is int and value == 1):
            constants.append((name, value))
        elif isinstance(value, Tensor):
            arguments.append((name, "*" + TYPES[value.dtype]))
            aligned.append(name)
        elif isinstance(value, int):
            arguments.append((name, "i32" if abs(value) < 2**31 else "i64"))
            aligned += [name] if fixed and value % 16 == 0 else []
        else:
            arguments.append((name, "fp32"))
    options = {k: launch.options.get(k, default) for k, default in (("num_warps", 4), ("num_stages", 3))}
    name, module, function = _name(launch, values), kernel.fn.__module__, kernel.fn.__name__
    return Specialisation(name, module, function, tuple(arguments), tuple(constants), tuple(aligned), **options)


def _name(launch: Launch, values: dict[str, Any]) -> str:
    """`layer_norm_forward_bf16_BLOCK1024_no_residual`: module, kernel, dtype, telling constants, what is None."""
    module = launch.kernel.fn.__module__.split(".")[-1]
    kinds = [TYPES[v.dtype] for v in values.values() if isinstance(v, Tensor) and v.dtype.is_floating_point]
    dtype = next((k for k in kinds if k != "fp32"), "fp32")
    constants = [f"{k}{values[k]}" for k in NAMED.get(module, ()) if k in values]
    absent = [f"no_{k}" for k, v in values.items() if v is None and k not in ("scale", "values")]
    return "_".join([module + launch.kernel.fn.__name__.removesuffix("_kernel"), dtype, *constants, *absent])


def build(specialisation: Specialisation, architecture: int) -> Built:
    """Compile; Triton keeps the result in its cache, by hash of the source. No GPU is used, nor a driver."""
    kernel = vars(import_module(specialisation.module))[specialisation.function]
    names = [p.name for p in kernel.params]
    types, constants = dict(specialisation.arguments), dict(specialisation.constants)
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in specialisation.aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": specialisation.num_warps, "num_stages": specialisation.num_stages}
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # no paths of this machine in the result
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    usage, code = _dump(compiled.asm["cubin"])
    registers, stack_bytes = _resources(usage)
    instructions, tensor_cores, load_bytes = _instructions(code)
    entry = re.search(r"\.entry[^(]*\(([^)]*)\)", compiled.asm["ptx"])
    assert entry is not None
    return Built(
        specialisation,
        architecture,
        compiled.asm["cubin"],
        compiled.metadata.name,
        compiled.metadata.shared,
        entry.group(1).count(".param") - len(specialisation.arguments),
        registers,
        stack_bytes,
        instructions,
        tensor_cores,
        load_bytes,
    )


def _dump(cubin: bytes) -> tuple[str, str]:
    """Resource usage and disassembly, by the tools that come with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def run(tool: str, option: str) -> str:
            command = [str(TOOLS / tool), option, str(path)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        return run("cuobjdump", "--dump-resource-usage"), run("nvdisasm", "-c")


def _resources(usage: str) -> tuple[int, int]:
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found.group(1)), int(found.group(2))


def _instructions(code: str) -> tuple[int, tuple[str, ...], tuple[int, ...]]:
    """How many, which tensor-core kinds, and the widths of loads from global memory (asynchronous copies too)."""
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([\w.]+)", code, re.MULTILINE)
    counts = Counter(names)
    cores = {TENSOR_CORE[n.split(".")[0]] for n in counts if n.split(".")[0] in TENSOR_CORE}
    widths = set()
    for name in counts:
        operation, *modifiers = name.split(".")
        if operation in ("LDG", "LDGSTS"):
            narrow = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
            widths.add(next((narrow[m] for m in modifiers if m in narrow), 4))
    executed = sum(n for name, n in counts.items() if name != "NOP")
    return executed, tuple(sorted(cores)), tuple(sorted(widths, reverse=True))
