"""What a video file's header says of it, beside what `Video` knows."""

from pathlib import Path
from typing import NamedTuple

import av

from videomae.data.decode import UnreadableVideo


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
            seconds = None
            if stream.duration and stream.time_base:
                seconds = float(stream.duration * stream.time_base)
            elif container.duration:
                seconds = container.duration / 1e6
            # PyAV 14 only knows the decoder's own name, such as libdav1d
            return Facts(getattr(codec, "canonical_name", codec.name), seconds)
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UnreadableVideo(path, reason) from error
