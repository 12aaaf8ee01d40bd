"""torchcodec's adapter: against a stand-in with its signature, decoding by PyAV, and against the package where it is
installed."""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import av
import numpy as np
import pytest
import torch

from tests.videos import moving_frames, write_video
from videomae.data import torchcodec_reader
from videomae.data.decode import UnreadableVideo, Video
from videomae.data.torchcodec_reader import check_parity, open_torchcodec, parity, suits_torchcodec


@dataclass
class FrameBatch:
    data: torch.Tensor
    pts_seconds: torch.Tensor
    duration_seconds: torch.Tensor


class VideoDecoder:
    """torchcodec's decoder as 0.12 to 0.17 document it, as far as the adapter goes, and with the errors they raise."""

    def __init__(
        self,
        source,
        *,
        stream_index=None,
        dimension_order="NCHW",
        num_ffmpeg_threads=1,
        device=None,
        seek_mode="exact",
        transforms=None,
        output_dtype=torch.uint8,
        custom_frame_mappings=None,
    ):
        self.asked = {"order": dimension_order, "threads": num_ffmpeg_threads, "device": device, "mode": seek_mode}
        try:
            with av.open(source) as container:
                frames = [
                    (f.time, np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90))
                    for f in container.decode(video=0)
                ]
        except (av.FFmpegError, OSError) as error:
            raise RuntimeError(
                f"SingleStreamDecoder, /build/_core/SingleStreamDecoder.cpp:52, Could not open input file: {source}\n"
                "Exception raised from SingleStreamDecoder"
            ) from error
        self._times, self._images = zip(*frames, strict=True)
        self._order = dimension_order
        self.metadata = SimpleNamespace(num_frames=len(frames), rotation=None)

    def get_frames_at(self, indices):
        for i in indices:
            if i >= len(self._times):
                raise IndexError(f"Invalid frame index={i} for streamIndex=0; must be less than {len(self._times)}")
        data = torch.stack([self._shown(self._images[i]) for i in indices])
        times = torch.tensor([self._times[i] for i in indices], dtype=torch.float64)
        return FrameBatch(data, times, torch.full_like(times, 0.04))

    def _shown(self, image):
        image = torch.from_numpy(np.ascontiguousarray(image))
        return image if self._order == "NHWC" else image.permute(2, 0, 1)


def install(monkeypatch, decoder=VideoDecoder, **attributes):
    """Make `import torchcodec` find the stand-in."""
    package, decoders = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    package.ffmpeg_major_version = 7
    vars(package).update(attributes, decoders=decoders)
    decoders.VideoDecoder = decoder
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)


@pytest.fixture
def path(tmp_path):
    """x264's default has B-frames: stored in another order than shown."""
    return str(write_video(tmp_path / "a.mp4", moving_frames(30)))


@pytest.fixture
def stand_in(monkeypatch):
    install(monkeypatch)


def test_gives_the_ordinary_readers_frames(stand_in, path):
    video = Video(path)
    reader = open_torchcodec(path, len(video))
    numbers = np.array([7, 0, 29, 7])
    frames = reader.read(numbers)
    assert frames.shape == (4, 48, 64, 3)
    assert frames.dtype == np.uint8
    assert frames.flags.c_contiguous
    assert np.array_equal(frames, video.read(list(numbers)))
    assert np.array_equal(np.stack(list(reader.stream())), video.read(range(30)))
    assert reader.backend == "torchcodec"
    assert reader._decoder.asked == {"order": "NHWC", "threads": 1, "device": "cpu", "mode": "exact"}
    assert parity(path) == 0
    assert check_parity([path]) == 0


def test_names_the_gpus_decoder_and_refuses_it_without_a_gpu(stand_in, path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reader = open_torchcodec(path, 30, "cuda:0")
    assert reader.backend == "torchcodec-cuda"
    assert reader._decoder.asked["device"] == "cuda:0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="should decode on cuda, and there is no GPU"):
        open_torchcodec(path, 30, "cuda")
    with pytest.raises(ValueError, match="on cpu or cuda; got mps"):
        open_torchcodec(path, 30, "mps")


def test_what_cannot_be_read_is_an_unreadable_video(stand_in, path, tmp_path, monkeypatch):
    with pytest.raises(UnreadableVideo, match="counts 30 frames, its packets 31"):
        open_torchcodec(path, 31)
    with pytest.raises(UnreadableVideo, match="no such file"):
        open_torchcodec(str(tmp_path / "none.mp4"), 1)
    reader = open_torchcodec(path, 30)
    with pytest.raises(UnreadableVideo, match=f"{path}: torchcodec: Invalid frame index=30"):
        reader.read([30])
    monkeypatch.setattr(torchcodec_reader, "_unsuited", lambda path: None)
    (tmp_path / "text.mp4").write_text("no video" * 100)
    with pytest.raises(UnreadableVideo) as caught:
        open_torchcodec(str(tmp_path / "text.mp4"), 1)
    assert caught.value.reason == f"torchcodec: Could not open input file: {tmp_path}/text.mp4"


def test_another_frame_in_the_place_of_the_one_asked_for_is_refused(path, monkeypatch):
    class Shifted(VideoDecoder):
        def get_frames_at(self, indices):
            return super().get_frames_at([min(i + 1, 29) for i in indices])

    install(monkeypatch, Shifted)
    with pytest.raises(UnreadableVideo, match=r"gives the frame of 0\.2000 s for frame 4, which is shown at 0\.1600"):
        open_torchcodec(path, 30).read([4])


@pytest.mark.parametrize("error", [torch.AcceleratorError("illegal access"), torch.OutOfMemoryError("full")])
def test_a_failing_gpu_is_no_unreadable_video(path, monkeypatch, error):
    class Failing(VideoDecoder):
        def get_frames_at(self, indices):
            raise error

    install(monkeypatch, Failing)
    with pytest.raises(type(error)):
        open_torchcodec(path, 30).read([0])


@pytest.mark.parametrize(("off", "refused"), [(1, False), (2, False), (3, True)])
def test_parity_refuses_a_decoder_whose_pixels_are_off(path, monkeypatch, off, refused):
    class Off(VideoDecoder):
        def _shown(self, image):
            # up where there is room, else down: every value differs by off
            return super()._shown(np.where(image < 128, image + off, image - off).astype(np.uint8))

    install(monkeypatch, Off)
    assert parity(path) == off
    if refused:
        with pytest.raises(ValueError, match=rf"differs .* by 3\.0 grey levels on average in {path}; at most 2 are"):
            check_parity([path])
    else:
        assert check_parity([path]) == off


def test_parity_refuses_frames_of_another_shape(path, monkeypatch):
    class Lying(VideoDecoder):
        def _shown(self, image):
            return super()._shown(np.rot90(image))

    install(monkeypatch, Lying)
    with pytest.raises(ValueError, match=r"the shape \(16, 64, 48, 3\), others \(16, 48, 64, 3\)"):
        check_parity([path])


def test_parity_takes_the_first_of_five_that_can_be_read(stand_in, path, tmp_path):
    missing = [str(tmp_path / f"{i}.mp4") for i in range(5)]
    assert check_parity([*missing[:4], path]) == 0
    with pytest.raises(ValueError, match=r"none of the first 5 videos: .*0\.mp4: no such file; .*4\.mp4: no such file"):
        check_parity([*missing, path])
    with pytest.raises(ValueError, match="no video to compare"):
        check_parity([])


def test_parity_reads_all_of_a_short_file(stand_in, tmp_path):
    assert parity(str(write_video(tmp_path / "short.mp4", moving_frames(3)))) == 0


@pytest.mark.parametrize(
    "error", [None, OSError("libnvrtc.so.13: no such file"), RuntimeError("Could not load\n1. ...")]
)
def test_says_how_to_install_torchcodec(path, monkeypatch, error):
    class Broken:
        """Finds torchcodec, whose import then raises."""

        def find_spec(self, name, *_):
            if name == "torchcodec":
                raise error

    monkeypatch.delitem(sys.modules, "torchcodec", raising=False)
    if error is None:
        monkeypatch.setitem(sys.modules, "torchcodec", None)
    else:
        monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(
        ValueError, match=r"does not load \(.*\): pip install 'videomae-engine\[torchcodec\]'"
    ) as caught:
        check_parity([path])
    assert "\n" not in str(caught.value)


def test_says_that_ffmpeg_or_rotation_is_missing(path, monkeypatch):
    install(monkeypatch, ffmpeg_major_version=None)
    with pytest.raises(ValueError, match="finds no FFmpeg: pip install"):
        open_torchcodec(path, 30)

    class Old(VideoDecoder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            del self.metadata.rotation

    install(monkeypatch, Old)
    with pytest.raises(ValueError, match=r"older than 0\.11"):
        open_torchcodec(path, 30)


def test_leaves_files_that_it_would_number_wrongly(stand_in, clips, hard):
    for odd in (clips / "test_mpeg4.avi", hard / "discard_first_keyframe.mp4"):
        assert not suits_torchcodec(str(odd))
        with pytest.raises(UnreadableVideo, match="presentation times|edit list"):
            open_torchcodec(str(odd), len(Video(odd)))
    for fine in (clips / "arm_wrestling.mp4", hard / "unordered.mov", hard / "nasa_13013_rotated.mp4"):
        assert suits_torchcodec(str(fine))


@pytest.fixture
def real():
    """The package itself."""
    try:
        torchcodec_reader._decoder_class()
    except ValueError as error:
        pytest.skip(str(error))


def test_the_package_itself_reads_what_the_ordinary_reader_does(real, path, tmp_path):
    video = Video(path)
    reader = open_torchcodec(path, len(video))
    numbers = np.array([7, 0, 29, 7])
    assert np.array_equal(reader.read(numbers), video.read(list(numbers)))
    assert np.array_equal(np.stack(list(reader.stream())), video.read(range(30)))
    assert check_parity([path]) == 0
    with pytest.raises(UnreadableVideo, match="torchcodec: Invalid frame index=30"):
        reader.read([30])


@pytest.mark.long
def test_the_package_itself_agrees_on_real_videos(real, clips, hard):
    seen = 0
    for file in [*sorted(clips.iterdir()), *sorted(hard.iterdir())]:
        if file.name != "corrupted.mp4" and suits_torchcodec(str(file)):
            assert parity(str(file)) == 0, file
            seen += 1
    assert seen == 13


def test_the_package_itself_names_what_it_cannot_read(real, hard, monkeypatch):
    with pytest.raises(UnreadableVideo, match="torchcodec: .*Invalid data"):
        open_torchcodec(str(hard / "corrupted.mp4"), 50).read(range(50))
    monkeypatch.setattr(torchcodec_reader, "_unsuited", lambda path: None)
    with pytest.raises(UnreadableVideo, match=r"torchcodec gives the frame of 0\.2000 s for frame 0"):
        open_torchcodec(str(hard / "discard_first_keyframe.mp4"), 25).read([0])
    with pytest.raises(UnreadableVideo, match="counts 50 frames, its packets 51"):
        open_torchcodec(str(hard / "corrupted.mp4"), 51)
