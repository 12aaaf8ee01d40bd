"""What a video file's header and its first frame say of it, beside what `Video` knows."""

from pathlib import Path
from typing import NamedTuple

import av

from videomae.data.decode import UnreadableVideo, Video


class Facts(NamedTuple):
    """codec: its usual name (h264, hevc, av1), whichever library decodes it. seconds: how long the header says the
    video is, even if the file was cut off since; None where it does not say."""

    codec: str
    seconds: float | None


def facts(path: str | Path) -> Facts:
    """The facts of a file's first video stream, in 1 to 3 ms. Raises UnreadableVideo.

    Frames, rate, height and width are `Video`'s: a header counts frames that are not shown, and sizes before rotation.
    """
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise UnreadableVideo(path, "no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise UnreadableVideo(path, "its codec is not known here")
            codec = stream.codec_context.codec
            # PyAV 14 only knows the decoder's own name, such as libdav1d
            return Facts(getattr(codec, "canonical_name", codec.name), _seconds(container))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UnreadableVideo(path, _reason(error)) from error


def first_frame(path: str | Path) -> tuple[int, int, float | None]:
    """Height and width of a file's first frame, upright, and the seconds of its header: of a film of gigabytes, the
    beginning is read. Raises UnreadableVideo."""
    if "::" in str(path):
        video = Video(path)  # of a prepared set, which says what it has
        height, width = video.read([0]).shape[1:3]
        return height, width, video.duration
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            # one thread, as one frame is wanted
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise UnreadableVideo(path, "its codec is not known here")
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            for frame in container.decode(stream):
                turned = frame.rotation % 180 != 0
                height, width = (frame.width, frame.height) if turned else (frame.height, frame.width)
                return height, width, _seconds(container)
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise UnreadableVideo(path, _reason(error)) from error
    raise UnreadableVideo(path, "no video frames")


def _seconds(container: "av.container.InputContainer") -> float | None:
    stream = container.streams.video[0]
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration else None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
