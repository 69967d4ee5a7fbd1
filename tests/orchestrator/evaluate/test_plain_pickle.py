from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.evaluate.plain_pickle import NotPlain, read_plain_pickle

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@settings(max_examples=20)
@given(value=PLAIN, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_data_come_out_as_they_went_in(value, protocol):
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
