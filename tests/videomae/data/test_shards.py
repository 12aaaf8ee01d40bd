"""Prepared sets: every frame by its source's number, whatever the codec and layout; what any tar tool sees; damage."""

import io
import json
import subprocess
import tarfile
import time
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest

from tests.videos import moving_frames, write_video
from videomae.data import shards, storage
from videomae.data.decode import UnreadableVideo, Video
from videomae.data.prepare_sample import Encoding, Preparing, Task
from videomae.data.prepare_set import Plan, finish, join, keys_of, locked
from videomae.data.shards import StoredVideo, read_index

FRAMES = 45  # no multiple of the stride or of a group of pictures
SMALL = {"codec": "h264-fast"}
FAST = {"codec": "jpeg"}


def make_set(out, sources, labels=None, *, layout="shards", shard_videos=2, **encoding):
    """Prepare these videos, {name in the set: path}, in this process."""
    keys = keys_of(list(sources))
    labels = labels or [None] * len(keys)
    rows = zip(keys, map(str, sources.values()), sources, labels, strict=True)
    tasks = tuple(Task(number, *row) for number, row in enumerate(rows))
    plan = Plan(out, Encoding(**encoding), layout, shard_videos, tasks)
    plan.begin()
    service = Preparing(plan.encoding, plan.work)
    assert [service(task) for task in tasks] == [None] * len(tasks)
    with locked(plan, range(plan.num_shards)) as lock:
        for shard in range(plan.num_shards):
            join(plan, shard)
        assert finish(plan, lock)
    return out


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return {
        f"class {k}/clip.{k}.mp4": write_video(folder / f"{k}.mp4", moving_frames(FRAMES, seed=k * 5), bf="0")
        for k in range(3)
    }


@pytest.fixture(scope="module")
def small(sources, tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("small") / "set", sources, [4, 0, 7], **SMALL)


@pytest.fixture(scope="module")
def fast(sources, tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("fast") / "set", sources, [4, 0, 7], **FAST)


def copied(folder, into):
    """A copy that may be damaged."""
    into.mkdir()
    for path in folder.rglob("*"):
        target = into / path.relative_to(folder)
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    return into


def psnr(got, truth):
    """Of each frame, in decibels."""
    error = ((got.astype(float) - truth.astype(float)) ** 2).mean((1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-9))


def nearest(frame, truth):
    """The number of the frame of truth that this one is most like."""
    return int(((truth.astype(float) - frame.astype(float)) ** 2).mean((1, 2, 3)).argmin())


# decibels, of 64x48 pixels with hard colours; real clips are in test_prepare
WORST = {"h264-fast": 29.5, "jpeg": 29.5}


@pytest.mark.parametrize("codec", ["h264-fast", "jpeg"])
@pytest.mark.parametrize(("stride", "phases"), [(1, "all"), (4, "all"), (4, "first"), (7, "all")])
@pytest.mark.parametrize("layout", ["shards", "files"])
def test_gives_every_stored_frame_by_the_sources_number(tmp_path, sources, codec, stride, phases, layout):
    index = read_index(
        make_set(tmp_path / "set", sources, layout=layout, codec=codec, stride=stride, phases=phases, shard_videos=2)
    )
    step = stride if phases == "first" else 1
    assert (index.step, index.labels, index.notes) == (step, None, ())
    assert index.frames == (FRAMES,) * 3
    assert index.sources == tuple(sources)
    for path, source in zip(index.paths, sources.values(), strict=True):
        truth = Video(source).read(range(FRAMES))
        video = Video(path)
        assert (len(video), video.step, video.rate, video.backend) == (FRAMES, step, 25.0, "stored")
        numbers = list(range(0, FRAMES, step))
        got = video.read(numbers)
        assert got.shape == (len(numbers), 48, 64, 3)
        assert got.dtype == np.uint8
        assert [nearest(frame, truth) for frame in got] == numbers
        assert psnr(got, truth[numbers]).min() > WORST[codec]
        # in any order, twice, one by one and in one pass, the same bits
        some = [numbers[-1], numbers[0], numbers[len(numbers) // 2], numbers[-1]]
        assert np.array_equal(video.read(some), got[[n // step for n in some]])
        assert np.array_equal(np.concatenate([video.read([n]) for n in numbers[::3]]), got[::3])
        assert np.array_equal(np.stack(list(video.stream())), got)


def test_a_video_shorter_than_the_stride_has_all_its_frames(tmp_path):
    for frames in (1, 2, 3):
        source = write_video(tmp_path / f"{frames}.mp4", moving_frames(frames))
        for codec in ("h264-fast", "jpeg"):
            out = make_set(tmp_path / f"{codec}{frames}", {"short.mp4": source}, codec=codec)
            video = Video(read_index(out).paths[0])
            assert (len(video), video.step) == (frames, 1)
            assert video.read(range(frames)).shape[0] == frames


def test_a_frame_that_is_not_stored_is_refused_or_the_nearest_taken(tmp_path, sources):
    out = make_set(tmp_path / "set", sources, stride=4, phases="first")
    video = StoredVideo(read_index(out).paths[0])
    with pytest.raises(ValueError, match="frame 6 is not stored, only every 4th from 0 on is"):
        video.read([4, 6])
    # 6 lies between two, 43 behind 40 and before 44, the last; there is no 48
    got = video.read([3, 5, 6, 7, 43, 42], allow_nearest=True)
    assert np.array_equal(got, video.read([4, 4, 4, 8, 44, 40]))
    for number in (-1, FRAMES):
        with pytest.raises(IndexError, match="frames 0 to 44"):
            video.read([number])


def test_nearest_of_the_last_frames_is_the_last_that_is_stored(tmp_path):
    source = write_video(tmp_path / "a.mp4", moving_frames(8))
    video = StoredVideo(read_index(make_set(tmp_path / "set", {"a.mp4": source}, phases="first")).paths[0])
    assert np.array_equal(video.read([7], allow_nearest=True), video.read([4]))


@pytest.mark.parametrize("kind", ["small", "fast"])
def test_reads_only_the_bytes_it_needs(kind, request, monkeypatch):
    path = read_index(request.getfixturevalue(kind)).paths[1]
    video = Video(path)
    asked = []
    read_range = storage.read_range
    monkeypatch.setattr(storage, "read_range", lambda *a: asked.append(a) or read_range(*a))
    video.read([2, 6, 10, 14])  # one phase
    stored = video._stored._stored
    stream = stored.streams[2]
    assert [size for _, _, size in asked] == [int(stream.begins[3] + stream.sizes[3] - stream.begins[0])]


def test_other_tools_read_the_shards(small, fast):
    for folder, names in ((small, ["json", "cls", *(f"p{p}.mp4" for p in range(4))]), (fast, None)):
        shard = folder / "shard-00000.tar"
        listed = subprocess.run(["tar", "-tf", shard], check=True, capture_output=True, text=True).stdout.split()
        with tarfile.open(shard) as archive:
            members = archive.getmembers()
            assert [member.name for member in members] == listed
            assert len(set(listed)) == len(listed)
            assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in members} == {(0, 0, 0, 0o644, "")}
            first = [name for name in listed if name.startswith("class_0/clip_0.")]
            order = [n for p in range(4) for n in range(p, FRAMES, 4)]
            suffixes = names or ["json", "cls", *(f"{n:06d}.jpg" for n in order)]
            assert first == [f"class_0/clip_0.{suffix}" for suffix in suffixes]
            assert archive.extractfile("class_0/clip_0.cls").read() == b"4"
            assert json.load(archive.extractfile("class_0/clip_0.json"))["source"] == "class 0/clip.0.mp4"


def test_any_player_plays_the_members(small):
    truth = StoredVideo(read_index(small).paths[0])
    with tarfile.open(small / "shard-00000.tar") as archive:
        for phase in range(4):
            data = archive.extractfile(f"class_0/clip_0.p{phase}.mp4").read()
            with av.open(io.BytesIO(data)) as container:
                stream = container.streams.video[0]
                assert not container.streams.audio
                assert float(stream.average_rate) == 25 / 4
                keys = [p.is_keyframe for p in container.demux(stream) if p.size]
                assert [k for k, key in enumerate(keys) if key] == list(range(0, len(keys), 16))
                container.seek(0)
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            assert np.array_equal(np.stack(frames), truth.read(range(phase, FRAMES, 4)))


def test_webdataset_reads_the_shards(small, fast):
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset([str(small / f"shard-0000{k}.tar") for k in range(2)], shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"class_{k}/clip_{k}" for k in range(3)]
    assert [sample["cls"] for sample in samples] == [b"4", b"0", b"7"]
    assert json.loads(samples[2]["json"])["frames"] == FRAMES
    decoded = list(webdataset.WebDataset(str(fast / "shard-00000.tar"), shardshuffle=False).decode("rgb8"))
    stored = StoredVideo(read_index(fast).paths[0])
    assert np.abs(decoded[0]["000009.jpg"].astype(int) - stored.read([9])[0]).mean() < 2
    assert decoded[0]["cls"] == 4


def test_is_read_under_a_url(fast):
    filesystem = fsspec.filesystem("memory")
    for path in fast.iterdir():
        filesystem.pipe(f"/prepared/{path.name}", path.read_bytes())
    index, local = read_index("memory://prepared"), read_index(fast)
    assert (index.labels, index.notes, index.sources) == (local.labels, (), local.sources)
    assert index.paths[2].startswith("memory://prepared/shard-00001.tar::")
    assert np.array_equal(Video(index.paths[2]).read([3, 7]), Video(local.paths[2]).read([3, 7]))
    assert not shards.is_prepared("memory://nothing")
    with pytest.raises(ValueError, match="no whole prepared set"):
        read_index("memory://nothing")


@pytest.mark.parametrize("kind", ["small", "fast"])
def test_names_what_is_missing_or_cut_short_and_reads_the_rest(tmp_path, kind, request):
    folder = copied(request.getfixturevalue(kind), tmp_path / "set")
    whole = [Video(path).read(range(FRAMES)) for path in read_index(folder).paths]
    (folder / "shard-00001.tar").unlink()
    shard = folder / "shard-00000.tar"
    rows = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    shard.write_bytes(shard.read_bytes()[: rows[1]["offset"] + rows[1]["size"] // 2])
    shards._stored.cache_clear()
    index = read_index(folder)
    assert len(index.notes) == 2
    assert "shard-00000.tar has" in index.notes[0]
    assert "shard-00001.tar is missing" in index.notes[1]
    assert np.array_equal(Video(index.paths[0]).read(range(FRAMES)), whole[0])
    with pytest.raises(UnreadableVideo, match=r"shard-00001\.tar::class_2/clip_2@0: missing: .*shard-00001\.tar"):
        Video(index.paths[2])
    # of the second video the beginning is there
    assert np.array_equal(Video(index.paths[1]).read([0, 4]), whole[1][[0, 4]])
    with pytest.raises(UnreadableVideo, match="cut short"):
        Video(index.paths[1]).read([FRAMES - 2])


@pytest.mark.parametrize("kind", ["small", "fast"])
@pytest.mark.parametrize("damage", ["zeros", "noise", "one bit"])
def test_refuses_damaged_frames_and_reads_the_others(tmp_path, kind, damage, request):
    folder = copied(request.getfixturevalue(kind), tmp_path / "set")
    path = read_index(folder).paths[0]
    video = Video(path)
    stored = video._stored._stored
    truth = video.read(range(FRAMES))
    begin = stored.base + int(stored.streams[1].begins[5])  # frame 21
    shard = folder / "shard-00000.tar"
    data = bytearray(shard.read_bytes())
    half = begin + int(stored.streams[1].sizes[5]) // 2
    end = begin + int(stored.streams[1].sizes[5])
    if damage == "zeros":
        data[half:end] = bytes(end - half)
    elif damage == "noise":
        data[half:end] = np.random.default_rng(0).bytes(end - half)
    else:
        data[half] ^= 4
    shard.write_bytes(data)
    with pytest.raises(UnreadableVideo, match="damaged in its shard: frame 21: "):
        video.read([20, 21])
    assert np.array_equal(video.read([17, 20, 22]), truth[[17, 20, 22]])


def test_refuses_an_index_that_belongs_to_another_shard(tmp_path, small):
    folder = copied(small, tmp_path / "set")
    first, second, _ = read_index(folder).paths
    shard, offset = second.split("::")[0], second.split("@")[1]
    for locator, why in {
        f"{shard}::class_0/clip_0@{offset}": "class_1/clip_1.json lies at",
        f"{shard}::class_0/clip_0@512": "at 512",
        f"{shard}::class_0/clip_0@{10**9}": "cut short",
        f"{shard}::class_0/clip_0@": "damaged",
        f"{folder}/shard-00077.tar::a@0": "missing",
        f"{folder}/files::class_0/clip_0": "missing",
    }.items():
        with pytest.raises(UnreadableVideo, match=why):
            Video(locator)
    assert len(Video(first)) == FRAMES


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": 2}, "format 2, where this version reads 1"),
        ({"frames": 46}, "packets are listed"),
        ({"streams": []}, "damaged"),
        ({"phases": []}, "damaged"),
        ({"stride": "4"}, "damaged"),
        ({"key": "class_1/clip_1"}, "it belongs to class_1/clip_1"),
    ],
)
def test_refuses_a_json_that_contradicts_itself(tmp_path, sources, change, why):
    folder = make_set(tmp_path / "set", sources, layout="files")
    path = folder / "files" / "class_0" / "clip_0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UnreadableVideo, match=why):
        Video(read_index(folder).paths[0])
    path.write_text("{")
    with pytest.raises(UnreadableVideo, match="damaged"):
        Video(read_index(folder).paths[0])


def test_refuses_packets_and_places_that_are_no_whole_numbers(tmp_path, sources):
    folder = make_set(tmp_path / "set", sources, layout="files")
    path = folder / "files" / "class_0" / "clip_0.json"
    facts = json.loads(path.read_text())
    first = facts["streams"][0]
    for change in ({"packets": [[n] for n in first["packets"]]}, {"packets": [0.5] * 3}, {"first": [48]}):
        path.write_text(json.dumps({**facts, "streams": [{**first, **change}, *facts["streams"][1:]]}))
        with pytest.raises(UnreadableVideo, match="damaged"):
            Video(read_index(folder).paths[0])


def rewrite(folder, number=0, **change):
    """Change one line of the index; None removes an entry."""
    lines = (folder / "index.jsonl").read_text().splitlines()
    row = {**json.loads(lines[number]), **change}
    lines[number] = json.dumps({key: value for key, value in row.items() if value is not None})
    (folder / "index.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda f: rewrite(f, 1, key="../../etc/passwd"), r"line 2, says of no video"),
        (lambda f: rewrite(f, 1, key="/etc/passwd"), r"line 2, says of no video"),
        (lambda f: rewrite(f, key=7), r"line 1, says of no video"),
        (lambda f: rewrite(f, frames=None), r"line 1, says of no video"),
        (lambda f: rewrite(f, 2, shard=5), r"line 3, points outside the shards"),
        (lambda f: rewrite(f, 1, offset=10**9), r"line 2, points outside the shards"),
        (lambda f: rewrite(f, 1, offset=-512), r"line 2, points outside the shards"),
        (lambda f: rewrite(f, 1, label=None), r"2 of 3 lines have a label"),
        (lambda f: (f / "index.jsonl").write_text("{}\nnonsense\n"), "line 1, says of no video"),
        (lambda f: (f / "index.jsonl").write_text(""), "0 lines, not 3"),
        (lambda f: (f / "index.jsonl").unlink(), "dataset.json or index.jsonl is missing"),
        (lambda f: (f / "dataset.json").write_text("{"), "damaged"),
        (lambda f: (f / "dataset.json").write_text("[]"), "damaged"),
        (lambda f: (f / "dataset.json").write_text("[" * 100_000), "damaged"),
        (lambda f: (f / "index.jsonl").write_text("[" * 100_000), "line 1, says of no video"),
        (lambda f: (f / "dataset.json").write_text('{"format": 9}'), "format 9; this version reads 1"),
        (lambda f: (f / "dataset.json").unlink(), r"not finished: 2 of \? shards are done; run the same command again"),
    ],
)
def test_refuses_an_index_in_one_line(tmp_path, small, spoil, why):
    folder = copied(small, tmp_path / "set")
    spoil(folder)
    assert shards.is_prepared(folder)
    with pytest.raises(ValueError, match=why) as caught:
        read_index(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "{}", "[" * 100_000])
def test_an_unfinished_set_with_damaged_settings_is_unfinished(tmp_path, text):
    (tmp_path / ".work").mkdir()
    (tmp_path / ".work" / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"not finished: 0 of \? shards"):
        read_index(tmp_path)
    plan = Plan(tmp_path, Encoding(), "shards", 2, (Task(0, "a", "a.mp4", "a.mp4", None),))
    with pytest.raises(ValueError, match="settings.json is damaged"):
        plan.check_same()


def test_refuses_shards_outside_the_folder(tmp_path, small):
    folder = copied(small, tmp_path / "set")
    text = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(text.replace("shard-00000.tar", "../shard-00000.tar"))
    with pytest.raises(ValueError, match="names shards that are none"):
        read_index(folder)
    # also where nothing is in shards
    facts = json.loads(text)
    (folder / "dataset.json").write_text(
        json.dumps({**facts, "layout": "files", "shards": [{"name": "../x", "size": 1}]})
    )
    with pytest.raises(ValueError, match="names shards that are none"):
        read_index(folder)


def test_a_folder_of_videos_is_no_prepared_set(tmp_path, sources):
    assert not shards.is_prepared(next(iter(sources.values())).parent)
    assert not shards.is_prepared(next(iter(sources.values())))
    with pytest.raises(ValueError, match="no whole prepared set"):
        read_index(tmp_path)
    # two colons alone make no locator
    odd = write_video(tmp_path / "take::2.mp4", moving_frames(3))
    assert len(Video(odd)) == 3


@pytest.mark.long
def test_the_index_of_kinetics_is_read_in_two_seconds(tmp_path):
    def timed(work):
        begin = time.perf_counter()
        result = work()
        return time.perf_counter() - begin, result

    size, per_shard, videos = 400_384, 256, 250_000
    rows = (
        {
            "key": f"class_{k % 400}/video_{k:06d}_000010_000020",
            "shard": k // per_shard,
            "offset": k % per_shard * size,
            "size": size,
            "frames": 300,
            "label": k % 400,
            "source": f"class {k % 400}/video-{k:06d}_000010_000020.mp4",
        }
        for k in range(videos)
    )
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [f"shard-{k:05d}.tar" for k in range(-(-videos // per_shard))]
    facts = {"format": 1, "stride": 4, "phases": [0], "codec": "jpeg", "layout": "shards", "videos": videos}
    facts["shards"] = [{"name": name, "videos": per_shard, "size": per_shard * size + 1024} for name in names]
    Path(tmp_path / "dataset.json").write_text(json.dumps(facts))

    def parse():
        with open(tmp_path / "index.jsonl") as lines:
            return [json.loads(line) for line in lines]

    parsing, _ = timed(parse)
    seconds, index = timed(lambda: read_index(tmp_path))
    # measured: 1.0 s, and parsing alone 0.6; a busy machine is slow at both
    assert seconds < max(2, 4 * parsing)
    assert (len(index.paths), index.step, len(index.notes)) == (videos, 4, len(names))


@pytest.mark.long
def test_every_source_frame_is_given_once_by_one_pass(clips, hard):
    for path in (clips / "ava_like.mp4", clips / "test_mpeg4.avi", *sorted(hard.iterdir())):
        if path.name == "corrupted.mp4":
            continue
        video = Video(path)
        count = 0
        for number, frame in enumerate(video.stream()):
            count += 1
            if number % 9 == 0:
                assert np.array_equal(frame, Video(path).read([number])[0]), (path, number)
        assert count == len(video)
