"""Settings from the environment: every variable, every kind of mistake."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from esper_otel import settings as settings_module
from esper_otel.settings import (
    Blending,
    EsperSettings,
    Fossils,
    Growth,
    Mode,
    Schedule,
    SettingsError,
    Summaries,
)


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has read no settings yet."""
    monkeypatch.setattr(settings_module, "_told", set())


VARIABLES = [
    ("TOLARIA_STEP_ENRICHMENT_ENABLED", "false", "tolaria_step_enrichment_enabled", False),
    ("TOLARIA_STEP_ENRICHMENT_ENABLED", "0", "tolaria_step_enrichment_enabled", False),
    ("TOLARIA_STEP_ENRICHMENT_ENABLED", "True", "tolaria_step_enrichment_enabled", True),
    ("ESPER_RUN_ID", "night-3", "run_id", "night-3"),
    ("ESPER_RUN_ID", "7", "run_id", "7"),
    ("ESPER_MODE", "off", "mode", Mode.OFF),
    ("ESPER_MODE", "enforce", "mode", Mode.ENFORCE),
    ("ESPER_TAMIYO_SOCKET", "/run/t.sock", "tamiyo_socket", "/run/t.sock"),
    ("ESPER_TAMIYO_DEADLINE_MS", "2.5", "tamiyo_deadline_ms", 2.5),
    ("ESPER_RANKS_AGREE", "false", "ranks_agree", False),
    ("ESPER_LOCAL_RANK", "1", "local_rank", 1),
    ("LOCAL_RANK", "1", "local_rank", 1),
    ("ESPER_RANKS_TIMEOUT_S", "5", "ranks_timeout_s", 5.0),
    ("ESPER_COMPILE_SEEDS", "true", "compile_seeds", True),
    ("ESPER_STREAM_INTERVAL_MS", " 250 ", "stream_interval_ms", 250.0),
    ("ESPER_RING_STEPS", "64", "ring_steps", 64),
    ("ESPER_SPOOL_MB", "1", "spool_mb", 1.0),
    ("ESPER_SPOOL_DIR", "/var/spool", "spool_dir", "/var/spool"),
    ("ESPER_RECORDING_DIR", "rec", "recording_dir", "rec"),
    ("ESPER_RECORD", "true", "record", True),
    ("ESPER_RUNS_DIR", "/runs", "runs_dir", "/runs"),
    ("ESPER_NAME", "base line", "name", "base line"),
    ("ESPER_TAGS", "team=vision", "tags", "team=vision"),
    ("ESPER_ARGUMENTS", "false", "arguments", False),
    ("ESPER_FLUSH_TIMEOUT_S", "0", "flush_timeout_s", 0.0),
    ("ESPER_SPAN_EVERY", "0", "span_every", 0),
    ("ESPER_SPAN_SLOW_FACTOR", "3", "span_slow_factor", 3.0),
    ("ESPER_LR_SCALE_MIN", "0.1", "lr_scale_min", 0.1),
    ("ESPER_LR_SCALE_MAX", "2", "lr_scale_max", 2.0),
    ("ESPER_WAIT_FOR_DECISIONS", "true", "wait_for_decisions", True),
    ("ESPER_RELEASE_STEPS", "9", "release_steps", 9),
    ("ESPER_SNAPSHOT_EVERY", "100", "snapshot_every", 100),
    ("ESPER_SNAPSHOT_RESTORES_MAX", "5", "snapshot_restores_max", 5),
    ("ESPER_PRIMARY_OPTIMIZER", "AdamW", "primary_optimizer", "AdamW"),
    ("ESPER_LOSSES_ARE_SHARES", "true", "losses_prescaled", True),
    ("ESPER_REPORT", "run.html", "report", "run.html"),
    ("ESPER_SUMMARY", "json", "summary", Summaries.JSON),
    ("ESPER_GROWTH", "autonomous", "growth", Growth.AUTONOMOUS),
    ("ESPER_PLATEAU_STEPS", "20", "plateau_steps", 20),
    ("ESPER_PLATEAU_IMPROVEMENT", "0.02", "plateau_improvement", 0.02),
    ("ESPER_SEEDS_AT_ONCE", "3", "seeds_at_once", 3),
    ("ESPER_TRAINING_STEPS", "7", "training_steps", 7),
    ("ESPER_BLENDING_STEPS", "8", "blending_steps", 8),
    ("ESPER_SHADOWING_STEPS", "9", "shadowing_steps", 9),
    ("ESPER_PROBATION_STEPS", "10", "probation_steps", 10),
    ("ESPER_PATIENCE_STEPS", "11", "patience_steps", 11),
    ("ESPER_EMBARGO_STEPS", "0", "embargo_steps", 0),
    ("ESPER_EMBARGO_S", "0.5", "embargo_s", 0.5),
    ("ESPER_BLENDING", "channelwise", "blending", Blending.CHANNELWISE),
    ("ESPER_ALPHA_SCHEDULE", "sigmoid", "alpha_schedule", Schedule.SIGMOID),
    ("ESPER_ALPHA_TEMPERATURE", "2", "alpha_temperature", 2.0),
    ("ESPER_FOSSILS", "stay", "fossils", Fossils.STAY),
    ("ESPER_ISOLATION_EVERY", "0", "isolation_every", 0),
    ("ESPER_KERNEL_BUDGET_MS", "50", "kernel_budget_ms", 50.0),
    ("ESPER_GRADIENT_RATIO_MAX", "10", "gradient_ratio_max", 10.0),
    ("ESPER_LOSS_RISE_MAX", "0.2", "loss_rise_max", 0.2),
    ("ESPER_LOSS_FALL_MIN", "0.05", "loss_fall_min", 0.05),
    ("ESPER_STEP_RISE_MAX", "1", "step_rise_max", 1.0),
]


@pytest.mark.parametrize(("variable", "text", "field", "value"), VARIABLES)
def test_a_variable_sets_its_field(variable: str, text: str, field: str, value: Any) -> None:
    settings = EsperSettings.from_environment({variable: text})
    assert getattr(settings, field) == value
    assert type(getattr(settings, field)) is type(value)
    others = set(EsperSettings.__struct_fields__) - {field}
    assert all(getattr(settings, name) == getattr(EsperSettings(), name) for name in others)


def test_every_field_is_in_the_table_above() -> None:
    tested = {field for _, _, field, _ in VARIABLES} | {"rank", "world_size"}
    assert tested == set(EsperSettings.__struct_fields__)


@pytest.mark.parametrize(
    ("environ", "rank", "world_size"),
    [
        ({}, 0, 1),
        ({"RANK": "3", "WORLD_SIZE": "4"}, 3, 4),
        ({"RANK": "3", "WORLD_SIZE": "4", "ESPER_RANK": "1", "ESPER_WORLD_SIZE": "2"}, 1, 2),
        ({"RANK": "", "WORLD_SIZE": ""}, 0, 1),
    ],
)
def test_rank_is_torchruns_unless_said_otherwise(
    environ: dict[str, str], rank: int, world_size: int
) -> None:
    settings = EsperSettings.from_environment(environ)
    assert (settings.rank, settings.world_size) == (rank, world_size)


def test_arguments_win_over_the_environment() -> None:
    environ = {"ESPER_MODE": "advise", "ESPER_SPAN_EVERY": "many"}
    settings = EsperSettings.from_environment(environ, mode="off", span_every=5)
    assert settings.mode is Mode.OFF
    assert settings.span_every == 5


def test_an_empty_variable_is_not_set() -> None:
    assert EsperSettings.from_environment({"ESPER_RING_STEPS": ""}) == EsperSettings()


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("TOLARIA_STEP_ENRICHMENT_ENABLED", "maybe", "expected true or false"),
        ("ESPER_MODE", "enforced", "expected off, advise or enforce"),
        ("ESPER_TAMIYO_DEADLINE_MS", "fast", "expected a number"),
        ("ESPER_TAMIYO_DEADLINE_MS", "0", "expected a number from 0.1 to 60000"),
        ("ESPER_TAMIYO_DEADLINE_MS", "nan", "expected a number from 0.1 to 60000"),
        ("ESPER_STREAM_INTERVAL_MS", "0.5", "expected a number from 1 to 60000"),
        ("ESPER_RING_STEPS", "8", "expected a number from 16 to 4.1943e+06"),
        ("ESPER_RING_STEPS", "100.5", "expected a whole number"),
        ("ESPER_SPOOL_MB", "-1", "expected a number from 0.01 to 65536"),
        ("ESPER_FLUSH_TIMEOUT_S", "601", "expected a number from 0 to 600"),
        ("ESPER_SPAN_EVERY", "-1", "expected a number from 0 to inf"),
        ("ESPER_SPAN_SLOW_FACTOR", "0.5", "expected a number from 1 to inf"),
        ("ESPER_LR_SCALE_MIN", "1.5", "expected a number from 0 to 1"),
        ("ESPER_LR_SCALE_MAX", "0.5", "expected a number from 1 to 1000"),
        ("ESPER_RELEASE_STEPS", "0", "expected a number from 1 to inf"),
        ("ESPER_SNAPSHOT_EVERY", "-1", "expected a number from 0 to inf"),
        ("ESPER_RANK", "-1", "expected a number from 0 to inf"),
        ("WORLD_SIZE", "0", "expected a number from 1 to inf"),
        ("RANK", "first", "expected a whole number"),
    ],
)
def test_a_bad_value_is_named_with_its_variable_and_the_default_takes_its_place(
    variable: str, text: str, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert EsperSettings.from_environment({variable: text}) == EsperSettings()
    (message,) = [record.getMessage() for record in caplog.records]
    with pytest.raises(SettingsError, match=expected.replace("+", "[+]")):
        EsperSettings.read({variable: text})
    assert message.startswith(f"{variable}=")
    assert text in message
    assert expected in message
    assert "\n" not in message


def test_a_bad_argument_is_named_by_its_field() -> None:
    with pytest.raises(SettingsError, match=r"^ring_steps=1: expected a number from 16"):
        EsperSettings.from_environment({}, ring_steps=1)
    with pytest.raises(SettingsError, match=r"^mode='loud': expected off, advise or enforce"):
        EsperSettings.from_environment({}, mode="loud")
    with pytest.raises(SettingsError, match=r"^run_id=7: expected text"):
        EsperSettings.from_environment({}, run_id=7)


def test_a_rank_outside_its_world_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    settings = EsperSettings.from_environment({"RANK": "2", "WORLD_SIZE": "2"})
    assert (settings.rank, settings.world_size) == (0, 2)
    assert "RANK=2: expected less than the size of the world, 2" in caplog.text
    with pytest.raises(SettingsError, match="rank=2: expected less than"):
        EsperSettings.from_environment({}, rank=2, world_size=2)


def test_several_bad_values_are_each_told_once_and_the_good_ones_are_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    environ = {"ESPER_MODE": "loud", "ESPER_RING_STEPS": "1", "ESPER_SPAN_EVERY": "7"}
    for _ in range(2):
        assert EsperSettings.from_environment(environ) == EsperSettings(span_every=7)
    assert [record.getMessage().partition("=")[0] for record in caplog.records] == [
        "ESPER_MODE",
        "ESPER_RING_STEPS",
    ]


def test_a_socket_that_the_system_cannot_take_is_a_mistake(
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = "/" + "x" * 107
    assert EsperSettings.from_environment({"ESPER_TAMIYO_SOCKET": path}).tamiyo_socket == ""
    assert "a Unix socket's path may have 107 bytes, this has 108" in caplog.text
    with pytest.raises(SettingsError, match=r"^tamiyo_socket="):
        EsperSettings.from_environment({}, tamiyo_socket=path)


def test_a_misspelt_variable_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    settings = EsperSettings.from_environment({"ESPER_TAMIYO_DEADLINE": "1", "ESPRESSO": "2"})
    assert settings == EsperSettings()
    assert [record.getMessage() for record in caplog.records] == [
        "ESPER_TAMIYO_DEADLINE is set, but esper-otel has no such setting"
    ]
    assert caplog.records[0].name == "esper_otel"


def test_that_is_told_once_per_process(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        EsperSettings.from_environment({"ESPER_SPAM": "1"})
    EsperSettings.from_environment({"ESPER_SPAM": "1", "ESPER_HAM": "2"})
    assert [record.getMessage().split()[0] for record in caplog.records] == [
        "ESPER_SPAM",
        "ESPER_HAM",
    ]


@pytest.mark.parametrize(("local_rank", "times"), [("", 1), ("0", 1), ("1", 0)])
def test_of_the_ranks_on_a_host_the_first_tells_it(
    local_rank: str, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    EsperSettings.from_environment({"ESPER_SPAM": "1", "LOCAL_RANK": local_rank})
    assert len(caplog.records) == times


def test_who_reads_for_another_process_leaves_telling_to_that(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert EsperSettings.read({"ESPER_SPAM": "1", "ESPER_RUN_ID": "r"}).run_id == "r"
    assert caplog.records == []


def test_known_variables_are_not_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    EsperSettings.from_environment({variable: text for variable, text, _, _ in VARIABLES})
    assert caplog.records == []


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_RUN_ID", "from-outside")
    assert EsperSettings.from_environment().run_id == "from-outside"


def test_unsent_telemetry_is_left_where_state_belongs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert EsperSettings().spool_path == tmp_path / "esper" / "spool"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert EsperSettings().spool_path == tmp_path / ".local" / "state" / "esper" / "spool"
    assert EsperSettings(spool_dir="here").spool_path == Path("here")
    monkeypatch.setenv("XDG_STATE_HOME", "not/absolute")
    assert EsperSettings().spool_path == tmp_path / ".local" / "state" / "esper" / "spool"


def test_who_has_no_home_has_a_folder_for_what_is_unsent_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert EsperSettings().spool_path == tmp_path / f"esper-{os.getuid()}" / "esper" / "spool"


def test_settings_do_not_change() -> None:
    settings = EsperSettings()
    with pytest.raises(AttributeError):
        settings.rank = 1  # type: ignore[misc]
    assert msgspec.structs.replace(settings, rank=1, world_size=2).rank == 1
