"""The folder of a set while it is made: which videos belong to which shard, what is done, and how a shard is closed.

.work/ holds one finished sample or refusal per video, under its number in the list, until its shard is written. Every
file appears whole, under its last name, or not at all, and its bytes depend on the source and the settings alone: work
that was killed anywhere goes on, with any number of workers, and ends with the same bytes.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from kernels.launch import check
from videomae.data.dataset import VideoList
from videomae.data.prepare_sample import Encoding, Task, copy, refusal_path, sample_path, write_text
from videomae.data.sample_facts import BLOCK, ILL_FORMED, padded
from videomae.data.shards import FORMAT, STATE
from videomae.weight_files import write_atomically

_KEY_LENGTH = 80  # leaves room for what follows it in ustar's 100 characters
_HASH_LENGTH = 10
_FINISHING = 1 << 40  # the byte of the lock file that whoever finishes the set holds; byte k stands for shard k


def source_names(videos: VideoList, folder: Path) -> list[str]:
    """Paths relative to the folder, or as they are where they lie outside."""
    start = f"{folder}{os.sep}"
    return [path[len(start) :] if path.startswith(start) else path for path in videos.paths]


def keys_of(sources: Sequence[str]) -> list[str]:
    """A name for each source that any tool can take; sources that would share one, and long ones, get a hash."""
    plain = [_plain(source) for source in sources]
    # folders that do not tell upper from lower case shall hold a set as well
    counts = Counter(key.lower() for key in plain)
    taken = {key for key, count in counts.items() if count == 1 and 0 < len(key) <= _KEY_LENGTH}
    keys = []
    for source, key in zip(sources, plain, strict=True):
        if key.lower() in taken and counts[key.lower()] == 1:
            keys.append(key)
            continue
        salt = 0
        while (made := _hashed(source, key, salt)).lower() in taken:
            salt += 1  # a source that is listed twice
        taken.add(made.lower())
        keys.append(made)
    return keys


def _plain(source: str) -> str:
    parts = [part for part in os.path.splitext(source)[0].split("/") if part not in ("", ".", "..")]
    return "/".join(re.sub(r"[^A-Za-z0-9_-]", "_", part) for part in parts)


def _hashed(source: str, key: str, salt: int) -> str:
    digest = hashlib.sha256(f"{salt} {source}".encode("utf-8", "surrogateescape")).hexdigest()[:_HASH_LENGTH]
    kept = key[-(_KEY_LENGTH - _HASH_LENGTH - 1) :].lstrip("/")
    return f"{kept}-{digest}" if kept else digest


@dataclass(frozen=True)
class Plan:
    """What a set will hold, all of it decided before the first video is read."""

    out: Path
    encoding: Encoding
    layout: str
    shard_videos: int
    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        check(self.layout in ("shards", "files"), f"--layout must be shards or files; got {self.layout}")
        check(self.shard_videos >= 1, f"--shard-videos must be at least 1; got {self.shard_videos}")

    @property
    def num_shards(self) -> int:
        return -(-len(self.tasks) // self.shard_videos)

    def of_shard(self, shard: int) -> tuple[Task, ...]:
        return self.tasks[shard * self.shard_videos : (shard + 1) * self.shard_videos]

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for work to go on: it all shows in the bytes of the shards."""
        listed = "\n".join(f"{task.source}\t{task.label}" for task in self.tasks)
        encoding = asdict(self.encoding)
        encoding.pop("crf" if self.encoding.codec == "jpeg" else "jpeg_quality")
        return {
            **encoding,
            "layout": self.layout,
            "shard_videos": self.shard_videos,
            "listed_videos": len(self.tasks),
            "list": hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()[:16],
        }

    @property
    def work(self) -> Path:
        return (self.out / STATE).parent

    def sample(self, number: int) -> Path:
        return sample_path(self.work, number)

    def refusal(self, number: int) -> Path:
        return refusal_path(self.work, number)

    def shard(self, shard: int) -> Path:
        return self.out / f"shard-{shard:05d}.tar"

    def index(self, shard: int) -> Path:
        return self.out / f"shard-{shard:05d}.jsonl"

    def is_done(self, shard: int) -> bool:
        return self.index(shard).exists()

    @property
    def is_begun(self) -> bool:
        return (self.out / STATE).exists()

    @property
    def is_finished(self) -> bool:
        return (self.out / "dataset.json").exists()

    def begin(self) -> None:
        """Write down what is being made. Raises ValueError when the folder holds files that it would overwrite."""
        names = ("shard-*.tar", "shard-*.jsonl", "index.jsonl", "refused.jsonl", "files")
        if found := sorted(path.name for name in names for path in self.out.glob(name)):
            raise ValueError(f"{self.out} holds {found[0]}, which another command made: give an empty folder")
        self.work.mkdir(parents=True, exist_ok=True)
        facts = {"format": FORMAT, "shards": self.num_shards, "settings": self.settings}
        write_text(self.out / STATE, json.dumps(facts, indent=1) + "\n")

    def check_same(self) -> None:
        """Raises ValueError when the folder was begun or finished with other settings or videos; says which."""
        path = self.out / ("dataset.json" if self.is_finished else STATE)
        try:
            before = json.loads(path.read_text(encoding="utf-8"))["settings"]
            check(isinstance(before, dict), "its settings are none")
        except ILL_FORMED as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        now = self.settings
        # a codec brings its own settings; a list of another length is another list
        differing = [key for key in now if key in before and before[key] != now[key]]
        differing = [key for key in differing if key != "list" or "listed_videos" not in differing]
        words = [_difference(key, before.get(key), now.get(key)) for key in differing]
        check(not words, f"{self.out} was made with other settings: {'; '.join(words)}. Give another folder")


def _difference(key: str, before: Any, now: Any) -> str:
    if key == "list":
        return "the listed videos, their order or labels are others"
    option = "videos listed" if key == "listed_videos" else f"--{key.replace('_', '-')}"
    return f"{option} {before} then, {now} now"


@contextmanager
def locked(plan: Plan, shards: Sequence[int]) -> Iterator[int]:
    """Hold these shards while inside, for the open lock file. Raises ValueError when another process holds one."""
    plan.work.mkdir(parents=True, exist_ok=True)
    with (plan.work / "lock").open("ab") as file:
        for shard in shards:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
            except (BlockingIOError, PermissionError) as error:
                raise ValueError(f"another process is at work on shard {shard} of {plan.out}") from error
            except OSError as error:
                raise ValueError(f"{plan.out} is on a file system that cannot lock files: {error.strerror}") from error
        yield file.fileno()


def sweep(plan: Plan, shards: Sequence[int]) -> None:
    """Remove what killed processes left half done or behind of these shards."""
    mine = set(shards)
    for path in plan.out.glob(".shard-*.tmp"):
        if int(path.name.split(".")[1].removeprefix("shard-")) in mine:
            path.unlink(missing_ok=True)
    try:
        left = list(plan.work.iterdir())
    except FileNotFoundError:  # another part was the last, and removed it
        left = []
    for path in left:
        number = re.match(r"\.?(\d{8})\.", path.name)
        shard = int(number[1]) // plan.shard_videos if number else -1
        if shard in mine and (path.name.endswith(".tmp") or plan.is_done(shard)):
            path.unlink(missing_ok=True)


def undone(plan: Plan, shards: Sequence[int]) -> dict[int, set[int]]:
    """Of each of these shards that is not done, the numbers still to prepare."""
    names = {entry.name for entry in os.scandir(plan.work)}
    out = {}
    for shard in shards:
        if not plan.is_done(shard):
            numbers = [task.number for task in plan.of_shard(shard)]
            out[shard] = {n for n in numbers if not names & {plan.sample(n).name, plan.refusal(n).name}}
    return out


def join(plan: Plan, shard: int) -> None:
    """Write a shard whose videos are all prepared or refused, then its part of the index; remove the parts."""
    rows: list[dict[str, Any]] = []
    tasks = plan.of_shard(shard)
    if plan.layout == "files":
        for task in tasks:
            rows.append(_refused(plan, task) or _unpacked(plan, task))
        os.sync()  # thousands of small files: one by one takes hours
    elif any(plan.sample(task.number).exists() for task in tasks):

        def write(path: Path) -> None:
            with path.open("wb") as out:
                rows.extend(_refused(plan, task) or _appended(plan, task, shard, out) for task in tasks)
                out.write(bytes(2 * BLOCK))

        write_atomically(plan.shard(shard), write)
    else:
        rows = [refused for task in tasks if (refused := _refused(plan, task))]
    write_text(plan.index(shard), "".join(json.dumps(row) + "\n" for row in rows))
    for task in tasks:
        plan.sample(task.number).unlink(missing_ok=True)
        plan.refusal(task.number).unlink(missing_ok=True)


def _refused(plan: Plan, task: Task) -> dict[str, Any] | None:
    path = plan.refusal(task.number)
    return json.loads(path.read_text()) if path.exists() else None


def _appended(plan: Plan, task: Task, shard: int, out: BinaryIO) -> dict[str, Any]:
    """The index's line of a sample that is copied to the end of its shard."""
    offset, size = out.tell(), plan.sample(task.number).stat().st_size
    with plan.sample(task.number).open("rb") as sample:
        frames = _frames(sample)
        sample.seek(0)
        copy(sample, out, size)
    return _row(task, frames, {"shard": shard, "offset": offset, "size": size})


def _unpacked(plan: Plan, task: Task) -> dict[str, Any]:
    """The index's line of a sample whose members are written as files."""
    size = 0
    folder = plan.out / "files"
    with plan.sample(task.number).open("rb") as sample:
        frames = _frames(sample)
        sample.seek(0)
        while header := sample.read(BLOCK):
            info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
            path = folder / info.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as out:
                copy(sample, out, info.size)
            sample.seek(padded(info.size) - info.size, os.SEEK_CUR)
            size += info.size
    return _row(task, frames, {"size": size})


def _frames(sample: BinaryIO) -> int:
    info = tarfile.TarInfo.frombuf(sample.read(BLOCK), "utf-8", "strict")
    return json.loads(sample.read(info.size))["frames"]


def _row(task: Task, frames: int, place: dict[str, int]) -> dict[str, Any]:
    label = {} if task.label is None else {"label": task.label}
    return {"key": task.key, **place, "frames": frames, **label, "source": task.source}


def finish(plan: Plan, lock: int) -> bool:
    """Write index.jsonl, refused.jsonl and at last dataset.json when every shard is done; whether the set is finished.

    lock: from `locked`; of several processes that end at once, one writes.
    """
    if not all(plan.is_done(shard) for shard in range(plan.num_shards)):
        return False
    fcntl.lockf(lock, fcntl.LOCK_EX, 1, _FINISHING)
    if plan.is_finished:
        return True
    for path in chain(plan.out.glob(".*.jsonl.*.tmp"), plan.out.glob(".dataset.json.*.tmp")):
        path.unlink()
    lines = [plan.index(shard).read_text().splitlines(keepends=True) for shard in range(plan.num_shards)]
    rows = [[(line, json.loads(line)) for line in of_shard] for of_shard in lines]
    kept = [[line for line, row in of_shard if "key" in row] for of_shard in rows]
    refused = [line for of_shard in rows for line, row in of_shard if "key" not in row]
    write_text(plan.out / "index.jsonl", "".join(chain.from_iterable(kept)))
    write_text(plan.out / "refused.jsonl", "".join(refused))
    facts = {
        "format": FORMAT,
        "settings": plan.settings,
        "stride": plan.encoding.stride,
        "phases": list(plan.encoding.kept),
        "codec": plan.encoding.codec,
        "layout": plan.layout,
        "videos": sum(map(len, kept)),
        "refused": len(refused),
        "shards": [
            {"name": path.name, "videos": len(kept[shard]), "size": path.stat().st_size}
            for shard in range(plan.num_shards)
            if (path := plan.shard(shard)).exists()
        ],
    }
    write_text(plan.out / "dataset.json", json.dumps(facts, indent=1) + "\n")
    shutil.rmtree(plan.work, ignore_errors=True)
    return True
