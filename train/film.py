"""Frames to a moving picture: a GIF of one palette that does not flicker, and an H.264 MP4 that every player shows."""

from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Colorspace
from PIL import Image

from kernels.launch import check
from videomae.data.decode import ONE_THREAD
from videomae.weight_files import write_atomically

# colours that are always there: of paper, letters and hidden cubes
_KEPT = ((255, 255, 255), (0, 0, 0), (128, 128, 128))
_BAYER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) - 7
_BT709 = 1  # in a stream's colour fields
_LOOKED_AT = 8  # frames, for the palette
_FINEST = 5  # bits of a channel, for counting colours
_SAME = 4  # steps of a channel that are not seen
_EXACT = 40  # colours that most of a film has: flat ones shall stay flat


def write_gif(frames: np.ndarray, path: Path, *, rate: float) -> None:
    """Write uint8 [T, h, w, 3], which repeats for ever, at rate frames a second (a GIF counts in hundredths of a
    second, and browsers slow down below two of them). Frames that are equal become one that stays as long."""
    _check(frames, rate)
    palette = _palette(frames)
    images = [_quantized(frame, palette) for frame in frames]
    marks = [round(100 * i / rate) for i in range(len(frames) + 1)]
    durations = [10 * max(after - before, 2) for before, after in zip(marks, marks[1:], strict=False)]

    def write(file: Path) -> None:
        images[0].save(
            file, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=False, disposal=1
        )

    write_atomically(path, write)


def write_mp4(frames: np.ndarray, path: Path, *, rate: float) -> None:
    """Write uint8 [T, h, w, 3] at rate frames a second; an odd side gets a white line. ValueError where PyAV lacks the
    encoder."""
    _check(frames, rate)
    check("libx264" in av.codecs_available, "this build of PyAV has no libx264: install PyAV from its wheel")
    write_atomically(path, partial(_encode, _even(frames), Fraction(rate).limit_denominator(1000)))


def _check(frames: np.ndarray, rate: float) -> None:
    fits = frames.ndim == 4 and frames.shape[3] == 3 and frames.dtype == np.uint8 and len(frames) > 0
    check(fits, f"a film is of frames uint8 [T, h, w, 3]; got {frames.dtype} {frames.shape}")
    check(rate > 0, f"a film's rate must be positive; got {rate}")


def _even(frames: np.ndarray) -> np.ndarray:
    height, width = frames.shape[1:3]
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), constant_values=255)


def _encode(frames: np.ndarray, rate: Fraction, path: Path) -> None:
    options = {"crf": "12", "preset": "medium", "threads": "1"}
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        # what browsers and phones decode; colours are kept at half the size, so small pictures are enlarged before
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = 1  # 16 to 235, as players expect
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            encoded = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, **ONE_THREAD)
            container.mux(stream.encode(encoded))
        container.mux(stream.encode())


def _palette(frames: np.ndarray) -> Image.Image:
    """256 colours for all frames; how much of the film has a colour counts by its root, or paper would take most."""
    frames = frames[:: -(-len(frames) // _LOOKED_AT)]
    rough = (frames >> (8 - _FINEST)).reshape(-1, 3).astype(np.int64)
    codes = (rough[:, 0] << 2 * _FINEST) + (rough[:, 1] << _FINEST) + rough[:, 2]
    numbers = np.bincount(codes, minlength=1 << 3 * _FINEST)
    found = numbers.nonzero()[0]
    # the mean of what is counted as one colour
    sums = [np.bincount(codes, frames[..., c].reshape(-1), len(numbers))[found] for c in range(3)]
    colours = np.stack(sums, axis=-1) / numbers[found, None]
    colours = colours.round().astype(np.uint8)
    exact = colours[np.argsort(-numbers[found], kind="stable")[:_EXACT]]
    pixels = np.repeat(colours, np.ceil(np.sqrt(numbers[found])).astype(int), axis=0)
    others = 256 - len(_KEPT) - len(exact)
    chosen = Image.fromarray(pixels[None]).quantize(others, kmeans=1).getpalette() or []
    made = Image.new("P", (1, 1))
    made.putpalette([*(int(x) for x in np.ravel(_KEPT)), *(int(x) for x in exact.ravel()), *chosen[: 3 * others]])
    return made


def _quantized(frame: np.ndarray, palette: Image.Image) -> Image.Image:
    """The frame in the palette's colours. What has none of them is dithered by a pattern that does not move, unlike the
    usual diffusion of errors, so that what stands still stays as it is."""
    plain = _nearest(frame, palette)
    height, width = frame.shape[:2]
    pattern = np.tile(_BAYER, (height // 4 + 1, width // 4 + 1))[:height, :width, None]
    dithered = _nearest((frame.astype(np.int16) + pattern).clip(0, 255).astype(np.uint8), palette)
    error = np.abs(np.asarray(plain.convert("RGB")).astype(np.int16) - frame).max(axis=2)
    image = Image.fromarray(np.where(error <= _SAME, np.asarray(plain), np.asarray(dithered)), "P")
    image.putpalette(palette.getpalette() or [])
    return image


def _nearest(frame: np.ndarray, palette: Image.Image) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(frame)).quantize(palette=palette, dither=Image.Dither.NONE)


def write_png(image: np.ndarray, path: Path) -> None:
    """Write uint8 [h, w, 3]."""
    write_atomically(path, lambda file: Image.fromarray(image).save(file, "PNG", optimize=True))
