"""Hyper-parameters: flat, bounded, and without secrets, whatever a script calls its config."""

from __future__ import annotations

import argparse
import dataclasses
import enum
from math import inf
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.events import CONFIGURED
from esper_otel.run_config import (
    LONGEST_NAME,
    LONGEST_VALUE,
    MOST,
    WITHHELD,
    RunConfig,
    arguments_of,
    flattened,
)


@dataclasses.dataclass
class Model:
    depth: int = 12
    act: str = "gelu"


class Kind(enum.Enum):
    FAST = 1


class Broken:
    def __str__(self):
        raise RuntimeError("no")


def test_what_is_nested_is_named_with_dots():
    given = {"lr": 3e-4, "model": Model(), "data": {"n": 2, 3: Path("x")}, "amp": True}
    assert flattened({**given, "more": argparse.Namespace(seed=0)}) == {
        "lr": 3e-4,
        "model.depth": 12,
        "model.act": "gelu",
        "data.n": 2,
        "data.3": "x",
        "amp": True,
        "more.seed": 0,
    }


def test_what_is_no_plain_value_becomes_text_that_is_the_same_in_every_process():
    given = {"none": None, "list": [1, 2.5, "a"], "kind": Kind.FAST, "inf": inf, "big": 1 << 70}
    assert flattened({**given, "object": object(), "call": print, "class": Model}) == {
        "none": "None",
        "list": "[1, 2.5, a]",
        "kind": "Kind.FAST",
        "inf": "inf",
        "big": float(1 << 70),
        "object": "object",
        "call": "print",
        "class": "Model",
    }


@pytest.mark.parametrize("values", ["lr=3", 3, [("lr", 3)], Kind.FAST])
def test_what_has_no_names_is_refused(values):
    with pytest.raises(TypeError, match="expected a mapping, a namespace or a dataclass"):
        flattened(values)


def test_one_odd_value_costs_only_itself(caplog):
    assert flattened({"odd": Broken(), "lr": 1.0}) == {"lr": 1.0}
    assert "run.config: odd is omitted" in caplog.text


def test_it_is_bounded_in_number_length_and_depth():
    deep: dict[str, object] = {}
    deep["again"] = deep
    found = flattened({"x" * 999: "y" * 999, "deep": deep, "new\nline": 1})
    assert max(map(len, found)) == LONGEST_NAME
    assert len(found["x" * LONGEST_NAME]) == LONGEST_VALUE
    assert "new_line" in found
    assert len(flattened({str(n): n for n in range(9999)})) <= MOST + 1


SECRETS = [
    {"password": "x"},
    {"db_passwd": 1234},
    {"apiKey": "abc"},
    {"API_KEY": "abc"},
    {"hf_token": "abc"},
    {"auth": {"user": "me"}},
    {"wandb.api_keys": ["abc"]},
    {"accesstoken": 123456789},
    {"client-secret": "x"},
    {"note": "hf_abcdefghijklmnop"},
    {"note": "uses sk-abcdefghijklmnop here"},
    {"note": "-----BEGIN PRIVATE KEY-----"},
    {"note": "eyJhbGciOiJIUzI1NiJ9.e30.x"},
]


@pytest.mark.parametrize("given", SECRETS, ids=str)
def test_a_secret_is_not_recorded(given):
    assert set(flattened({"model": given}).values()) == {WITHHELD}


@pytest.mark.parametrize(
    "given", [{"max_tokens": 512}, {"tokenizer": "bert"}, {"key_dim": 64}, {"author": "me"}]
)
def test_what_only_looks_like_one_is(given):
    assert flattened(given) == given


def test_a_password_within_an_address_is_cut_out():
    found = flattened({"url": "postgres://me:secret@host/db"})
    assert found == {"url": "postgres://host/db"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--lr 3e-4 --epochs=5", {"--lr": 3e-4, "--epochs": 5}),
        ("--amp --wd -1e-3 -b 8", {"--amp": True, "--wd": -1e-3, "-b": 8}),
        ("data/train out", {"argument 1": "data/train", "argument 2": "out"}),
        ("optim.lr=0.1 +model=big flag=true", {"optim.lr": 0.1, "+model": "big", "flag": True}),
        ("--api-key abc --password=x", {"--api-key": WITHHELD, "--password": WITHHELD}),
        ("--name= -- x", {"--name": "", "argument 1": "x"}),
        ("1_000 nan", {"argument 1": "1_000", "argument 2": "nan"}),
        ("", {}),
    ],
)
def test_arguments_of_a_script(words, expected):
    assert arguments_of(["train.py", *words.split()]) == expected


@given(st.lists(st.text(max_size=300), max_size=20))
def test_any_arguments_are_taken(words):
    found = arguments_of(["train.py", *words])
    assert all(isinstance(value, str | int | float | bool) for value in found.values())


def test_of_one_name_the_newest_counts_and_too_many_are_said_once(caplog):
    config = RunConfig()
    config.add({"--lr": 1.0})
    assert (config.is_new, config.is_explicit) == (True, False)
    config.add({"--lr": 2.0, "seed": 0}, explicit=True)
    event = config.take_event(7)
    assert (event.name, event.mark, config.is_new) == (CONFIGURED, 7, False)
    assert event.attributes == {"esper.config.--lr": 2.0, "esper.config.seed": 0}
    for _ in range(2):
        config.add({str(n): n for n in range(MOST + 5)})
    assert len(config.values) == MOST
    assert len(caplog.records) == 1
