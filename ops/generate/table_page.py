"""Makes ``docs/tables.md`` from the classes of a table."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from math import inf
from pathlib import Path

import msgspec

from esper_otel.leyline.metrics import STEP_KEYS
from esper_tamiyo.judging.excursions import CALM, LAG, PATIENCE
from esper_tamiyo.judging.liveness import STALE_AFTER_STEPS
from esper_tamiyo.judging.observer import RuleState
from esper_tamiyo.judging.peers import ARRIVAL_NS, HINDSIGHT_NS
from esper_tamiyo.judging.rulebook import Rulebook
from esper_tamiyo.language.derived import DERIVED
from esper_tamiyo.language.operators import (
    BASELINES,
    FORMS,
    BaselineKind,
    Operand,
)
from esper_tamiyo.language.parameters import PARAMETERS, Parameter
from esper_tamiyo.language.table import (
    KNOWN_BEFORE_UPDATE,
    MAX_CONDITIONS,
    MAX_RULES,
    Baseline,
    Condition,
    Conservative,
    RecordSpan,
    Rule,
    meta,
)
from esper_tamiyo.language.table_file import load
from esper_tamiyo.language.yaml_nodes import MAX_BYTES, MAX_VALUES
from ops.generate.files import COMMAND
from ops.generate.table_schema import OPERANDS, REQUIRED, property_of, rule_fields, yaml_name

PAGE = Path("docs/tables.md")


def files() -> dict[Path, str]:
    """What is written, by its place in the repository."""
    return {PAGE: page()}


def page() -> str:
    """The reference page, as Markdown."""
    return _TEMPLATE.format(
        command=COMMAND,
        rule_fields=_fields(Rule, rule_fields()),
        operators=_operators(),
        condition_fields=_fields(
            Condition, ("metric", "baseline", "baseline_of", "release", "rising")
        ),
        baselines=_rows(("baseline", "definition"), _coded(BASELINES)),
        baseline_fields=_fields(Baseline, Baseline.__struct_fields__),
        record_fields=_fields(RecordSpan, RecordSpan.__struct_fields__),
        conservative_fields=_fields(Conservative, Conservative.__struct_fields__),
        max_bytes=MAX_BYTES,
        max_values=MAX_VALUES,
        max_rules=MAX_RULES,
        max_conditions=MAX_CONDITIONS,
        lag=LAG,
        calm=CALM,
        patience=PATIENCE,
        derived=_rows(
            ("key", "unit", "meaning", "when"),
            [
                (f"`{one.key}`", f"`{one.unit}`", one.meaning, one.when)
                for one in (row.metric for row in DERIVED)
            ],
        ),
        parameters=_rows(
            ("parameter", "values", "of", "meaning"),
            [
                (f"`{name}`", _takes(one), ", ".join(one.actions), one.meaning)
                for name, one in PARAMETERS.items()
            ],
        ),
        known=", ".join(f"`{key}`" for key in STEP_KEYS if key in KNOWN_BEFORE_UPDATE),
        arrival=f"{ARRIVAL_NS / 1e9:g} s",
        hindsight=f"{HINDSIGHT_NS / 1e9:g} s",
        stale_after=STALE_AFTER_STEPS,
        warm_after=Rulebook(load("default")).warm_after,
        states=_rows(
            ("state", "meaning"),
            [(f"`{state.value}`", meaning) for state, meaning in STATES.items()],
        ),
    )


STATES: dict[RuleState, str] = {
    RuleState.INACTIVE: "its condition does not hold",
    RuleState.PENDING: "its condition holds, or did at some of the last `of` observations, but "
    "at fewer than `for` requires",
    RuleState.FIRING: "its condition has held for long enough: the rule acts, unless it "
    "cools down, is inhibited or only observes",
    RuleState.RECOVERING: "it fired and its condition no longer holds, but it is not "
    "released yet: it still acts",
    RuleState.UNKNOWN: "a required value is missing, a baseline still warms up, or no step "
    "records arrive. The rule keeps its count; a rule that fired and is unknown does not act, "
    "and conservative mode does not end meanwhile",
}


def _takes(one: Parameter) -> str:
    if one.flag:
        return "`true`"
    return f"above 0, at most {one.most:g}" if one.most < inf else "above 0"


def _operators() -> str:
    rows = []
    for operator, form in FORMS.items():
        kind = OPERANDS[form.operand][0]
        if form.operand is Operand.COUNT:
            kind += f", at least {form.least}"
        eases = {-1: "lower", 0: "", 1: "higher"}[form.eases]
        rows.append((f"`{operator.value}`", kind, form.meaning, eases))
    return _rows(("operator", "takes", "holds when", "its `release` is"), rows)


def _fields(owner: type[msgspec.Struct], names: Sequence[str]) -> str:
    rows = []
    for name in names:
        bounds = meta(owner, name)
        rows.append(
            (
                f"`{yaml_name(owner, name)}`",
                _values(owner, name),
                "required" if name in REQUIRED else _default(owner, name),
                str(bounds.description),
            )
        )
    return _rows(("field", "values", "default", "meaning"), rows)


def _values(owner: type[msgspec.Struct], field: str) -> str:
    described = property_of(owner, field)
    if "enum" in described:
        return ", ".join(f"`{value}`" for value in described["enum"])
    kind = described.get("type")
    if kind == "integer":
        return f"{described['minimum']} to {described['maximum']:,}"
    names = {
        "boolean": "`true`, `false`",
        "number": "a number",
        "array": "a list",
        "object": "a mapping",
    }
    return names.get(str(kind), "text")


def _default(owner: type[msgspec.Struct], field: str) -> str:
    if field == "of":
        return "`for`"
    place = len(owner.__struct_fields__) - owner.__struct_fields__.index(field)
    defaults = owner.__struct_defaults__
    value = defaults[-place] if place <= len(defaults) else None
    if value is None or value in ("", (), {}) or not isinstance(value, bool | int | StrEnum):
        return ""
    return f"`{str(value).lower()}`"


def _coded(meanings: dict[BaselineKind, str]) -> list[tuple[str, str]]:
    return [(f"`{kind.value}`", meaning) for kind, meaning in meanings.items()]


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_TEMPLATE = """\
<!-- Made by {command}; edits here are lost. -->

# Threshold tables

A table is the rule set of the sidecar: its rules detect trouble in a run and choose the
response. It is YAML, loaded by `tamiyo serve --table FILE`. Two tables ship with the package,
`default` and `prototype`. `default` compares a run with its own past. For loss and gradients
that past is the run's own variation: a value must exceed the [record of its
excursions](#records-of-excursions), and most rules need several such steps. Baseline factors
in these rules are floors, below which no value matters. `prototype` has fixed numbers, which
fit the workload they were made for.

`tamiyo check FILE` validates a table and describes it. It reports every mistake with its file,
line and field, and also unreachable, always-inhibited or never-resolving rules and no-op
inhibitions. `tamiyo table default` prints a shipped table with its comments.
`tamiyo table --schema > table.schema.json` writes the JSON Schema of tables: with
`# yaml-language-server: $schema=table.schema.json` as the first line, most editors complete
and validate a table. A file has at most {max_bytes:,} bytes and {max_values:,} values,
counting aliases wherever they are used; a table has at most {max_rules:,} rules, and a rule
{max_conditions} conditions.

```yaml
version: mine-1
rules:
  - id: loss_diverging
    all:
      - metric: loss
        above_record: 1
        rising: true
      - metric: loss
        above_baseline: 1.5
        release: 1.2
    for: 3
    of: 4
    cooldown: 15
    severity: HIGH
    action: OPTIMIZER
    parameters: {{lr_scale: 0.25}}
    text: The loss keeps rising, beyond all that this run explains.
```

Every rule is evaluated at every step. PAUSE wins over OPTIMIZER, OPTIMIZER over a proposed
seed operation, and that over CONTINUE. Among rules with the same action the higher severity
wins, then the order of the table. Every rule that fired is among the decision's findings, even
if another one won.

## A rule

A rule has one condition, or one group of conditions, and these fields.

{rule_fields}

The former name of `inhibits` is `silences`, which is still accepted with a warning.

## A table of your own

`tamiyo table default > mine.yaml` starts from a full copy of `default`. A table that lists
only its differences follows later releases:

```yaml
extends: default
remove: [loss_fell]
rules:
  - id: loss_spike
    cooldown: 100
  - id: gradient_spike
    metric: gradient_norm
    above_baseline: 130
```

- `extends` names a shipped table, or a file relative to the extending one. That file may extend
  another in turn.
- A rule with an id of the extended table changes that rule field by field; unlisted fields
  stay. A rule with a condition replaces the whole former condition. Other rules are new and
  are appended.
- `remove` deletes rules; rules that inhibit them no longer do.
- `baseline` and `conservative` also change field by field. Without a `version` the table has
  that of the extended one.
- The hash in the version covers all files. While the sidecar serves, a change to any of these
  files takes effect; shipped tables are not watched.
- An error message names the file and line of the mistake, even if that is the extended file.

[`tamiyo silence`](decisions.md#silence) suppresses a rule for one run while it trains, without
a table.

## Parameters

Parameters are the changes that a rule requests of the optimizer's update. A rule without any
changes no update: OPTIMIZER then only holds back a proposed seed operation, and PAUSE only
pauses seeds.

{parameters}

A rule with parameters is evaluated twice. *After each step*, like every rule: the factor of
that decision stays in force from the next update on, and the trainer restores the learning
rate after a number of clean steps. And *before an update*, for a trainer in `enforce` mode
that finds a value beyond one of its guards. That decision is about this one update, so a
gradient that would ruin the weights never reaches them.

- Guards are bounds on `loss`, `gradient_norm`, `optimizer_lr`, `optimizer_momentum` and
  `nonfinite`. The sidecar derives them from the rules with parameters and sends them to the
  trainer when they change.
  In an `all` one condition on these metrics is enough to guard the rule; in an `any` every
  part needs one. A rule without a guard is evaluated before an update only when another rule's
  guard is crossed.
- These metrics are known before an update: {known}. Conditions on others are unknown.
- A rule with `usual_norm`, `usual_rate` or `usual_momentum` whose conditions (`above`,
  `at_least`, `above_baseline`, `above_record`, in an `all`) are on that metric alone, without
  `for` and `cooldown`, also applies without an answer: its guard carries the bound and the
  usual value.
- The step counts as if it were the next observation: `for`, `of`, `cooldown` and `inhibits`
  count as usual, and the evaluation leaves no trace in the rule's state. A rule that fired and
  is `recovering` changes no update within its bounds.
- Of several rules, `restore` wins, then `skip_step`. Otherwise `lr_scale` and `momentum_scale`
  are those of the strongest rule with one, and `max_norm` is the smallest of all.
- Rules about seeds, rules that compare ranks, and rules with `downgrade` are not evaluated
  before an update.

After a step, a decision includes `restore` and the other parameters of its rule even if a
stronger rule wins, because a PAUSE of seeds does not repair weights. A trainer without a good
snapshot applies the other parameters ([snapshots](enforcing.md#snapshots)).

## A condition

A condition has a metric and exactly one operator. The metrics are those of
[metrics.md](metrics.md), the derived ones below, and `custom.NAME` for values that the script
[reports itself](runs.md#values-of-your-own). A step without such a value leaves the condition
unknown.

{operators}

{condition_fields}

A missing value makes a condition unknown, never false. `all` is false when one part is false
and, failing that, unknown when one part is unknown; `any` is true when one part is true.
Groups nest once.

With a `release`, a rule that fired stays active until its condition does not hold with the
easier number either (hysteresis). In a group each condition may have one, and those without
one keep their number.

## Baselines

{baselines}

`baseline` at the top of a table sets their spans. A value is compared only with the past: it
enters a baseline after its evaluation, and a missing or non-finite value never does.

{baseline_fields}

## Records of excursions

A baseline is the usual value; a record is the run's own variation around it. `above_record`
and `below_record` use raw values. The ordinary state of a metric has a level (the median of
the newest values, excluding the last {lag}) and a scatter (the 98th percentile of the
distances of values above the level before them). A value more than one scatter away begins an
excursion, which ends after {calm} values within one scatter. The record keeps the extent of
each excursion. From these it estimates how far chance alone may take the metric once in
`false_alarm_steps` observations: about four scatters with light-tailed noise, tens for a run
with outlier batches. A rule with `for` and `of` is compared with the extent that so many
values reached *at once*: one outlier, however large, says nothing about six of eight. After
{patience} values outside, the metric has a new level. With `rising` a value counts only while
it is a scatter beyond the first three of its excursion: an intended change is farthest out at
its beginning, while a divergence continues.

Conditions on a record are unknown until there is a level, and for as many observations again
until there is a scatter. With the spans below a rule can fire after about 40 steps. A prior
stands in for the excursions that a young run has not had yet. A metric that has never moved,
and is zero, has no scatter, and conditions on it stay unknown. `run.phase_begins()` resets
levels and baselines and keeps records.

A record is about the distance of single values. `risen_for` and `fallen_for` detect whether a
metric has *moved* to another level, whatever the size of the change. In a metric that does not
change, eight values in a row are above its 80th percentile once in 400,000 observations,
whatever its noise. In a metric that wanders by itself, such as the losses of two competing
networks, successive values are alike, and stay there together. So the number counts values
that are independent of each other: a metric that moves less between observations than over
eight of them (with a `window` of 64) needs as many times more, at most four times. Outliers and
steady trends do not count in this ratio.

{record_fields}

## Conservative mode

In conservative mode every step with a proposed seed operation gets a PAUSE. Rules with
`conservative: true` enter it. A step is clean when no rule has fired or is recovering, except
rules that only observe, only report (action `CONTINUE`) or only downgrade. The fields are at
the top of a table, below `conservative`:

{conservative_fields}

## States

Each rule has a state for each rank and, if it is about seeds, for each seed.

{states}

## Warming up

A rank warms up while its rules with an effect lack the past that they compare with. Such rules
are about its steps and act (their action is not `CONTINUE`, or they begin conservative mode;
neither `mode: observe` nor `downgrade`). The warm-up lasts, from the rank's first step, as
many steps as the longest of their conditions needs: `warmup` for a baseline, `warmup` and
`window` for a `frozen` one and for `runs_out_within`, twice the `warmup` of `record` and 16 for
a record, and one and three quarters of `window` for `risen_for` and `fallen_for`. It ends after
those steps even if a metric never arrives. A new process, a new phase of the training, and
another table that needs another past restart it. For the table `default` it is {warm_after}
steps.

During warm-up, rules that need no past act. A decision for which no rule fired has the reason
`warming_up` in place of `nominal`: `CONTINUE`, or `SEED` where the garden proposed something. A
trainer does not count such a step as clean, and restores nothing.

## Ranks and seeds

A rule with a seed's metric is evaluated for each seed separately, with its own persistence,
cool-down and state. If it acts for several seeds at a step, the decision names the first; with
a cool-down the next one follows at the next step.

A rule with `above_peers` or `below_peers` has a delayed evaluation. When the rank's next step
record arrives, the sidecar evaluates the step whose record is {hindsight} old, with the values
and baselines of that step in all its conditions. The findings count from the following step
record, and include the `step` that they are about. Ranks that only stream arrive later than
one that sends decision requests. A rank therefore is a peer only if it ended that step
{arrival} before the current step record, by the times of both. If everything arrives within
{arrival}, in any order, decisions are the same; later records are not compared. A rank without
peers is evaluated at once, with the peers missing.

A rank that sends nothing triggers no rule that needs a step record. `missing_for` on the
metric `step` detects it; it accepts no other condition beside it, no persistence and no action
but CONTINUE, because no request waits for an answer. The sidecar measures the silence with its
own clock, from the arrival of a step record, so a wrong clock on the trainer does not matter.
The silence begins at the same instant of the records' time whether a record ended it or the
clock noticed it first, so a replay reports it the same way; only a record that was late and
not missing differs. One step counts for ten times the others at most: a pause makes the
timeout of a rank slightly longer.

A rank that has reported the end of its run is expected to be silent and triggers no such rule.

With or without such a rule, `tamiyo status` and Tamiyo's metrics report a rank as `stale` when
no step record has arrived for {stale_after} of its step times, and for at least ten seconds,
or for ten minutes while only one of its steps is known. Its other rules are then `unknown`,
and the status shows their previous states.

## Derived metrics

{derived}

## Reloading a table

A reloaded table keeps all unchanged parts: the state of a rule with identical fields, at any
position in the table, and the baselines that are still in use, unless `window` or `warmup`
changed. Records of a metric are kept while `record` and the `for` and `of` of their rules are
the same. New or changed rules begin as unknown. A restart of the sidecar does the same
([operating](operating.md#a-restart-of-tamiyo)). """
