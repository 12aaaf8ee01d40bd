"""The official annotation files of Kinetics, Something-Something V2, UCF101 and HMDB51: which video is in which split,
and of which class.

Classes are numbered as everybody's checkpoints have them: Kinetics and HMDB51 in alphabetical order, the others by the
numbers in their own files.
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kernels.launch import check

# what a whole data set has; a part of the files would number the classes in another way
OFFICIAL_CLASSES = {"kinetics": (400, 600, 700), "ssv2": (174,), "ucf101": (101,), "hmdb51": (51,)}


class Named(NamedTuple):
    """A video that an annotation file names. stems: its file's possible names without folder and suffix, best first.
    label: None where class_name is no class."""

    stems: tuple[str, ...]
    class_name: str
    label: int | None


@dataclass(frozen=True)
class Annotations:
    """splits: train, and val and test where labels of them are known. unused: stems of videos that are in no split.
    fold_case: copies of the data set differ in the case of files' names."""

    classes: tuple[str, ...]
    splits: dict[str, list[Named]]
    unused: frozenset[str] = frozenset()
    fold_case: bool = False
    notes: tuple[str, ...] = ()


def read_kinetics(folder: Path) -> Annotations:
    """train.csv with val.csv and test.csv, or names that end so (`kinetics-400_train.csv`, `validate.csv`).

    Columns label, youtube_id, time_start and time_end, in seconds; more are ignored. A class's number is its rank in
    the alphabetical order of train's labels, where spaces count as `_`.
    """
    files = {split: path for split in ("train", "val", "test") if (path := _kinetics_file(folder, split))}
    check("train" in files, f"no train.csv in {folder}: it says which classes there are")
    tables = {split: _kinetics_rows(path) for split, path in files.items()}
    known = {_plain(label): label for label, _ in tables["train"] if label}
    check(len(known) > 0, f"{files['train']} has no labels")
    numbers = {name: number for number, name in enumerate(sorted(known))}
    splits, notes = {}, []
    for split, rows in tables.items():
        bare = sum(not label for label, _ in rows)
        if bare == len(rows):
            notes.append(_unlabelled(files[split], split))
            continue
        check(bare == 0, f"{files[split]}: {bare} of {len(rows)} lines have no label")
        splits[split] = [Named(stems, label, numbers.get(_plain(label))) for label, stems in rows]
    return Annotations(tuple(known[name] for name in sorted(known)), splits, notes=tuple(notes))


def _kinetics_file(folder: Path, split: str) -> Path | None:
    names = {"val": "val|validate|validation"}.get(split, split)
    found = [entry.name for entry in os.scandir(folder) if re.fullmatch(rf"(.*[_-])?({names})\.csv", entry.name)]
    check(len(found) <= 1, f"{' and '.join(sorted(found))} in {folder} are both of {split}: leave one")
    return folder / found[0] if found else None


def _kinetics_rows(path: Path) -> list[tuple[str, tuple[str, str]]]:
    """(label, stems) of each line; label is empty where the file has no such column, or nothing in it."""
    try:
        table = list(csv.reader(io.StringIO(_text(path))))
    except csv.Error as error:
        raise ValueError(f"{path} is no table of Kinetics: {error}") from error
    check(len(table) > 1, f"{path} is empty")
    header = [name.strip().strip('"') for name in table[0]]
    wanted = ("youtube_id", "time_start", "time_end")
    lacking = [name for name in wanted if name not in header]
    check(not lacking, f"{path}: its first line has no column {' or '.join(lacking)}; it is `{','.join(header)[:80]}`")
    columns = [header.index(name) for name in wanted]
    label_column = header.index("label") if "label" in header else None
    out = []
    for number, row in enumerate(table[1:], 2):
        if not row:
            continue
        try:
            name, start, end = (row[column].strip() for column in columns)
            label = "" if label_column is None else row[label_column].replace('"', "").strip()
            out.append((label, (f"{name}_{int(float(start)):06d}_{int(float(end)):06d}", name)))
        except (IndexError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}:{number} is no line of Kinetics: `{','.join(row)[:80]}`") from error
    return out


def _plain(label: str) -> str:
    return label.replace(" ", "_")


def read_ssv2(folder: Path) -> Annotations:
    """labels.json, train.json, validation.json and test.json, with or without `something-something-v2-` before it.

    Class numbers are those of labels.json. The official test file has no labels.
    """
    found = {name: _ssv2_file(folder, name) for name in ("labels", "train", "validation", "test")}
    lacking = [f"{name}.json" for name in ("labels", "train") if found[name] is None]
    check(not lacking, f"no something-something-v2-{' or '.join(lacking)} in {folder}")
    files = {name: path for name, path in found.items() if path is not None}
    numbers = _ssv2_labels(files.pop("labels"))
    splits, notes = {}, []
    for name, path in files.items():
        split = "val" if name == "validation" else name
        rows = [_ssv2_row(row, path, number) for number, row in enumerate(_json(path, list), 1)]
        check(len(rows) > 0, f"{path} is empty")
        if any(template is None for _, template in rows):
            check(name == "test", f"{path} has a video without a `template`")
            notes.append(_unlabelled(path, split))
            continue
        splits[split] = [Named((stem,), str(template), numbers.get(str(template))) for stem, template in rows]
    classes = tuple(sorted(numbers, key=lambda name: numbers[name]))
    return Annotations(classes, splits, notes=tuple(notes))


def _unlabelled(path: Path, split: str) -> str:
    return f"{path.name} has no labels: no list of {split} can be made of it"


def _ssv2_file(folder: Path, name: str) -> Path | None:
    return _first(folder, ("", "labels"), (f"something-something-v2-{name}.json", f"{name}.json"))


def _ssv2_labels(path: Path) -> dict[str, int]:
    try:
        numbers = {template: int(number) for template, number in _json(path, dict).items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is no map of templates to numbers: {error}") from error
    whole = len(numbers) > 0 and sorted(numbers.values()) == list(range(len(numbers)))
    check(whole, f"{path} does not number its {len(numbers)} templates from 0 on")
    return numbers


def _ssv2_row(row: Any, path: Path, number: int) -> tuple[str, str | None]:
    """(stem, template) of one video."""
    known = isinstance(row, dict) and isinstance(row.get("id"), (str, int))
    template = row.get("template") if known else None
    check(known and isinstance(template, (str, type(None))), f"{path}: its entry {number} is no video with an `id`")
    return str(row["id"]), None if template is None else template.replace("[", "").replace("]", "")


def read_ucf101(folder: Path, split: int) -> Annotations:
    """classInd.txt, trainlist0N.txt and testlist0N.txt of split N. A test line has no label: its folder says it.

    The files of the class HandstandPushups are called v_HandStandPushups_..., and copies differ in which of the two
    they write where.
    """
    inside = ("", "ucfTrainTestlist")
    class_file = _needed(folder, inside, "classInd.txt")
    classes: list[str] = []
    for number, line in _lines(class_file):
        found = re.fullmatch(r"(\d+)\s+(\S+)", line)
        right = found is not None and int(found[1]) == len(classes) + 1
        check(right, f"{class_file}:{number} should be `{len(classes) + 1} NAME`; it is `{line[:80]}`")
        assert found is not None
        classes.append(found[2])
    check(len(classes) > 0, f"{class_file} is empty")
    numbers = {name.casefold(): number for number, name in enumerate(classes)}
    files = {name: _needed(folder, inside, f"{name}list0{split}.txt") for name in ("train", "test")}
    splits = {name: [_ucf101_row(path, *row, numbers) for row in _lines(path)] for name, path in files.items()}
    return Annotations(tuple(classes), splits, fold_case=True)


def _ucf101_row(path: Path, number: int, line: str, numbers: dict[str, int]) -> Named:
    found = re.fullmatch(r"([^/\s]+)/(\S+?)(?:\s+(\d+))?", line)
    check(found is not None, f"{path}:{number} should be `CLASS/VIDEO.avi LABEL`; it is `{line[:80]}`")
    assert found is not None
    label = numbers.get(found[1].casefold())
    agrees = label is None or found[3] is None or int(found[3]) == label + 1
    check(agrees, f"{path}:{number} gives {found[1]} the number {found[3]}, which classInd.txt does not")
    return Named((os.path.splitext(found[2])[0],), found[1], label)


def read_hmdb51(folder: Path, split: int) -> Annotations:
    """CLASS_test_splitN.txt of split N for each class, with `VIDEO.avi FLAG` a line: 1 train, 2 test, 0 neither.

    Classes are numbered in alphabetical order.
    """
    ending = f"_test_split{split}.txt"
    places = [folder, folder / "testTrainMulti_7030_splits"]
    found = next((files for place in places if (files := sorted(place.glob(f"*{ending}")))), [])
    check(len(found) > 0, f"no CLASS{ending} in {folder}")
    by_class = sorted((path.name.removesuffix(ending), path) for path in found)
    splits: dict[str, list[Named]] = {"train": [], "test": []}
    unused = set()
    for label, (name, path) in enumerate(by_class):
        for number, line in _lines(path):
            row = re.fullmatch(r"(\S.*?)\s+([012])", line)
            check(row is not None, f"{path}:{number} should be `VIDEO.avi FLAG`, 0 to 2; it is `{line[:80]}`")
            assert row is not None
            stem = os.path.splitext(row[1])[0]
            if row[2] == "0":
                unused.add(stem)
            else:
                splits["train" if row[2] == "1" else "test"].append(Named((stem,), name, label))
    return Annotations(tuple(name for name, _ in by_class), splits, frozenset(unused))


def _first(folder: Path, inside: Sequence[str], names: Sequence[str]) -> Path | None:
    places = (folder / below / name for below in inside for name in names)
    return next((place for place in places if place.is_file()), None)


def _needed(folder: Path, inside: Sequence[str], name: str) -> Path:
    found = _first(folder, inside, (name,))
    check(found is not None, f"no {name} in {folder}")
    assert found is not None
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, without the spaces around them, and their numbers."""
    return ((number, line.strip()) for number, line in enumerate(_text(path).splitlines(), 1) if line.strip())


def _json(path: Path, kind: type) -> Any:
    text = _text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    check(isinstance(value, kind), f"{path} holds no {'list of videos' if kind is list else 'map of templates'}")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no annotation file: not text ({error.reason})") from error
