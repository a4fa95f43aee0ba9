"""The tables of the package, beside one another."""

import pytest

from esper_otel.leyline.decisions import RANK_OF, Action
from esper_tamiyo.language.table_file import load

RULE_IDS = {
    "hook_budget",
    "step_latency_high",
    "kasmina_apply_slow",
    "kasmina_finalize_slow",
    "isolation_violations",
    "loss_spike",
    "loss_warning",
    "loss_volatility_high",
    "grad_variance_high",
    "grad_conflict_high",
    "optimizer_hint",
    "optimizer_stale",
    "device_pressure_high",
    "cpu_pressure_high",
    "nonfinite_loss",
}


GONE = {"loss_volatility_high", "grad_variance_high", "optimizer_stale"}
"""Rules that the default table does without: what is smoothed remembers one outlier as many."""


@pytest.mark.parametrize("name", ["default", "prototype"])
def test_shipped_tables_are_valid_and_have_every_rule_of_the_prototype(name):
    rules = {rule.id: rule for rule in load(name).rules}
    gone = GONE if name == "default" else set()
    assert rules.keys() >= RULE_IDS - gone
    assert not rules.keys() & gone
    assert all(rule.text for rule in rules.values())


def test_shipped_tables_agree_on_severity_and_action():
    """But that the default table only tells what no action would be an answer to."""
    default = {rule.id: rule for rule in load("default").rules}
    only_told = {"hook_budget", "step_latency_high", "loss_spike", "optimizer_hint"}
    holds_seeds_back = {"loss_spike"}
    for rule in load("prototype").rules:
        if rule.id in GONE:
            continue
        other = default[rule.id]
        if rule.id in only_told:
            assert other.action is Action.CONTINUE, rule.id
            assert other.conservative == (rule.id in holds_seeds_back), rule.id
            assert RANK_OF[other.severity] <= RANK_OF[rule.severity]
        else:
            assert (other.severity, other.action) == (rule.severity, rule.action), rule.id
            assert other.conservative == rule.conservative
        assert other.downgrade == rule.downgrade


def test_no_rule_of_the_default_table_promises_the_optimizer_what_it_does_not_do():
    for rule in load("default").rules:
        assert rule.parameters or rule.downgrade or rule.action is not Action.OPTIMIZER
