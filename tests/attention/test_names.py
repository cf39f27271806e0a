"""Attentions are found by their modules."""

from __future__ import annotations

import pytest

import vislm.attention
from vislm.attention import attention_class, attention_names
from vislm.errors import UnknownName


def test_every_attention_has_a_name() -> None:
    assert {"halo", "neighborhood", "window"} <= set(attention_names())
    for name in attention_names():
        cls = attention_class(name)
        assert getattr(vislm.attention, cls.__name__) is cls
        assert cls.__name__ in dir(vislm.attention)
        assert cls.__doc__


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'neighborhood'"):
        attention_class("neighbourhood")
    with pytest.raises(AttributeError, match="NeighborhoodAttention"):
        _ = vislm.attention.AbsentAttention
