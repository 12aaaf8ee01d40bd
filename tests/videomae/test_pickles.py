"""Hostile pickles, which would hold torch.load for minutes and more, and those of real checkpoints."""

import argparse
import collections
import io
import pickle
import time
import zipfile

import numpy as np
import pytest
import torch

from videomae import pickles
from videomae.pickles import check_file, check_pickle


def text(value):
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def twice(levels, make):
    """Values that each hold the one before twice; the last one is on the stack."""
    steps = b"".join(make(b"h" + bytes([n])) + b"q" + bytes([n + 1]) for n in range(levels))
    return b"\x80\x02)q\x00" + steps


def as_tuple(inner):
    return inner + inner + b"\x86"


def as_list(inner):
    return b"](" + inner + inner + b"e"


def filled_later():
    """Lists that hold the next one twice, put into each other before they are filled."""
    lists = b"".join(b"]q" + bytes([n]) + b"0" for n in range(40))
    filled = b"".join(b"h" + bytes([n, *b"(h", n + 1, *b"h", n + 1]) + b"e0" for n in range(39))
    return b"\x80\x02" + lists + filled + b"h\x00."


CALLED, A_KEY = b")R.", b"}h(K\x01s."
HOSTILE = {
    "a name": (b"\x80\x02c" + b"a" * 100_000 + b"\nb\n.", "names something of 100,002 characters"),
    "text that is called": (b"\x80\x02" + text("a" * 100_000) + CALLED, "calls what is no name"),
    "text that is made": (b"\x80\x02" + text("a" * 100_000) + b")\x81.", "calls what is no name"),
    "lists in lists, called": (twice(40, as_list) + CALLED, "hold each other too often"),
    "tuples in tuples, a key": (twice(40, as_tuple) + A_KEY, "hold each other too often"),
    "lists that are filled later": (filled_later(), "changes a value that another holds"),
    "a list in itself": (b"\x80\x02]q\x00h\x00ah\x00a.", "changes a value that another holds"),
    "a deep one": (b"\x80\x02" + b"]" * 9_000 + b"a" * 8_999 + b".", "hold each other too often"),
    "punycode": (b"\x80\x02c_codecs\nencode\n" + text("ab") + text("punycode") + b"\x86R.", "other than bytes"),
    "an encoding in a list": (b"\x80\x02c_codecs\nencode\n](" + text("a") + text("punycode") + b"eR.", "other than"),
    "room": (b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85R.", "bytearray"),
    "a type of 2 GB": (b"\x80\x02cnumpy\ndtype\n" + text("V2147483647") + b"\x85R.", "no number's"),
    "a type that grows": (
        b"\x80\x02cnumpy\ndtype\n" + text("V1") + b"\x85R(K\x03NNNJ" + (1 << 30).to_bytes(4, "little") + b"K\x01tb.",
        "no number's",
    ),
    "an empty stack": (b"\x80\x02R.", "never there"),
    "an empty memo": (b"\x80\x02h\x07.", "never there"),
    "no end": (b"\x80\x02" + b"(" * 9, "exhausted"),
    "a mark that is held": (b"\x80\x02(\x85.", "marks are not in order"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses_at_once(name):
    data, message = HOSTILE[name]
    begin = time.process_time()
    with pytest.raises(ValueError, match=message):
        check_pickle(io.BytesIO(data))
    assert time.process_time() - begin < 5


def test_refuses_more_steps_than_a_checkpoint_has(monkeypatch):
    monkeypatch.setattr(pickles, "_OPCODES", 20)
    check_pickle(io.BytesIO(b"\x80\x02" + b"N0" * 8 + b"N."))
    with pytest.raises(ValueError, match="more than 20 steps"):
        check_pickle(io.BytesIO(b"\x80\x02" + b"N0" * 10 + b"N."))


def official():
    """What training scripts save: weights, AdamW's state, the command line, NumPy's numbers."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    moments = {n: {"step": torch.tensor(1.0), "exp_avg": torch.rand_like(p)} for n, p in enumerate(model.parameters())}
    group = {"lr": np.float64(1e-3), "betas": (0.9, 0.95), "params": list(moments), "foreach": None}
    scaler, options = {"scale": 65536.0}, argparse.Namespace(lr=np.float64(1e-3), betas=[0.9, 0.95], size=(2, 3))
    counter = collections.Counter("aab")
    state = {
        "model": model.state_dict(),
        "optimizer": {"state": moments, "param_groups": [group]},
        "scaler": scaler,
        "args": options,
    }
    return state | {"epoch": 7, "counter": counter, "type": torch.float16, "size": torch.Size([2, 3]), "key": b"\xff"}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_lets_real_checkpoints_pass(tmp_path, is_zip, protocol):
    torch.save(official(), tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)
    check_file(tmp_path / "a.pt")


def test_lets_any_plain_value_pass():
    shared = (1, "a", [2.5, {"b": None}])
    value = {"x": [shared] * 9, (1, (2, 3)): {4, 5}, "y": frozenset("ab"), "z": b"c" * 300, "n": 10**80, "f": 1e-3}
    for protocol in range(6):
        check_pickle(io.BytesIO(pickle.dumps(value, protocol)))


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("name", ["a name", "tuples in tuples, a key", "punycode"])
def test_finds_the_pickle_in_either_kind_of_file(tmp_path, is_zip, name):
    data, message = HOSTILE[name]
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    raw = (tmp_path / "a.pt").read_bytes()
    if is_zip:
        with zipfile.ZipFile(io.BytesIO(raw)) as before, zipfile.ZipFile(tmp_path / "b.pt", "w") as after:
            for one in before.namelist():
                after.writestr(one, data if one.endswith("data.pkl") else before.read(one))
    else:
        head = io.BytesIO(raw)
        for _ in range(3):
            pickle.load(head)
        (tmp_path / "b.pt").write_bytes(raw[: head.tell()] + data + pickle.dumps([], 2))
    check_file(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        check_file(tmp_path / "b.pt")


def test_refuses_files_that_are_none(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        check_file(path)
    path.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="no whole archive"):
        check_file(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 10_000 + b"N.")
    with pytest.raises(ValueError, match="packed"):
        check_file(path)
