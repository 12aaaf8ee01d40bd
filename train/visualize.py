"""See what a model sees: `python -m train.visualize VIDEO [VIDEO ...] --weights W [--ratio 0.75 0.9]`.

VIDEO is a file or a folder of them. Each gets a folder OUT/STEM: of pre-training weights reconstruction-MASK.png, .gif
and .mp4 (see reconstruction.py), with `--attention LAYER ...` of any weights attention.png (see attention_maps.py).
"""

import itertools
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from kernels.launch import check
from train.attention_maps import Layer, Query, attention_maps, check_query, draw_attention, parse_layers
from train.cli import parse_flags, user_errors
from train.film import write_gif, write_mp4, write_png
from train.inference import find_weights, name_of
from train.machine import pick_device
from train.one_clip import Clip, Start, read_clip
from train.optim import PRECISIONS, resolve_precision
from train.origin import Target, stride_of, target_of
from train.reconstruction import Guess, draw_film, draw_sheet, guess
from train.shares import refuse_several
from videomae import masking
from videomae.command_line import nobody_reads, run_main
from videomae.data.dataset import Sample, find_named, mask_keys
from videomae.data.decode import UnreadableVideo
from videomae.data.sampling import Sampling
from videomae.data.shards import is_locator
from videomae.inputs import Positions
from videomae.model import Encoder, Input, VideoMAE
from videomae.weights import model_from

PROG = "python -m train.visualize"
_DEFAULT = Sampling("dense", 4)  # where the weights do not say
_SLOWEST, _FASTEST = 2.0, 8.0  # frames a second of a film: what can be followed
_MOST_CUBES = 2**16  # of a clip: forty times what the recipes train with

_EXAMPLES = (
    f"{PROG} video.mp4 --weights runs/pretrain-demo",
    f"{PROG} videos/ --weights W --ratio 0.9 --mask tube random frame --start 2.5s",
    f"{PROG} video.mp4 --weights W --attention 1 last --query 4,7,7",
)


@dataclass(frozen=True)
class VisualizeConfig:
    """Reconstructions and attention maps."""

    videos: tyro.conf.Positional[tuple[str, ...]]  # files, or folders of videos
    weights: str  # a run folder, a checkpoint, a weight file, or a Hugging Face folder or hub id
    out: str = "runs/visualize"  # a folder; every video gets one in it, called as the video
    ratio: tuple[float, ...] = (0.75, 0.9, 0.95)  # shares of the cubes that are hidden
    mask: tuple[Literal["tube", "random", "frame"], ...] = ("tube",)  # kinds; a sheet and a film for each
    # layers: a number from 1 on, last or all of the encoder; decoder.NUMBER, decoder.last, decoder.all
    attention: tuple[str, ...] = ()
    query: str = "mean"  # whose attention: the mean of all, or of one cube, SLOT,ROW,COLUMN from 0 on
    heads: Literal["mean", "each"] = "mean"  # of each layer
    # all: the encoder sees the whole clip; visible: what the first mask and ratio leave, as in pre-training
    tokens: Literal["all", "visible"] = "all"
    start: str | None = None  # the clip's first frame: its number, or seconds as 2.5s; if not given, the middle's
    stride: int | None = None  # frames from one of the clip's to the next; if not given, as the weights say
    frames: int | None = None  # of the clip; the weights' own if not given
    size: str | None = None  # of the clip, pixels: SIDE or HEIGHTxWIDTH; the weights' own if not given
    positions: Positions = "fresh"  # for other frames or size: a table of their own, or the weights', interpolated
    # what was predicted in training: auto asks the run's or Hugging Face's config.json
    target: Literal["auto", "normalized", "pixels"] = "auto"
    fps: float | None = None  # of the films; if not given, as in life, but 2 to 8
    seed: int = 0  # of the masks, which are the same for every video
    device: Literal["cpu", "cuda"] | None = None  # cuda where there is one
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"

    def __post_init__(self) -> None:
        check(len(self.videos) > 0, "no video was given")
        check(self.out != "", "out must not be empty")
        check(len(self.ratio) > 0 and len(self.mask) > 0, "ratio and mask must name one at least")
        check(self.frames is None or self.frames >= 1, f"frames must be at least 1; got {self.frames}")
        check(self.stride is None or self.stride >= 1, f"stride must be at least 1; got {self.stride}")
        check(self.fps is None or 0.1 <= self.fps <= 50, f"fps must be 0.1 to 50; got {self.fps}")
        _ = self.wanted_size, self.wanted_start

    @property
    def wanted_size(self) -> tuple[int, int] | None:
        """Height and width."""
        if self.size is None:
            return None
        found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", self.size)
        if found is None:
            raise ValueError(f"size must be SIDE or HEIGHTxWIDTH in pixels; got {self.size}")
        return int(found[1]), int(found[2] or found[1])

    @property
    def wanted_start(self) -> Start | None:
        return None if self.start is None else Start.parse(self.start)


@dataclass(frozen=True)
class Job:
    """All that the work needs; layers and target are those of the weights."""

    config: VisualizeConfig
    model: VideoMAE | Encoder
    target: Target | None
    layers: tuple[Layer, ...]
    query: Query
    sampling: Sampling
    folders: dict[str, Path]  # by video
    precision: str
    name: str  # of the weights

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def key(self) -> int:
        """Of every mask: that of a run's first clip with this seed."""
        return int(mask_keys(self.config.seed, [Sample(0, 0, 0)]))

    @property
    def mask(self) -> masking.Mask:
        """The one under which attention is looked at, if under any."""
        config = self.config
        return masking.make(config.mask[0], self.model.input.grid, config.ratio[0], torch.tensor([self.key]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0 done, 1 a video could not be read or a picture not be written, 2 wrong use, 130
    stopped by Ctrl-C, 143 by SIGTERM."""
    about = "Pictures of what a model reconstructs of videos, and of where it attends."
    config = parse_flags(
        sys.argv[1:] if arguments is None else arguments,
        VisualizeConfig,
        prog=PROG,
        about=about,
        examples=_EXAMPLES,
        own=("attention",),  # layers here, elsewhere what computes it
    )
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with user_errors(PROG):
            refuse_several("it draws a few videos, in one process")
            job = prepare(config)
        codes = [_attempt(job, path) for path in job.folders]
        return max(codes)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, _: object) -> None:
    """Leave, but so that no half-written file stays."""
    raise SystemExit(128 + number)


def _attempt(job: Job, path: str) -> int:
    """Draw one video; the exit code that it is worth. A folder that cannot be written to ends the command."""
    try:
        _visualize(job, path)
    except UnreadableVideo as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if nobody_reads():
            raise
        print(f"{PROG}: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    return 0


def prepare(config: VisualizeConfig) -> Job:
    """Everything that can be refused before a video is looked at. Raises ValueError."""
    folders = _folders(find_named(config.videos)[0], Path(config.out).expanduser())
    source = find_weights(config.weights)
    model, report = model_from(source)
    print(f"weights   {report}")
    is_image = report.format.startswith("image")
    check(not is_image, f"{config.weights} is an image model, which has seen no clips: pictures are of a VideoMAE's")
    known, stated = model.input, model.normalized if isinstance(model, VideoMAE) else None
    model = _shaped(model, config)
    device = pick_device(config.device)
    target = target_of(source, stated, config.target) if isinstance(model, VideoMAE) else None
    why = f"{config.weights} has no decoder, so that nothing can be reconstructed; --attention LAYER shows attention"
    check(target is not None or len(config.attention) > 0, why)
    layers, query = parse_layers(config.attention, model), Query.parse(config.query, model.input.grid)
    if target is not None or config.tokens == "visible":
        for mask, ratio in itertools.product(config.mask, config.ratio):
            masking.counts(mask, model.input.grid, ratio)  # refuses what the grid does not allow
    precision = resolve_precision(config.precision, device)
    sampling, said = _sampling_of(model.input, config, source)
    model, name = model.to(device).eval(), name_of(source)
    job = Job(config, model, target, tuple(layers), query, sampling, folders, precision, name)
    if config.tokens == "visible" and any(layer.part == "encoder" for layer in layers):
        check_query(query, model.input.grid, job.mask)
    _say(job, known, said)
    return job


def _say(job: Job, known: Input, sampling: str) -> None:
    input, target = job.model.input, job.target
    height, width = input.size
    slots, rows, columns = input.grid
    print(f"clip      {input.frames} x {height} x {width}, {slots} x {rows} x {columns} cubes; {sampling}")
    if input.grid != known.grid:
        height, width = known.size
        positions = "one of its own" if job.config.positions == "fresh" else "theirs, interpolated"
        print(f"note      the weights know {known.frames} x {height} x {width}: the position table is {positions}")
    if target is not None:
        print(f"target    {'normalised pixels' if target.normalized else 'pixels'}: {target.source}{target.trained}")
    else:
        print("target    none: these weights have no decoder, so that only attention is drawn")


def _folders(paths: Sequence[str], out: Path) -> dict[str, Path]:
    """A folder for each video, called as the video; numbered from the second of a name on."""
    check(not out.exists() or out.is_dir(), f"--out must be a folder; {out} is a file")
    taken: set[str] = set()
    folders: dict[str, Path] = {}
    for path in paths:
        stem = name = re.sub(r"[@:/]+", "-", Path(path).stem if not is_locator(path) else Path(path).name)
        number = 1
        # folders that do not tell upper from lower case shall hold them as well
        while name.lower() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        folders[path] = out / name
    return folders


def _shaped(model: VideoMAE | Encoder, config: VisualizeConfig) -> VideoMAE | Encoder:
    """The model, or its encoder, with the clip that was asked for; its weights are the same."""
    old = model.input
    size = config.wanted_size or old.size
    input = replace(old, frames=config.frames or old.frames, image_size=size)
    clip = f"a clip of {input.frames:,} x {size[0]:,} x {size[1]:,} has {input.num_cubes:,} cubes"
    check(input.num_cubes <= _MOST_CUBES, f"{clip}; pictures are drawn of up to {_MOST_CUBES:,}")
    if input.grid != old.grid:
        origin = (old.positions_of or old.grid) if config.positions == "interpolate" else None
        input = replace(input, positions_of=origin)
    if input == old:
        return model
    shaped: VideoMAE | Encoder
    if isinstance(model, VideoMAE):
        shaped = VideoMAE(model.encoder.size, input, decoder_depth=len(model.decoder.blocks))
    else:
        shaped = Encoder(model.size, input, final_norm=model.norm is not None)
    own = shaped.state_dict()
    shaped.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in own})
    return shaped


def _sampling_of(input: Input, config: VisualizeConfig, source: str) -> tuple[Sampling, str]:
    """Which frames of a video make the clip, and who says so, in words."""
    if config.stride is not None:
        return Sampling("dense", config.stride), f"stride {config.stride}"
    if input.sampling is None:
        # checkpoints from before it was written into them
        stride = stride_of(source)
        if stride is not None:
            return Sampling("dense", stride), f"stride {stride}, as its run's config.json says"
        return _DEFAULT, f"stride {_DEFAULT.stride} (the weights do not say)"
    if input.sampling.kind == "uniform":
        check(config.start is None, "these weights see clips spread over a whole video: --start needs a --stride")
        return input.sampling, "spread over the whole video, as the weights say"
    return input.sampling, f"stride {input.sampling.stride}, as the weights say"


def _visualize(job: Job, path: str) -> None:
    """Draw one video. Raises UnreadableVideo, ValueError for what the user can mend, OSError."""
    config, model = job.config, job.model
    clip = read_clip(path, model.input, job.sampling, config.wanted_start)
    first, last = clip.moments.frames[0], clip.moments.frames[-1]
    times = f"{clip.moments.seconds[0]:.2f} to {clip.moments.seconds[-1]:.2f} s"
    print(f"\n{path}: frames {first} to {last} of {clip.num_frames}, {times}")
    given, wanted = len(set(clip.moments.frames)), len(clip.moments.frames)
    if given < wanted:
        print(f"  the video is too short for the clip: it gives {given} of the {wanted} frames, the others repeat them")
    folder = job.folders[path]
    title = f"{Path(path).name}, {job.name}"
    if isinstance(model, VideoMAE):
        print(f"  {'mask':8}{'ratio':>6}{'hidden':>18}{'loss':>10}{'mean colours':>16}")
        for kind in dict.fromkeys(config.mask):
            _reconstruct(job, model, clip, kind, folder, title)
    if job.layers:
        _attend(job, clip, folder, title)
    print(f"  {folder}/", flush=True)


def _reconstruct(job: Job, model: VideoMAE, clip: Clip, kind: str, folder: Path, title: str) -> None:
    """One kind of mask: print its losses, write its sheet and its films."""
    config, target = job.config, job.target
    assert target is not None
    guesses: list[Guess] = []
    for ratio in dict.fromkeys(config.ratio):
        one = guess(
            model,
            clip.frames,
            job.key,
            kind=kind,
            ratio=ratio,
            normalized=target.normalized,
            autocast=PRECISIONS[job.precision],
        )
        hidden, cubes = one.counts
        share = f"{hidden:,} of {cubes:,}"
        print(f"  {kind:8}{ratio:>6g}{share:>18}{one.loss:>10.4f}{one.flat:>16.4f}", flush=True)
        guesses.append(one)
    sheet = draw_sheet(guesses, model.input, clip.moments, normalized=target.normalized, title=title)
    write_png(sheet, folder / f"reconstruction-{kind}.png")
    film = draw_film(guesses, clip.moments, normalized=target.normalized, title=title)
    rate = config.fps or _rate_of(clip)
    write_gif(film, folder / f"reconstruction-{kind}.gif", rate=rate)
    write_mp4(film, folder / f"reconstruction-{kind}.mp4", rate=rate)


def _rate_of(clip: Clip) -> float:
    """Frames a second: as in life, where that can be followed."""
    first, last = clip.moments.seconds[0], clip.moments.seconds[-1]
    lived = (len(clip.moments.seconds) - 1) / (last - first) if last > first else _SLOWEST
    return min(max(lived, _SLOWEST), _FASTEST)


def _attend(job: Job, clip: Clip, folder: Path, title: str) -> None:
    config, model = job.config, job.model
    decodes = any(layer.part == "decoder" for layer in job.layers)
    autocast = PRECISIONS[job.precision]
    layers = {part: [layer for layer in job.layers if layer.part == part] for part in ("encoder", "decoder")}
    maps = []
    for part, own in layers.items():
        if own:
            whole = part == "encoder" and config.tokens == "all"
            maps += attention_maps(
                model, clip.frames, own, query=job.query, mask=None if whole else job.mask, autocast=autocast
            )
    seen = _seen(config, has_encoder=bool(layers["encoder"]), decodes=decodes)
    sheet = draw_attention(
        maps,
        clip.frames[0],
        model.input,
        clip.moments,
        query=job.query,
        each_head=config.heads == "each",
        title=title,
        seen=seen,
    )
    write_png(sheet, folder / "attention.png")


def _seen(config: VisualizeConfig, *, has_encoder: bool, decodes: bool) -> str:
    """Which tokens there were, in words."""
    masked = f"{config.mask[0]} mask of ratio {config.ratio[0]:g}"
    parts = []
    if has_encoder:
        visible = f"only the cubes that a {masked} leaves visible"
        parts.append(f"The encoder saw {'the whole clip' if config.tokens == 'all' else visible}.")
    if decodes:
        parts.append(f"The decoder saw all cubes, those hidden by a {masked} as mask tokens.")
    return " ".join(parts)


if __name__ == "__main__":
    run_main(main)
