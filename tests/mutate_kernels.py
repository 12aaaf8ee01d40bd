"""Break a line of a kernel, run its tests, and see them fail: `python -m tests.mutate_kernels [NAME ...] [--jobs N]`.

Each mutation is one replacement inside one function of a kernel file, applied to a copy of the project. The command
lists what survived, and exits with 1 if anything did. A name selects an op or a function, as `layer_norm` or
`layer_norm._backward_kernel`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# op.function -> (what it says, what it is made to say)
MUTATIONS = {
    "bias_gelu._tail": [
        ("p * u + 3.9795094e-07", "p * u + 3.9795094e-05"),
        ("p * u - 6.2266731e-06", "p * u + 6.2266731e-06"),
        ("p * u - 1.9948366e-04", "p - 1.9948366e-04"),
        ("p * u - 5.2530720e-02", "p * u - 5.2540720e-02"),
        ("p * u - 1.1511068e00", "p * u - 1.1511668e00"),
        ("tl.exp2(p)", "tl.exp(p)"),
    ],
    "bias_gelu._forward_kernel": [
        ("tl.program_id(1) * COLS", "tl.program_id(0) * COLS"),
        ("(rows < R)[:, None] &", "(rows <= R)[:, None] &"),
        ("& (cols < D)[None, :]", "& (cols <= D)[None, :]"),
        ("rows[:, None] * D", "rows[:, None] * COLS"),
        ("z += tl.load", "z -= tl.load"),
        ("tl.maximum(z, 0.0) - u", "tl.maximum(z, 0.0) + u"),
        ("u = tl.abs(z)", "u = z"),
    ],
    "bias_gelu._backward_kernel": [
        ("range(tl.program_id(0),", "range(tl.program_id(0) + 1,"),
        ("tl.cdiv(R, ROWS), PROGRAMS)", "tl.cdiv(R, ROWS) - 1, PROGRAMS)"),
        ("(rows < R)[:, None] &", "(rows <= R)[:, None] &"),
        (".to(tl.float32) + bias", ".to(tl.float32) - bias"),
        ("tl.where(z < 0.0, tail, 1.0 - tail)", "1.0 - tail"),
        ("-0.7213475204444817", "-0.5"),
        ("cdf + z * pdf", "cdf + pdf"),
        ("total += tl.sum(dz, axis=0)", "total = tl.sum(dz, axis=0)"),
        ("db_part + tl.program_id(0) * D + cols", "db_part + cols"),
    ],
    "layer_norm._forward_kernel": [
        ("(rows < R)[:, None] &", "(rows <= R)[:, None] &"),
        ("& (cols < D)[None, :]", "& (cols <= D)[None, :]"),
        ("added += tl.load(x_bias", "added -= tl.load(x_bias"),
        ("added += tl.load(residual", "added -= tl.load(residual"),
        ("added += tl.load(residual", "added = added.to(value.dtype).to(tl.float32) + tl.load(residual"),
        ("value = added.to(s.dtype.element_ty)", "value = value"),
        ("tl.sum(value, axis=1), D * 1.0)", "tl.sum(value, axis=1), BLOCK * 1.0)"),
        ("tl.where(inside, value - mean[:, None], 0.0)", "value - mean[:, None]"),
        ("/ D + eps)", "/ D + eps * 1000)"),
        ("* w[None, :] + b[None, :]", "* w[None, :] - b[None, :]"),
        ("tl.store(rstds + rows, rstd, mask=rows < R)", "tl.store(rstds + rows, rstd, mask=rows < R - 1)"),
    ],
    "layer_norm._backward_kernel": [
        ("range(tl.program_id(0),", "range(tl.program_id(0) + 1,"),
        ("(rows < R)[:, None] &", "(rows <= R)[:, None] &"),
        ("weighted = upstream * w", "weighted = upstream"),
        ("weighted - level - normed * along", "weighted - normed * along"),
        ("weighted - level - normed * along", "weighted - level - along"),
        ("gradient += tl.load(ds", "gradient -= tl.load(ds"),
        ("dw_sum += tl.sum(upstream * normed, axis=0)", "dw_sum += tl.sum(weighted * normed, axis=0)"),
        ("db_sum += tl.sum(upstream, axis=0)", "db_sum = tl.sum(upstream, axis=0)"),
        ("dx_sum += tl.sum(gradient, axis=0)", "dx_sum = tl.sum(gradient, axis=0)"),
        ("dx_sum += tl.sum(gradient, axis=0)", "dx_sum += tl.sum(weighted, axis=0)"),
        ("dx_sum += tl.sum(gradient,", "dx_sum += tl.sum(gradient.to(dx.dtype.element_ty).to(tl.float32),"),
        ("tl.store(db + at, db_sum", "tl.store(dw + at, db_sum"),
        ("tl.store(dx_bias + at, dx_sum", "tl.store(db + at, dx_sum"),
        ("tl.program_id(0).to(tl.int64) * D + cols", "cols"),
    ],
    "split_heads._part": [
        ("rows_inside[:, None] & (cols < D)[None, :]", "(cols < D)[None, :]"),
        ("clip[:, None] * B_STRIDE", "clip[:, None] * L_STRIDE"),
        ("token.to(tl.int64)[:, None] * L_STRIDE", "token.to(tl.int64)[:, None] * A_STRIDE"),
        ("cols // d * A_STRIDE", "cols // d * d"),
        ("+ cols % d)", "+ cols)"),
        ("other=0.0", "other=1.0"),
    ],
    "split_heads._join_kernel": [
        ("range(program,", "range(program + 1,"),
        ("tl.cdiv(R, ROWS), PROGRAMS)", "tl.cdiv(R, ROWS) - 1, PROGRAMS)"),
        ("(rows < R) & (token >= L - LAST)", "(rows < R) & (token > L - LAST)"),
        ("token - (L - LAST)", "token"),
        ("_part(dv, clip, token", "_part(dk, clip, token"),
        ("(rows // L).to(tl.int64), rows % L", "(rows // L).to(tl.int64), rows"),
        ("(3 * D) + which * D + cols[None, :]", "(3 * D) + cols[None, :]"),
        ("mask=(rows < R)[:, None] & (cols < D)[None, :])", "mask=(rows <= R)[:, None] & (cols < D)[None, :])"),
        ("total += tl.sum(value.to(tl.float32), axis=0)", "total = tl.sum(value.to(tl.float32), axis=0)"),
        ("part + program * (3 * D) + which * D", "part + program * (3 * D)"),
        ("part + program * (3 * D) + which * D", "part + which * D"),
        ("total, mask=cols < D)", "total, mask=cols <= D)"),
    ],
    "decoder_input._place": [
        ("seen = tl.cdiv(V, ROWS)", "seen = V // ROWS"),
        ("seen + tl.cdiv(M, ROWS)", "seen + tl.cdiv(M, ROWS) - 1"),
        ("visible = block < seen", "visible = block <= seen"),
        ("block - seen) * ROWS", "block) * ROWS"),
        ("* ROWS + tl.arange(0, ROWS)", "* ROWS + tl.arange(0, ROWS) + 1"),
        ("tl.program_id(0) // per_clip", "tl.program_id(0) // (per_clip + 1)"),
    ],
    "decoder_input._forward_kernel": [
        ("inside = (rows < V)[:, None]", "inside = (rows <= V)[:, None]"),
        ("inside = (rows < M)[:, None]", "inside = (rows <= M)[:, None]"),
        ("visible_index + clip * V + rows", "visible_index + clip * M + rows"),
        ("masked_index + clip * M + rows", "masked_index + rows"),
        ("visible + clip * V * E + at", "visible + at"),
        ("value = token + _position", "value = token - _position"),
        ("(clip * (V + M) + V) * E + at", "(clip * (V + M)) * E + at"),
    ],
    "decoder_input._position": [
        ("cube < N))[:, None]", "cube <= N))[:, None]"),
        ("known = inside & ((cube >= 0) &", "known = inside & ((cube < 0) |"),
        ('other=float("nan")', "other=0.0"),
        ("[:, None] * E + cols", "[:, None] + cols"),
        ("cube, 0).to(tl.int32)", "cube, 0).to(tl.int32) * 0"),
        ("E + cols[None, :]", "E"),
    ],
    "decoder_input._backward_kernel": [
        ("if program < PROGRAMS:", "if program <= PROGRAMS:"),
        ("CLIPS * per_clip, PROGRAMS)", "CLIPS * per_clip - 1, PROGRAMS)"),
        ("inside = (rows < M)[:, None]", "inside = (rows <= M)[:, None]"),
        ("inside = (rows < V)[:, None]", "inside = (rows <= V)[:, None]"),
        ("(block // per_clip) + V) * E", "(block // per_clip)) * E"),
        ("total += tl.sum", "total = tl.sum"),
        ("tl.load(dout + clip * (V + M) * E + at", "tl.load(dout + clip * V * E + at"),
    ],
    "pixel_loss._loss_kernel": [
        ("clip = (tl.program_id(0) // M)", "clip = (tl.program_id(0) // (M + 1))"),
        ("(raw >= 0) & (raw < N)", "(raw < N)"),
        ("(cube // (GRID_H * GRID_W)) * DT * H", "(cube // (GRID_H * GRID_W)) * H"),
        ("(cube // GRID_W) % GRID_H * DY", "(cube // GRID_W) * DY"),
        ("((run // DY) * H + run % DY)", "(run // DY + run % DY)"),
        ("k % (DX * C)", "k % DX"),
        ("P * tl.sum(squares, axis=0).to(tl.int64)", "tl.sum(squares, axis=0).to(tl.int64)"),
        ("(P * (P - 1.0))", "(P * (P + 0.0))"),
        ("deviation + 255.0 * EPS", "deviation + 100.0"),
        ("value * tl.load(values + channel)", "value"),
        ("tl.where(mine, tiles[q] - start, 0.0)", "tl.where(mine, tiles[q], 0.0)"),
        ("/ (P - 1.0))", "/ P)"),
        ("difference * (2.0 * share)", "difference * share"),
        ("error += tl.sum(size, axis=1)", "error += tl.sum(difference, axis=1)"),
        ("tl.where(size < 1.0, 0.5 * difference", "tl.where(size < 0.5, 0.5 * difference"),
        ("size - 0.5)", "size)"),
        ("tl.where(difference < 0.0, 1.0, 0.0)", "tl.where(difference <= 0.0, 1.0, 0.0)"),
        ("tl.where(difference > 0.0, 1.0, 0.0)", "1.0"),
        ("tl.where(size >= 1.0, slope, difference)", "difference"),
        ("slope *= share", "slope *= 2.0 * share"),
        ("difference = tl.where(k < K, difference, 0.0)", "difference = difference"),
        ("slope = tl.where(share == 0.0, 0.0, ", "slope = (0.0 + "),
        ("share *= tl.load(factor + clip)", "share *= tl.load(factor)"),
        ("share *= tl.load(scale)", "share += tl.load(scale)"),
        ("tl.store(grad + row * K + k, slope, mask=k < K)", "tl.store(grad + row * K + k, slope)"),
    ],
    "pixel_loss._rescale_kernel": [
        ("if factor != 1.0:", "if factor == 1.0:"),
        ("range(tl.program_id(0),", "range(tl.program_id(0) + 1,"),
        ("BLOCKS, PROGRAMS):\n        ", "BLOCKS - 1, PROGRAMS):\n        "),
        ("value * factor", "value * factor * factor"),
        ("value * factor, mask=at < SIZE", "value * factor, mask=at <= SIZE"),
        ("* block + tl.arange", "+ tl.arange"),
    ],
    "cube_embed._fold_kernel": [
        ("* tl.load(values + c)", "* tl.load(values)"),
        ("(row * C + c) * P + p", "(row * C) * P + p"),
        ("(row * P + p) * C + c", "(row * C + c) * P + p"),
        ("total += w.to(tl.float32)", "total = w.to(tl.float32)"),
        ("tl.load(values + C + c)", "tl.load(values + c)"),
        ("tl.store(folded + (row * P + p) * C + c, w, mask=p < P)", "tl.store(folded + (row * P + p) * C + c, w)"),
        ("tl.load(bias + row)", "tl.load(bias)"),
    ],
    "cube_embed._cube_starts": [
        ("tl.load(index + rows", "tl.load(index + rows % V"),
        ("(cube // (GRID_H * GRID_W)) * DT * H", "(cube // (GRID_H * GRID_W)) * H"),
        ("(cube // GRID_W) % GRID_H * DY", "(cube // GRID_W) * DY"),
        ("cube % GRID_W * DX", "cube % GRID_H * DX"),
        ("(rows // V).to(tl.int64) * T", "(rows // V).to(tl.int64) * (T - 1)"),
        ("(cube >= 0) & (cube < N)", "(cube < N)"),
        ("(rows % V).to(tl.int64)", "rows.to(tl.int64)"),
    ],
    "cube_embed._pixel_offsets": [
        ("run = k // (DX * C)", "run = k // DX"),
        ("(run // DY) * H", "(run // DX) * H"),
        ("run % DY)", "run)"),
        ("* (W * C)", "* W"),
        ("+ k % (DX * C)", "+ k % DX"),
        ("((run // DY) * H + ", "((run // DY) * W + "),
    ],
    "cube_embed._pixels": [
        ("- 128.0", "- 127.0"),
        ("* 0.015625", "* 0.0156"),
        ("* 0.015625).to(dtype)", "* 0.015625).to(dtype) + 0.01"),
        ("x.to(tl.float32) - 128.0", "128.0 - x.to(tl.float32)"),
        ("mask=mask, other=0.0).to(dtype)", "mask=mask, other=0.0).to(dtype) * 2"),
        ("if frames.dtype.element_ty == tl.uint8:", "if frames.dtype.element_ty != tl.uint8:"),
    ],
    "cube_embed._forward_kernel": [
        ("tl.program_id(0) % tl.cdiv(D, COLS)", "tl.program_id(0) // tl.cdiv(D, COLS)"),
        ("range(0, K, DEPTH)", "range(0, K - DEPTH, DEPTH)"),
        ("cols[None, :] * K + k[:, None]", "cols[None, :] * K + k[:, None] + 1"),
        ("cols[None, :] * K + k[:, None], mask", "cols[None, :] * DEPTH + k[:, None], mask"),
        ("total += tl.load(offset", "total -= tl.load(offset"),
        ("inside = (rows < R)[:, None]", "inside = (rows <= R)[:, None]"),
        ("cube[:, None] * D + cols", "rows[:, None] % N * D + cols"),
        ('other=float("nan")', "other=0.0"),
    ],
    "cube_embed._backward_kernel": [
        ("tl.program_id(1) * OUTER", "tl.program_id(0) * OUTER"),
        ("range(0, SPAN, ROWS)", "range(ROWS, SPAN, ROWS)"),
        ("rows = split * SPAN + begin", "rows = begin"),
        ("mask=(rows < R)[:, None] & (outer < D)[None, :]", "mask=(outer < D)[None, :]"),
        ("bias_total += tl.sum", "bias_total = tl.sum"),
        ("tl.dot(tl.trans(upstream), u, total", "tl.dot(tl.trans(upstream), u, total * 0"),
        ("(split * D + outer[:, None])", "(outer[:, None])"),
        ("if tl.program_id(0) == 0:", "if tl.program_id(0) < 0:"),
    ],
    "cube_embed._unfold_kernel": [
        ("range(SPLITS)", "range(SPLITS - 1)"),
        ("(split * D + row) * (P * C)", "row * (P * C)"),
        ("bias_part + split * D + row", "bias_part + row"),
        ("tl.load(values + k % C)", "tl.load(values + k // P)"),
        ("total + shift * bias_total", "total - shift * bias_total"),
        ("(row * C + k % C) * P + k // C", "row * C * P + k"),
    ],
    "attention._block": [
        ("(rows < V)[:, None]", "(rows <= V)[:, None]"),
        ("(cols < d)[None, :]", "(cols <= d)[None, :]"),
        ("rows[:, None] * stride", "rows[:, None] * d"),
        ("+ cols[None, :]", ""),
        ("other=0.0", 'other=float("nan")'),
        ("rows[:, None] * stride + cols", "(rows[:, None] + 1) * stride + cols"),
    ],
    "attention._store": [
        ("(rows < V)[:, None]", "(rows <= V)[:, None]"),
        ("(cols < d)[None, :]", "(cols <= d)[None, :]"),
        ("rows[:, None] * stride", "rows[:, None] * d"),
        ("cols[None, :], value", "cols[None, :], value * 2"),
        ("(rows < V)", "(rows < V - 1)"),
        ("(cols < d)", "(cols < d - 1)"),
    ],
    "attention._forward_kernel": [
        ("range(0, V, COLS)", "range(0, V - COLS, COLS)"),
        ("tl.where((keys < V)[None, :], scores * scale", "tl.where((keys <= V)[None, :], scores * scale"),
        ("fade = tl.exp2(top - higher)", "fade = tl.exp2(higher - higher)"),
        ("total = total * fade +", "total = total +"),
        ("acc0 * fade[:, None]", "acc0"),
        ("acc1 * fade[:, None]", "acc1"),
        ("tl.dot(q1, tl.trans(k1), scores", "tl.dot(q1, tl.trans(k1), scores * 0"),
        ("top + tl.log2(total)", "top - tl.log2(total)"),
        ("out + clip * V * heads * d + head * d", "out + clip * V * heads * d"),
    ],
    "attention._weights": [
        ("scores * scale - level", "scores - level"),
        ("tl.where((keys < V)[None, :], p, 0.0)", "tl.where((keys <= V)[None, :], p, 0.0)"),
        ("dp - delta[:, None]", "dp + delta[:, None]"),
        ("tl.dot(do0, tl.trans(v0)", "tl.dot(do0, tl.trans(k0)"),
        ("tl.dot(q1, tl.trans(k1), scores", "tl.dot(q1, tl.trans(k1), scores * 0"),
        ("tl.dot(do1, tl.trans(v1), dp", "tl.dot(do1, tl.trans(v1), dp * 0"),
    ],
    "attention._whole_backward_kernel": [
        ("range(0, V, COLS)", "range(0, V - COLS, COLS)"),
        ("mask=rows < V, other=float", "mask=rows < V - 1, other=float"),
        ("delta += tl.sum(do1", "delta -= tl.sum(do1"),
        ("dk0 = tl.dot(tl.trans(q0), ds", "dk0 = tl.dot(tl.trans(do0), ds"),
        ("dq0 = tl.dot(ds, k0, dq0", "dq0 = tl.dot(ds, k0, dq0 * 0"),
        ("dq1 = tl.dot(ds, k1, dq1", "dq1 = tl.dot(ds, k0, dq0"),
        ("dv0 = tl.dot(tl.trans(do0), p", "dv0 = tl.dot(tl.trans(q0), p"),
        ("dv1 = tl.dot(tl.trans(do1), p", "dv1 = tl.dot(tl.trans(do1), ds"),
        ("_store(dbase, rows, stride, cols0, V, d, dq0 * natural)", "_store(dbase, rows, stride, cols0, V, d, dq0)"),
    ],
    "attention._blocked_backward_kernel": [
        ("rows = job % blocks * ROWS", "rows = job // blocks * ROWS"),
        ("natural = scale * 0.6931471805599453", "natural = scale"),
        ("acc0 = tl.dot(ds, k0, acc0", "acc0 = tl.dot(ds, k0, acc0 * 0"),
        ("acc1 = tl.dot(ds, k1, acc1", "acc1 = tl.dot(ds, k1, acc1 * 0"),
        ("acc0 = tl.dot(tl.trans(p), do0, acc0", "acc0 = tl.dot(tl.trans(p), do0, acc0 * 0"),
        ("other0 = tl.dot(tl.trans(ds), q0, other0", "other0 = tl.dot(tl.trans(p), q0, other0"),
        ("other1 = tl.dot(tl.trans(ds), q1, other1", "other1 = tl.dot(tl.trans(ds), q1, other1 * 0"),
        ("tl.load(levels + queries, mask=queries < V", "tl.load(levels + queries, mask=queries < V - 1"),
        ("job = tl.program_id(0) // 2", "job = tl.program_id(0)"),
    ],
}  # fmt: skip


def mutate(source: str, function: str, old: str, new: str) -> str:
    """source with old replaced by new inside function; ValueError unless it stands there exactly once."""
    start = source.index(f"\ndef {function}(")
    end = source.find("\n\n\n", start)
    body = source[start:end]
    if body.count(old) != 1:
        raise ValueError(f"{function}: {old!r} stands there {body.count(old)} times")
    return source[:start] + body.replace(old, new) + source[end:]


def survives(name: str, old: str = "", new: str = "") -> bool:
    """Whether the op's tests pass in a copy of the project with that mutation; without one, as it is."""
    op, function = name.split(".")
    with tempfile.TemporaryDirectory() as folder:
        for part in ("kernels", "videomae", "train", "tests", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, Path(folder) / part)
        file = Path(folder) / "kernels" / f"{op}.py"
        if old:
            file.write_text(mutate(file.read_text(), function, old, new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", f"tests/kernels/test_{op}.py", "-k", "not registered"]
        environment = os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([*command, "-m", "not long"], cwd=folder, env=environment, capture_output=True)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    chosen = [
        (name, old, new)
        for name, pairs in MUTATIONS.items()
        for old, new in pairs
        if not arguments.names or any(name in (n, f"{n}.{name.split('.')[1]}") for n in arguments.names)
    ]
    for op in {name.split(".")[0] for name, _, _ in chosen}:
        if not survives(f"{op}."):
            sys.exit(f"the tests of {op} fail as it is: nothing can be said of its mutations")
    survivors = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for (name, old, new), alive in zip(chosen, pool.map(lambda m: survives(*m), chosen), strict=True):
            survivors += alive
            print(f"{'SURVIVED' if alive else 'caught  '} {name}: {old!r} -> {new!r}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutations caught")
    sys.exit(survivors > 0 or not chosen)


if __name__ == "__main__":
    main()
