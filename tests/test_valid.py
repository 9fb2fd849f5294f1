"""Rules accept exactly the values that they describe."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from tokenvit_jax.errors import UserError
from tokenvit_jax.valid import (
    Either,
    Flag,
    Form,
    Group,
    Number,
    OneOf,
    Several,
    Size,
    Text,
    ZeroOr,
    check,
    check_all,
    whole,
)

ODD = [None, "1", (), [], {}, object(), 1j, True, float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize(
    ("rule", "valid", "invalid", "text"),
    [
        (Number(0, 1), [0, 1, 0.5, np.float32(0.5)], [-1, 1.5, *ODD], "numbers from 0 to 1"),
        (
            Number(0, 1, above=True, below=True),
            [0.5, 1e-30],
            [0, 1, *ODD],
            "numbers above 0 to below 1",
        ),
        (Number(), [0, -1e30, 10**400], ODD, "finite numbers"),
        (whole(1), [1, 2, np.int64(3)], [0, 1.0, 2.5, *ODD], "whole numbers from 1"),
        (whole(0, 10**7), [10**7], [10**7 + 1], "whole numbers from 0 to 10000000"),
        (whole(0, 2**15), [0, 2**15], [-1, 2**15 + 1, *ODD], "whole numbers from 0 to 32768"),
        (
            ZeroOr(Number(0.5, 2)),
            [0, 0.0, 0.5, 2],
            [-1, 0.25, 1e-40, *ODD],
            "0, or numbers from 0.5 to 2",
        ),
        (ZeroOr(whole(32)), [0, 32], [0.0, 31, *ODD], "0, or whole numbers from 32"),
        (OneOf(("jit", "pmap")), ["jit"], ["", "JIT", *ODD], "jit, pmap"),
        (OneOf((1, 3)), [1], [0, 1.0, *ODD], "1, 3"),
        (Flag(), [True, False], [0, 1, "True", None], "True, False"),
        (Text(), ["", "a"], ["a\0", " ", None, 1, True], "a text, or '' for none"),
        (Text(empty=False), ["a"], ["", " ", None], "a text that is not empty"),
        (Form("|a+", "many a"), ["", "aa"], ["ab", "aa\n", None, 1], "many a"),
        (
            Group(),
            [{}, {"a": 1}, ConfigDict({"a": 1})],
            [{1: 1}, {"a.b": 1}, {"a": {1: 1}}, dict, [], "a", None, 1],
            None,
        ),
        (Size(whole(1)), [1, (1, 2), [2, 1]], [0, (1, 0), (1,), (1, 2, 3), "1", None], None),
        (Several(whole(1)), [(), (1,), [1, 2]], [(0,), (1.5,), 1, "11", None], None),
        (Several(Number(0), 2), [(0, 1), [2, 1]], [(), (1,), (1, 2, 3), (1, None)], None),
        (Several(Number(0), 2, ascending=True), [(1, 1), (0, 2)], [(2, 1)], None),
        (Either((whole(1), OneOf(("auto",)))), [1, "auto"], [0, "a", None], None),
    ],
    ids=lambda value: str(value) if hasattr(value, "accepts") else None,
)
def test_rules(rule, valid, invalid, text):
    assert all(map(rule.accepts, valid))
    assert not any(map(rule.accepts, invalid))
    assert text is None or str(rule) == text


def test_messages_name_the_setting_the_value_and_what_is_valid():
    with pytest.raises(UserError, match=r"^depth=0 is not valid; valid: whole numbers from 1$"):
        check("depth", 0, whole(1))
    for odd in (np.zeros((50, 50)), 10**5000, "a\nb" * 1000):
        with pytest.raises(UserError, match="depth=") as error:
            check("depth", odd, whole(1, 9))
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 300
    check_all("part.", {"a": 1, "b": 2}, {"a": whole(1)})
    with pytest.raises(UserError, match=r"part\.a='x' is not valid"):
        check_all("part.", {"a": "x"}, {"a": whole(1)})
