"""Every error code has its explanation, and each tells something of its own."""

import pytest

from ckptconv.errors import CODES, UsageError
from ckptconv.explain.codes import explain_code


@pytest.mark.parametrize("code", CODES)
def test_every_code_is_explained(code):
    found = explain_code(code.lower())
    assert (found.code, found.sentence) == (code, CODES[code])
    assert len(found.meaning) > 40
    assert found.meaning != found.sentence
    assert f"[{code}]\n  " in found.example
    assert found.todo
    assert all(found.todo)


def test_no_two_codes_are_explained_alike():
    found = [explain_code(code) for code in CODES]
    assert len({each.meaning for each in found}) == len({each.example for each in found}) == len(CODES)


def test_a_code_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(UsageError) as raised:
        explain_code("CK999")
    assert "there is no error code CK999" in str(raised.value)
