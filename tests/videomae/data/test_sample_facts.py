"""KEY.json of a prepared video: nothing that it claims is believed before it fits the rest."""

import base64

import pytest

from videomae.data.sample_facts import understood

STREAM = {"member": "mp4", "first": 48, "offset": 1536, "packets": [10, 7, 5], "crc32": "00000001" * 3}
FACTS = {
    "frames": 3,
    "fps": 25.0,
    "height": 48,
    "width": 64,
    "codec": "h264-fast",
    "stride": 1,
    "phases": [0],
    "streams": [{**STREAM, "extradata": base64.b64encode(b"setup").decode()}],
}


def test_says_where_every_packet_lies():
    found = understood(FACTS, "set/files/a", None)
    assert (found.num_frames, found.shape, found.rate, found.stride) == (3, (48, 64), 25.0, 1)
    assert found.streams[0].begins.tolist() == [48, 58, 65]
    assert understood(FACTS, "set/shard-00000.tar", 1024).streams[0].begins.tolist() == [1584, 1594, 1601]


@pytest.mark.parametrize("member", ["../../x", "x/../../../secret", "/etc/passwd", "a\0b", "", "p0..mp4", ".mp4"])
def test_a_member_cannot_lead_out_of_the_folder(member):
    facts = {**FACTS, "streams": [{**FACTS["streams"][0], "member": member}]}
    with pytest.raises(ValueError, match="a member cannot be called"):
        understood(facts, "set/files/a", None)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"height": 1 << 20, "width": 1 << 20}, "frames of 1048576x1048576"),
        ({"height": [1]}, r"frames of \[1\]x64"),
        ({"height": True}, "frames of True"),
        ({"frames": 1 << 62}, "frames of 48x64"),
        ({"frames": -3}, "-3 frames"),
        ({"phases": [1]}, "phases"),
        ({"phases": [0, 4]}, "phases"),
        ({"fps": float("nan")}, "nan frames a second"),
        ({"fps": "25"}, "25 frames a second"),
        ({"streams": [{**FACTS["streams"][0], "first": -4096}]}, "whole number; got -4096"),
        ({"streams": [{**FACTS["streams"][0], "packets": [1 << 62] * 3}]}, "no frames"),
    ],
)
def test_refuses_numbers_that_no_video_has(change, why):
    with pytest.raises(ValueError, match=why):
        understood({**FACTS, **change}, "set/files/a", None)
