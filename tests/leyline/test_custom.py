"""Custom values: any text is a name, and no two become one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.custom import (
    custom_key,
    custom_metric,
    is_custom,
    is_evaluation,
    usable_name,
)
from esper_otel.leyline.frames import MAX_CUSTOM_NAME
from esper_otel.leyline.metrics import BY_INSTRUMENT, CUSTOM


@given(st.text(), st.text())
def test_every_name_can_be_sent_and_two_stay_two(one, other):
    sent = [usable_name(name) for name in (one, other)]
    assert all(name.isprintable() and 0 < len(name) <= MAX_CUSTOM_NAME for name in sent)
    assert all(is_custom(custom_key(name)) for name in sent)
    assert (sent[0] == sent[1]) == (one == other)


@pytest.mark.parametrize("name", ["kl", "val/loss %", "größe", "loss", "x" * MAX_CUSTOM_NAME])
def test_a_plain_name_stays_as_it_is(name):
    assert usable_name(name) == name


@pytest.mark.parametrize(
    "name", ["val_loss", "eval/accuracy", "loss.test", "Validation Loss", "dev-f1", "VAL"]
)
def test_a_word_of_the_name_says_that_it_is_an_evaluation(name):
    assert is_evaluation(name)


@pytest.mark.parametrize("name", ["loss", "value", "evaluate_me", "contest", "devices", ""])
def test_part_of_a_word_says_nothing(name):
    assert not is_evaluation(name)


@pytest.mark.parametrize(
    "key", ["custom.", "custom", "loss", "customs.x", "custom." + "x" * 101]
)
def test_what_is_no_key_of_a_custom_value(key):
    assert not is_custom(key)


def test_the_metric_is_in_no_row_and_its_values_are_of_steps():
    assert CUSTOM.instrument not in BY_INSTRUMENT
    assert custom_metric("custom.kl").scope == "step"
