"""``--null``: what it may say."""

import pytest

from heredity.gate.benign_null import drawn
from heredity.gate.policy import load_rules
from heredity.interp.errors import HeredityError

POLICY = load_rules(None, None).policy


def test_benign_successors_are_counted_and_must_be_enough_to_tell_anything() -> None:
    assert drawn("scrambled", POLICY) is None
    assert drawn("benign:19", POLICY) == 19 and drawn("benign:10", POLICY) == 10
    with pytest.raises(HeredityError, match="benign:10 or more"):
        drawn("benign:9", POLICY)
    for text in ("benign", "benign:0", "benign:-3", "benign:1.5", "scrambled:4", ""):
        with pytest.raises(HeredityError, match="not a null"):
            drawn(text, POLICY)
