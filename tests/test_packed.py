"""Specifications of any size as a word of a command line."""

import random
import string
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynatree.errors import ConfigError
from dynatree.packed import LONGEST, pack, unpack


@given(st.text())
def test_a_packed_text_comes_back(text):
    assert unpack(pack(text)) == text


def test_a_study_that_no_command_line_holds_fits_packed():
    text = "{" + ",".join(f'"c{index}":{{"depth":{index % 10}}}' for index in range(10_000)) + "}"
    with pytest.raises(OSError, match="Argument list too long"):
        subprocess.run(["bash", "-c", f"echo '{text}'"], capture_output=True)
    done = subprocess.run(["bash", "-c", f"echo {pack(text)}"], capture_output=True, text=True)
    assert unpack(done.stdout.strip()) == text


def test_plain_json_is_taken_as_it_is():
    assert unpack(' {"a": 1}') == ' {"a": 1}'


@pytest.mark.parametrize("word", ["", "no JSON", "eJw=", "eJwtlight"])
def test_what_is_neither_is_refused(word):
    with pytest.raises(ConfigError, match="neither JSON nor packed JSON"):
        unpack(word)


def test_what_is_too_long_even_packed_is_refused_with_a_cure():
    noise = "".join(random.Random(0).choices(string.printable, k=LONGEST))
    assert len(pack(noise[: LONGEST // 2])) < LONGEST
    with pytest.raises(ConfigError, match=f"more than {LONGEST}; split it"):
        pack(noise * 2)
