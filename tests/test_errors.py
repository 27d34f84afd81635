"""Long messages are shortened, so that they fit on a screen."""

import copy
import pickle

import pytest

from selfvil.errors import MAX_MESSAGE, UserError, shorten


def test_a_long_message_loses_its_middle():
    message = "begin " + "x" * 60_000 + " end"
    text = str(UserError(message))
    assert len(text) == MAX_MESSAGE
    assert text.startswith("begin")
    assert text.endswith("end")
    assert "characters left out" in text
    assert str(UserError("short")) == "short"


@pytest.mark.parametrize("length", [99, 100, 101, 150, 1000])
def test_shorten_keeps_its_limit(length):
    assert len(shorten("x" * length, 100)) == min(length, 100)


def test_an_error_can_be_pickled_and_copied():
    error = UserError("x" * 2000)
    assert str(pickle.loads(pickle.dumps(error))) == str(copy.copy(error)) == str(error)
