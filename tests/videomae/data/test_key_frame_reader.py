"""Which frames a clip around a key frame has, read off videos whose frames show their number, and where boxes are after
what training and testing do to them."""

import pickle
from fractions import Fraction

import av
import numpy as np
import pytest
import simplejpeg
import torch
from torch.nn.functional import interpolate

from videomae.data.boxes import enlarged
from videomae.data.dataset import AUGMENT, BOXES, Sample
from videomae.data.decode import UnreadableVideo, Video
from videomae.data.hsv import shift_hsv
from videomae.data.key_frame_reader import (
    KeyFrameReader,
    boxes_in_frame,
    boxes_in_view,
    key_frame_image,
    resized,
    training_view,
)
from videomae.data.key_frames import find_key_frames
from videomae.data.loader import Loader
from videomae.data.sampling import KeyFrameClip
from videomae.keys import Draws

HEIGHT, WIDTH, BITS = 32, 96, 12
PUBLISHED = [-31 + 4 * i for i in range(16)]
OWN = KeyFrameClip(stride=4, rate=25.0, short_side=HEIGHT)
BOX = "0.25,0.25,0.75,0.75"


def numbered(numbers):
    """uint8 [n, HEIGHT, WIDTH, 3]: the bits of each number, as black and white stripes."""
    bits = (np.asarray(numbers)[:, None] >> np.arange(BITS)) & 1
    stripes = np.repeat(bits * 255, WIDTH // BITS, axis=1).astype(np.uint8)
    return np.broadcast_to(stripes[:, None, :, None], (len(stripes), HEIGHT, WIDTH, 3)).copy()


def numbers_in(frames):
    """The numbers that frames show, be they mirrored or not in uint8 [T, h, w, 3]."""
    height, width = frames.shape[1:3]
    middle = frames[:, height // 2, width // BITS // 2 :: width // BITS].mean(-1) > 127
    return (middle @ (1 << np.arange(BITS))).tolist()


def write(path, frames, rate=25, times=None, codec="libx264", **options):
    """times: of presentation, in milliseconds; otherwise frames come at the rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"threads": "1", "preset": "ultrafast", **options} if codec == "libx264" else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def key_frames(folder, *moments, rows=BOX, **options):
    """Key frames of one's own list: (path, second) each."""
    lines = "".join(f"{path},{second},{rows},run\n" for path, second in moments)
    (folder / "train.csv").write_text(f"path,second,x1,y1,x2,y2,label\n{lines}")
    return find_key_frames(folder, **options)


def read_clip(found, clip=OWN, index=0, length=16):
    reader = KeyFrameReader.for_test(found, clip, length)
    out = np.full(reader.shape, 7, dtype=np.uint8)
    spent = reader.read_into(found.videos.paths[index], [Sample(0, index, 0)], [out])
    assert spent.total > 0
    return out


def by_hand(before, after, length=16, stride=4):
    """H.2 on `before` frames before the key frame and `after` from it on: offsets from the key frame."""
    half = min(before, after)
    indices = range(2 * half)
    start = (len(indices) - length * stride) // 2 + (stride - 1) // 2
    return [max(0, min(start + stride * i, len(indices) - 1)) - half for i in range(length)]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Of five seconds each, at several rates; and one of uneven times, which does not begin at 0."""
    folder = tmp_path_factory.mktemp("films")
    for rate in (24, 25, 30):
        write(folder / f"{rate}.mp4", numbered(range(5 * rate)), rate)
    write(folder / "25.avi", numbered(range(125)), 25, codec="mpeg4")
    rng = np.random.default_rng(0)
    times = 1500 + np.cumsum(rng.integers(10, 90, 110))
    write(folder / "uneven.mkv", numbered(range(110)), 25, times.tolist())
    np.save(folder / "times.npy", (times - times[0]) / 1000)
    return folder


def at_rate(seconds, offsets, times):
    """The nearest own frame to each moment, by looking at all."""
    return [int(np.argmin(np.abs(np.asarray(times) - (seconds + offset / 25)))) for offset in offsets]


@pytest.mark.parametrize("name", ["25.mp4", "25.avi"])
def test_clips_of_the_published_rate_have_the_published_frames(films, name):
    found = key_frames(films, (name, 2), (name, 0.4), (name, 4.6), (name, 1.16))
    assert numbers_in(read_clip(found, index=found.seconds.tolist().index(2))) == [50 + o for o in PUBLISHED]
    # at the ends, both sides are as long as the shorter one
    assert by_hand(10, 115) == [-10] * 6 + [-7, -3, 1, 5] + [9] * 6
    assert numbers_in(read_clip(found, index=0)) == [10 + o for o in by_hand(10, 115)]
    assert numbers_in(read_clip(found, index=3)) == [115 + o for o in by_hand(115, 10)]
    # 1.16 * 25 is a little less than 29 as a binary number
    assert numbers_in(read_clip(found, index=1)) == [29 + o for o in by_hand(29, 96)]


@pytest.mark.parametrize("rate", [24, 30])
def test_films_of_another_rate_are_seen_at_25_frames_a_second(films, rate):
    found = key_frames(films, (f"{rate}.mp4", 2.5), (f"{rate}.mp4", 1))
    times = np.arange(5 * rate) / rate
    assert numbers_in(read_clip(found, index=1)) == at_rate(2.5, PUBLISHED, times)
    assert numbers_in(read_clip(found, index=0)) == at_rate(1, by_hand(25, 100), times)
    assert numbers_in(read_clip(found, KeyFrameClip(2, None, HEIGHT), 1, 8)) == [
        int(2.5 * rate) + o for o in by_hand(60, 60, 8, 2)
    ]


def test_uneven_times_are_counted_from_the_first_frame(films):
    times = np.load(films / "times.npy")
    second = 2.2
    found = key_frames(films, ("uneven.mkv", second))
    assert numbers_in(read_clip(found)) == at_rate(second, PUBLISHED, times)
    video = Video(films / "uneven.mkv")
    assert video.duration == pytest.approx(times[-1], abs=0.1)
    for moment in (-1.0, 0.0, 0.05, 1.234, 3.9, 99.0):
        assert video.at(moment) == int(np.argmin(np.abs(times - moment)))
    reader = KeyFrameReader.for_test(found, OWN, 16)
    image = key_frame_image(reader, found.videos.paths[0], 0)
    assert numbers_in(image[None]) == at_rate(second, [0], times)


def test_without_times_the_rate_says_which_frame_it_is(films):
    video = Video(films / "25.avi")
    assert [video.at(t) for t in (-1, 0, 0.019, 0.021, 2, 4.99, 9)] == [0, 0, 0, 1, 50, 124, 124]
    assert video.duration == pytest.approx(5)


def test_a_film_may_begin_at_any_second(films):
    found = key_frames(films, ("25.mp4", 902), starts_at=900)
    assert numbers_in(read_clip(found)) == [50 + o for o in PUBLISHED]
    image = key_frame_image(KeyFrameReader.for_test(found, OWN, 16), found.videos.paths[0], 0)
    assert numbers_in(image[None]) == [50]


@pytest.fixture
def seconds(tmp_path):
    """Clips of a second of a movie, 25 frames each, from 900 to 906, showing 25 * (second - 900) + k; one has 24."""
    for second in range(900, 907):
        count = 24 if second == 903 else 25
        write(tmp_path / "m" / f"{second}.mp4", numbered(25 * (second - 900) + np.arange(count)))
    return tmp_path


def shown(second):
    return list(range(25 * (second - 900), 25 * (second - 900) + (24 if second == 903 else 25)))


def test_one_second_clips_are_joined_around_the_first_frame(seconds):
    found = key_frames(seconds, ("m", 902), ("m", 904))
    frames = shown(900) + shown(901) + shown(902) + shown(903)
    assert numbers_in(read_clip(found, index=0)) == [frames[50 + o] for o in PUBLISHED]
    # 903 is a frame short, and so 49 frames are before 904
    frames = shown(902) + shown(903) + shown(904) + shown(905)
    assert numbers_in(read_clip(found, index=1)) == [frames[49 + o] for o in PUBLISHED]
    image = key_frame_image(KeyFrameReader.for_test(found, OWN, 16), found.videos.paths[0], 1)
    assert numbers_in(image[None]) == [100]


@pytest.mark.parametrize(("gone", "before", "after"), [(901, 0, 50), (900, 25, 50), (903, 50, 25)])
def test_a_missing_second_ends_its_side(seconds, gone, before, after):
    (seconds / "m" / f"{gone}.mp4").unlink()
    found = key_frames(seconds, ("m", 902))
    assert numbers_in(read_clip(found)) == [50 + o for o in by_hand(before, after)]


def test_one_second_clips_of_another_rate_are_seen_at_25(tmp_path):
    for second in (9, 10):
        write(tmp_path / "m" / f"{second:04d}.mp4", numbered(100 * second + np.arange(30)), 30)
    found = key_frames(tmp_path, ("m", 10))
    seen = at_rate(0, range(25), np.arange(30) / 30)
    frames = [900 + n for n in seen] + [1000 + n for n in seen]
    assert numbers_in(read_clip(found)) == [frames[25 + o] for o in by_hand(25, 25)]
    frames = [*range(900, 930), *range(1000, 1030)]
    own = KeyFrameClip(4, None, HEIGHT)
    assert numbers_in(read_clip(found, own)) == [frames[30 + o] for o in by_hand(30, 30)]


@pytest.mark.parametrize("name", ["m_{:06d}.jpg", "{:03d}a.jpg"], ids=["counted", "listed"])
def test_frames_of_a_folder_come_in_the_order_of_their_names(tmp_path, name):
    (tmp_path / "m").mkdir()
    for number, image in enumerate(numbered(range(120))):
        (tmp_path / "m" / name.format(number + 1)).write_bytes(simplejpeg.encode_jpeg(image, 95))
    found = key_frames(tmp_path, ("m", 902), starts_at=900)
    assert numbers_in(read_clip(found)) == at_rate(2, PUBLISHED, np.arange(120) / 30)
    slow = key_frames(tmp_path, ("m", 904), starts_at=900, frames_rate=15)
    assert numbers_in(read_clip(slow)) == at_rate(4, PUBLISHED, np.arange(120) / 15)
    image = key_frame_image(KeyFrameReader.for_test(found, OWN, 16), found.videos.paths[0], 0)
    assert numbers_in(image[None]) == [60]
    (tmp_path / "m" / name.format(62)).write_bytes(b"\xff\xd8 no more")
    with pytest.raises(UnreadableVideo, match=f"{name.format(62)}: damaged"):
        read_clip(found)


def test_each_frame_is_decoded_once_for_all_views(films, monkeypatch):
    found = key_frames(films, ("25.mp4", 0.4))
    reader = KeyFrameReader.for_training(found, OWN, 16, (24, 24), 0)
    asked = []
    original = Video.read
    monkeypatch.setattr(Video, "read", lambda self, n, **how: asked.append(list(n)) or original(self, n, **how))
    out = [np.empty(reader.shape, np.uint8) for _ in range(3)]
    reader.read_into(found.videos.paths[0], [Sample(0, 0, view) for view in range(3)], out)
    assert asked == [sorted({10 + o for o in by_hand(10, 115)})]
    assert not np.array_equal(out[0], out[1])


def test_a_test_sees_whole_frames_in_the_corner_of_the_largest(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"wide": (40, 70), "upright": (90, 50)}
    for name, size in sizes.items():
        images = rng.integers(0, 256, (6, *size, 3), dtype=np.uint8)
        write(tmp_path / f"{name}.mkv", images, codec="ffv1")
        np.save(tmp_path / f"{name}.npy", images)
    found = key_frames(tmp_path, ("wide.mkv", 0.12), ("upright.mkv", 0.12))
    clip = KeyFrameClip(1, None, 20)
    assert KeyFrameReader.for_test(found, clip, 4).shape == (4, 36, 35, 3)
    for index, name in enumerate(found.names):
        height, width = resized(*sizes[name[:-4]], 20)
        assert (height, width) == {"wide.mkv": (20, 35), "upright.mkv": (36, 20)}[name]
        out = read_clip(found, clip, index, 4)
        numbers = [3 + o for o in by_hand(3, 3, 4, 1)]
        planes = torch.from_numpy(np.load(tmp_path / f"{name[:-4]}.npy")[numbers]).permute(0, 3, 1, 2).float()
        exact = interpolate(planes, size=(height, width), mode="bilinear", align_corners=False)
        assert np.abs(out[:, :height, :width] - exact.permute(0, 2, 3, 1).numpy()).max() <= 1.01
        assert not out[:, height:].any()
        assert not out[:, :, width:].any()


@pytest.mark.parametrize(("height", "width"), [(360, 480), (1080, 1920), (256, 455), (853, 480), (241, 429)])
def test_the_long_side_is_rounded_down(height, width):
    short = min(height, width)
    wanted = tuple(256 if side == short else int(256 * side / short) for side in (height, width))
    assert resized(height, width, 256) == wanted


def rectangle(folder, height, width, box):
    """A white box on black in fractions of the frame, lossless."""
    x1, y1, x2, y2 = (round(side * length) for side, length in zip(box, (width, height) * 2, strict=True))
    frames = np.zeros((8, height, width, 3), np.uint8)
    frames[:, y1:y2, x1:x2] = 255
    return write(folder / "box.mkv", frames, codec="ffv1")


def extent(image):
    """Where an image is rather white than black: x1, y1, x2, y2, inclusive."""
    y, x = np.nonzero(image[..., 0] > 127)
    return np.array([x.min(), y.min(), x.max(), y.max()])


@pytest.mark.parametrize(("height", "width"), [(120, 160), (150, 100), (72, 128)])
def test_boxes_are_where_their_pixels_are(tmp_path, height, width):
    box = (0.25, 0.4, 0.75, 0.6) if width > height else (0.3, 0.4, 0.7, 0.6)
    rectangle(tmp_path, height, width, box)
    found = key_frames(tmp_path, ("box.mkv", 0.16), rows=",".join(map(str, box)))
    clip, size, flips = KeyFrameClip(1, None, 96), (88, 80), set()
    reader = KeyFrameReader.for_training(found, clip, 4, size, 5, colour=False)
    for epoch in range(12):
        sample = Sample(epoch, 0, 1)
        out = np.empty(reader.shape, np.uint8)
        reader.read_into(found.videos.paths[0], [sample], [out])
        view = training_view(height, width, 96, size, True, Draws(5, *sample, AUGMENT))
        flips.add(view.flip)
        boxes = boxes_in_view(found.boxes_of(0), height, width, view, size)
        assert boxes.shape == (1, 4)
        assert np.abs(extent(out[0]) - boxes[0]).max() <= 1
    assert flips == {True, False}
    whole = resized(height, width, 96)
    seen = extent(read_clip(found, clip, length=4)[0])
    # published boxes lose a pixel before they grow with the frame, and so are up to one too small
    np.testing.assert_allclose(
        boxes_in_frame(found.boxes_of(0), height, width, 96), enlarged(seen[None], *whole), rtol=0, atol=1.2
    )


def test_a_view_is_resized_cropped_coloured_and_mirrored(films):
    found = key_frames(films, ("25.mp4", 2))
    clip, size = KeyFrameClip(4, 25.0, 40), (24, 32)
    reader = KeyFrameReader.for_training(found, clip, 16, size, 9)
    frames = Video(films / "25.mp4").read([50 + o for o in PUBLISHED])
    planes = interpolate(torch.from_numpy(frames).permute(0, 3, 1, 2), size=(40, 120), mode="bilinear")
    whole = planes.permute(0, 2, 3, 1).numpy()
    flips = 0
    for view in range(6):
        out = np.empty(reader.shape, np.uint8)
        reader.read_into(found.videos.paths[0], [Sample(3, 0, view)], [out])
        made = training_view(HEIGHT, WIDTH, 40, size, True, Draws(9, 3, 0, view, AUGMENT))
        cut = shift_hsv(whole[:, made.top : made.top + 24, made.left : made.left + 32], made.colour)
        assert np.array_equal(out, cut[:, :, ::-1] if made.flip else cut)
        flips += made.flip
        plain = KeyFrameReader.for_training(found, clip, 16, size, 9, flip=False, colour=False)
        plain.read_into(found.videos.paths[0], [Sample(3, 0, view)], [out])
        assert np.array_equal(out, whole[:, made.top : made.top + 24, made.left : made.left + 32])
    assert 0 < flips < 6


def test_crops_lie_anywhere():
    views = [training_view(30, 40, 30, (28, 36), True, Draws(n)) for n in range(600)]
    counts = np.zeros((3, 5), int)
    for view in views:
        counts[view.top, view.left] += 1
    assert counts.min() > 20
    assert 240 < sum(view.flip for view in views) < 360
    assert not any(training_view(30, 40, 30, (28, 36), False, Draws(n)).flip for n in range(20))
    with pytest.raises(ValueError, match=r"no crop of \(31, 31\) fits in frames resized to \(30, 40\)"):
        training_view(30, 40, 30, (31, 31), True, Draws(0))
    assert len({AUGMENT, BOXES}) == 2


def test_frames_of_another_size_than_the_first_are_refused(seconds):
    found = key_frames(seconds, ("m", 902))
    for second in range(900, 907):
        write(seconds / "m" / f"{second}.mp4", np.zeros((25, 48, 64, 3), np.uint8))
    with pytest.raises(UnreadableVideo, match="m: its frames are 64x48, where the first of this video is 96x32"):
        read_clip(found)
    write(seconds / "m" / "902.mp4", numbered(range(25)))
    with pytest.raises(UnreadableVideo, match="m: its clips have different sizes"):
        read_clip(found)


def test_what_has_gone_since_is_unreadable(seconds, films):
    found = key_frames(seconds, ("m", 902))
    (seconds / "m" / "902.mp4").unlink()
    with pytest.raises(UnreadableVideo, match="m: neither a clip of the second nor a JPEG file in it"):
        read_clip(found)
    found = key_frames(films, ("25.mp4", 4.5))
    reader = KeyFrameReader.for_test(found, OWN, 16)
    # the file was replaced by a shorter one
    short = write(films / "short" / "25.mp4", numbered(range(100)))
    with pytest.raises(UnreadableVideo, match=r"25\.mp4: it is 4 seconds long; the key frame would be at 4\.5"):
        reader.read_into(str(short), [Sample(0, 0, 0)], [np.empty(reader.shape, np.uint8)])


def test_refuses_crops_that_are_larger_than_frames(films):
    found = key_frames(films, ("25.mp4", 2))
    with pytest.raises(ValueError, match=r"crops of \(33, 24\) do not fit in frames of a short side 32"):
        KeyFrameReader.for_training(found, OWN, 16, (33, 24), 0)


def test_a_reader_is_small_and_comes_through_a_pickle(films):
    found = key_frames(films, ("25.mp4", 2), ("30.mp4", 2))
    reader = KeyFrameReader.for_training(found, OWN, 16, (24, 24), 4)
    many = KeyFrameReader.for_training(found, OWN, 16, (24, 24), 4)
    object.__setattr__(many, "seconds", np.zeros(200_000))
    object.__setattr__(many, "sizes", np.zeros((200_000, 2), np.int32))
    assert len(pickle.dumps(many)) < 200_000 * 16 + 2000
    out = [np.empty(reader.shape, np.uint8) for _ in range(2)]
    for one, made in zip((reader, pickle.loads(pickle.dumps(reader))), out, strict=True):
        one.read_into(found.videos.paths[1], [Sample(0, 1, 0)], [made])
    assert np.array_equal(*out)


def test_a_loader_reads_key_frames_by_their_number(films):
    found = key_frames(films, ("25.mp4", 2), ("25.mp4", 3), ("30.mp4", 2))
    reader = KeyFrameReader.for_test(found, OWN, 16)
    batches = [[Sample(0, 2, 0), Sample(0, 0, 0)], [Sample(0, 1, 0)]]
    with Loader(reader, found.videos.paths, batches, batch_size=2, workers=0) as loader:
        read = [batch.frames.numpy().copy() for batch in loader]
    for frames, batch in zip(read, batches, strict=True):
        for clip, sample in zip(frames, batch, strict=True):
            assert np.array_equal(clip, read_clip(found, index=sample.index))
