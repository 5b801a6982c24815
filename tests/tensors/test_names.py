"""Names of parameters of models in wrappers."""

from __future__ import annotations

import pytest

from dldr_ext.tensors.names import first_other_name, places_of, plain_names

_PLAIN = ["a.weight", "a.bias", "b.weight"]


@pytest.mark.parametrize(
    "pattern",
    [
        "_orig_mod.{}",
        "module.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
        "module.module.{}",
        "_fsdp_wrapped_module._checkpoint_wrapped_module.{}",
        "model.{}",
        "model._orig_mod.{}",
        "base_model.model.{}",
    ],
)
def test_wrappers_make_no_difference(pattern: str) -> None:
    wrapped = [pattern.format(name) for name in _PLAIN]
    assert first_other_name(wrapped, _PLAIN) is None
    assert first_other_name(_PLAIN, wrapped) is None
    assert places_of(_PLAIN[::-1], wrapped) == [2, 1, 0]
    assert places_of(wrapped, ["more", *_PLAIN]) == [1, 2, 3]
    assert first_other_name(wrapped, [_PLAIN[0], _PLAIN[2], _PLAIN[1]]) == 1


def test_other_names_are_told() -> None:
    assert first_other_name(["a.weight", "b.bias", "b.weight"], _PLAIN) == 1
    assert first_other_name(["x.a.weight", "y.a.bias", "x.b.weight"], _PLAIN) == 0
    assert places_of(_PLAIN, ["a.weight", "b.weight"]) == [0, None, 1]
    assert first_other_name([], []) is None


def test_names_that_only_wrappers_tell_apart_stay() -> None:
    names = ["a.weight", "_orig_mod.a.weight"]
    with pytest.raises(ValueError, match=r"two tensors are called 'a.weight'"):
        plain_names(names)
    assert first_other_name(names, names) is None and first_other_name(names, names[::-1]) == 0
