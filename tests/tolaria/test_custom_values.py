"""What a script reports under names of its own: which numbers are taken, and when."""

from __future__ import annotations

from decimal import Decimal
from math import inf
from types import SimpleNamespace

import numpy as np
import pytest
from tolaria.loops import Late, make, one_step

from esper_otel.leyline.frames import MAX_CUSTOM, MAX_CUSTOM_NAME
from esper_otel.tolaria.custom_values import CustomValues


class Hostile:
    def __float__(self):
        raise RuntimeError("not now")


@pytest.fixture
def custom():
    return CustomValues(lambda value: value)


def test_numbers_of_all_kinds_are_taken(custom):
    given = {
        "int": 3,
        "true": True,
        "inf": inf,
        "scalar": np.float32(0.5),
        "array": np.array([0.25]),
        "decimal": Decimal("1.5"),
        "none": None,
    }
    read = custom.read(given)
    assert read == {
        "int": 3.0,
        "true": 1.0,
        "inf": inf,
        "scalar": 0.5,
        "array": 0.25,
        "decimal": 1.5,
    }
    assert {type(value) for value in read.values()} == {float}


@pytest.mark.parametrize("odd", ["0.5", b"1", [1.0], {}, object(), Hostile(), np.zeros(2), 1j])
def test_anything_else_is_left_out_with_one_warning(custom, caplog, odd):
    for _ in range(3):
        assert custom.read({"odd": odd, "kl": 1.0}) == {"kl": 1.0}
    (record,) = caplog.records
    assert record.message.startswith("run.report(odd=…): expected a number, got ")


def test_a_tensor_is_read_without_waiting_and_only_if_it_is_one_number(monkeypatch, caplog):
    class Tensor:
        def __init__(self, count):
            self.numel = lambda: count

        def __float__(self):
            raise AssertionError("this waits for the device")

    monkeypatch.setitem(__import__("sys").modules, "torch", SimpleNamespace(Tensor=Tensor))
    reading = object()
    custom = CustomValues(lambda value: reading)
    assert custom.read({"kl": Tensor(1), "many": Tensor(2)}) == {"kl": reading}
    assert "many" in caplog.text


def test_a_run_has_so_many_names_and_no_more(custom, caplog):
    names = [f"n{number}" for number in range(MAX_CUSTOM)]
    for _ in range(2):
        assert list(custom.read(dict.fromkeys([*names, "more", "most"], 1.0))) == names
    (record,) = caplog.records
    assert "n64" not in record.message
    assert f"more=…): a run can have {MAX_CUSTOM} custom values" in record.message


def test_a_name_that_cannot_be_sent_is_changed_and_said_so_once(custom, caplog):
    for _ in range(2):
        long, broken = custom.read({"x" * 300: 1.0, "a\nb": 2.0})
        assert len(long) == MAX_CUSTOM_NAME
        assert broken.startswith("a_b-")
    assert len(caplog.records) == 2


def test_what_was_evaluated_says_so_by_its_name(custom):
    read = custom.read({"loss": 1.0, "val_acc": 0.5, "test/f1": 0.25}, evaluated=True)
    assert list(read) == ["val_loss", "val_acc", "test/f1"]


def test_what_the_registry_does_not_know_is_a_custom_value_of_the_step(clock):
    recorder, frames = make()
    recorder.loop_reported(None, {"acuracy": 1.0, "kl": 0.5})
    recorder.loop_reported(None, {"kl": 0.25})
    one_step(recorder, clock)
    one_step(recorder, clock)
    assert frames.customs == [{"acuracy": 1.0, "kl": 0.25}, {}]
    assert [row.get("custom_nonfinite") for row in frames.rows] == [0.0, None]


def test_a_custom_value_that_is_not_finite_is_counted_apart(clock):
    recorder, frames = make()
    recorder.loop_reported(1.0, {"perplexity": inf, "kl": 0.5})
    one_step(recorder, clock)
    assert frames.customs == [{"kl": 0.5}]
    (row,) = frames.rows
    assert (row["custom_nonfinite"], row["nonfinite"]) == (1.0, 0.0)


def test_a_step_waits_for_a_custom_value_from_a_device(clock):
    recorder, frames = make()
    late = Late()
    recorder.loop_reported(1.0, {"kl": late})
    one_step(recorder, clock)
    assert frames.customs == []
    late.number = 0.5
    one_step(recorder, clock)
    assert frames.customs == [{"kl": 0.5}, {}]


def test_what_no_step_follows_is_left_over_once(clock):
    recorder, _ = make()
    one_step(recorder, clock)
    recorder.loop_reported(None, {"val_loss": 0.5, "lost": Late(), "inf": inf})
    assert recorder.leftover() == {"val_loss": 0.5}
    assert recorder.leftover() == {}


def test_an_update_that_was_left_out_by_a_scaler_keeps_what_was_evaluated(clock):
    recorder, frames = make()
    recorder.loop_reported(None, {"val_loss": 0.5})
    recorder.skipped()
    one_step(recorder, clock)
    assert frames.customs == [{"val_loss": 0.5}]
