"""The nearest name: what is found, what is not, and the sentence of a refusal."""

from __future__ import annotations

import pytest

from scoreact.support.names import did_you_mean, known_name, nearest

KNOWN = ("brightness", "contrast", "sharpness")


def test_the_nearest_name_is_found_within_the_cutoff_only() -> None:
    assert nearest("brightnes", KNOWN) == "brightness"
    assert nearest("x", KNOWN) is None
    # 2 x 5 shared letters ("con" and "st", in order) of 6 + 8: 0.71
    assert nearest("conest", KNOWN, 0.71) == "contrast"
    assert nearest("conest", KNOWN, 0.72) is None
    assert nearest("--iter", ["--tracker", "--iterations", "--iterations-more"]) == "--iterations"
    assert nearest("--it", ["--bit", "--iterations"]) == "--bit"
    assert nearest(3, iter(["2", "3"])) == "3"


def test_the_question_and_the_refusal() -> None:
    assert did_you_mean("contrst", KNOWN) == " Did you mean 'contrast'?"
    assert did_you_mean("x", KNOWN) == ""
    assert known_name("contrast", iter(KNOWN), "unknown measure") == "contrast"
    sentence = r"^unknown measure 'contrst'; known: brightness, contrast, sharpness\. Did you mean 'contrast'\?$"
    with pytest.raises(ValueError, match=sentence):
        known_name("contrst", KNOWN, "unknown measure")
    with pytest.raises(ValueError, match=r"^no option 'a'; known: none\.$"):
        known_name("a", [], "no option")
