"""Small videos made on the spot."""

from pathlib import Path

import av
import numpy as np


def write_video(
    path: Path, frames: np.ndarray, *, codec: str = "libx264", pix_fmt: str = "yuv420p", gop: int = 12, **options: str
) -> Path:
    """Encode uint8 [T, h, w, 3] at 25 frames a second; options go to the encoder."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"threads": "1", **options})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = frames.shape[2], frames.shape[1], pix_fmt, gop
        for image in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def moving_frames(num: int, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """uint8 [num, height, width, 3]: a gradient with a bright square that moves, so that every frame differs from every
    other."""
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 2 % 256, y * 3 % 256, (x + y + seed * 17) % 256], axis=-1).astype(np.uint8)
    out = np.repeat(base[None], num, axis=0)
    for t in range(num):
        top, left = (t * 3 + seed) % (height - 12), (t * 5) % (width - 12)
        out[t, top : top + 12, left : left + 12] = (255, (t * 11) % 256, 0)
    return out


def write_videos(folder: Path, count: int) -> Path:
    """A new folder of so many small videos of 14 frames, each of another seed."""
    folder.mkdir()
    for i in range(count):
        write_video(folder / f"{i}.mp4", moving_frames(14, 24, 32, seed=i))
    return folder
