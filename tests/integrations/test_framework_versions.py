"""Frameworks that are too old: refused where a script asks for them, else left alone."""

import sys

import pytest

torch = pytest.importorskip("torch")

from esper_otel import loop  # noqa: E402
from esper_otel.integrations.training import require  # noqa: E402
from esper_otel.settings import SettingsError  # noqa: E402
from testkit.framework_loops import BATCH, FRAMEWORKS, ROWS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about one another


def test_a_framework_that_is_too_old_is_named_with_what_is_expected():
    with pytest.raises(SettingsError, match=r"torch .* is too old .*: expected 999 or newer"):
        require("torch", "999")


TOO_OLD = {"lightning": "2.1.4", "transformers": "4.45.0", "accelerate": "0.34.0"}


def imported(framework):
    """Its module, which Transformers replaces by another one when its trainer is imported."""
    pytest.importorskip("transformers.trainer" if framework == "transformers" else framework)
    return sys.modules[framework]


@pytest.mark.parametrize("framework", TOO_OLD)
def test_a_framework_that_is_too_old_trains_under_zero_code_as_any_loop(
    captured, way, framework, monkeypatch, caplog
):
    module = imported(framework)
    monkeypatch.setattr(loop, "_told", set())
    monkeypatch.setattr(module, "__version__", TOO_OLD[framework])
    for _ in range(2):
        way(framework, True)
    assert len(captured.frames) == 2 * ROWS // BATCH
    told = [r.message for r in caplog.records if "too old" in r.message]
    # Accelerate gets no callback, so there is nothing that its version would matter to.
    expected = [] if framework == "accelerate" else [f"{framework} {TOO_OLD[framework]} is"]
    assert [message.partition(" too old")[0] for message in told] == expected


@pytest.mark.parametrize("framework", TOO_OLD)
def test_a_callback_that_a_script_makes_refuses_a_framework_that_is_too_old(
    framework, monkeypatch
):
    module = imported(framework)
    monkeypatch.setattr(module, "__version__", TOO_OLD[framework])
    with pytest.raises(SettingsError, match=f"{framework} .* is too old .*: expected"):
        FRAMEWORKS[framework](watch=True)


def test_a_framework_of_unknown_version_is_not_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "unknown")
    require("torch", "999")
