"Messages keep their three parts, values travel, near misses are near."
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_lab.ground import errors
from sae_lab.ground.errors import SaeLabError, near_names, unknown

KINDS = [errors.InputError, errors.ShapeError, errors.UnknownName, errors.DamagedFile, errors.NumericError,
         errors.Unavailable, errors.Stopped]


@pytest.mark.parametrize("kind", KINDS)
def test_survives_pickling(kind):
    error = kind("x is 3", "x below 3", "lower x", x=3, path="a/b")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error) and again.x == 3 and again.path == "a/b"


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_message_holds_every_part(got, expected, do):
    message = str(SaeLabError(got, expected, do))
    assert all(part.rstrip(". ") in message for part in (got, expected, do))


@given(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=10), st.text(max_size=8))
def test_near_names_are_known_names(known, name):
    near = near_names(name, known)
    assert len(near) <= 3 and set(near) <= set(known)


def test_unknown_lists_at_most_forty():
    error = unknown("hook", "z", [f"hook_{i}" for i in range(100)])
    assert "and 60 more" in str(error) and len(error.known) == 100
