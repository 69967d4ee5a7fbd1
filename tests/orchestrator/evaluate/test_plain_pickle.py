from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from orchestrator.evaluate.plain_pickle import NotPlain, read_plain_pickle

PLAIN = [
    {"imlist": ["all_souls_000013"], "gnd": [{"bbx": [136.5, 34.1, 648.5, 955.7], "easy": [], "hard": [0, 1]}]},
    [None, True, False, 0, -1, 255, 256, 70_000, -(2**31), 2**31, 2**63, -(2**2100)],
    [0.0, -0.1, 1e300, float("inf")],
    ["", "é", "\n'\\", "\U0001f332", "long" * 100, "longer" * 20_000],
    [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, {1: {2: [()]}}, [[[]]]],
    [str(index // 2) * 3 for index in range(2000)],  # more than a byte counts
    "alone",
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_come_out_as_they_went_in(protocol):
    for value in PLAIN:
        data = pickle.dumps([value, value], protocol)
        assert repr(read_plain_pickle(data)) == repr([value, value])


def test_texts_of_python_2():
    data = b"(dp0\nS'imlist'\np1\n(lp2\nS'all_souls_000013'\np3\nasS'n'\nI01\ns."
    assert read_plain_pickle(data) == {"imlist": ["all_souls_000013"], "n": True}


class _Runs:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_called(tmp_path, protocol):
    data = pickle.dumps({"gnd": _Runs(tmp_path / "made")}, protocol)
    with pytest.raises(NotPlain, match=r"holds more than numbers, texts, lists, tuples and dicts"):
        read_plain_pickle(data)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps({"easy": np.arange(3)}),
        pickle.dumps({1, 2}),
        pickle.dumps([1, 2])[:-1],
        b"",
        b"no pickle at all",
        b"a.",  # nothing to append
        b"(.",
        b"](a.",
        b"K\x01\x86.",  # a pair of one
        b"h\x05.",  # never put
    ],
)
def test_everything_else_is_refused(data):
    with pytest.raises(NotPlain):
        read_plain_pickle(data)
