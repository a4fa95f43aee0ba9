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
        baselines=_rows(("baseline", "what it is"), _coded(BASELINES)),
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
        told=", ".join(f"`{key}`" for key in STEP_KEYS if key in KNOWN_BEFORE_UPDATE),
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
    "not yet at as many as `for` asks",
    RuleState.FIRING: "its condition holds and has for long enough: the rule acts, unless it "
    "cools down, is inhibited or only observes",
    RuleState.RECOVERING: "it fired and its condition holds no longer, but it has not been "
    "released yet: it still acts",
    RuleState.UNKNOWN: "a value it needs is missing, a baseline still warms up, or nothing "
    "comes at all: nobody can say. What it had counted is kept; a rule that fired and is "
    "unknown does not act, and conservative mode does not end meanwhile",
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
    return _rows(("field", "values", "unless given", "meaning"), rows)


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

A table says when something is wrong with a run and what to do about it. It is YAML, read
by `tamiyo serve --table FILE`; two come with the package, `default` and `prototype`.
`default` compares a run with its own past. For loss and gradients that is what the run does by
itself: a value counts that is beyond the [record of its excursions](#records-of-excursions),
and most rules want several such steps. Factors of a baseline beside that are floors, below
which nothing is worth a word. `prototype` has fixed numbers, which fit the workload they were
made for.

`tamiyo check FILE` says what a table does, or what is wrong with it: every mistake with
its file, line and field, and rules that can never fire, never be heard or never end, or
that inhibit in vain. `tamiyo table default` prints a shipped table with its comments, and
`tamiyo table --schema > table.schema.json` writes the JSON Schema of tables: with
`# yaml-language-server: $schema=table.schema.json` as the first line most editors
complete and check a table while it is written. A file has at most {max_bytes:,} bytes and
{max_values:,} values, what stands behind an alias counted wherever it is used; a table at most
{max_rules:,} rules, and a rule {max_conditions} conditions.

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
    text: The loss goes on rising, beyond all that this run explains.
```

Every rule is tried at every step. PAUSE wins over OPTIMIZER, OPTIMIZER over a proposed
seed operation, that over CONTINUE; with the same action the higher severity wins, then
the order of the table. Every rule that fired is among the decision's findings, also when
another one won.

## A rule

A rule has one condition, or one group of them, and these fields.

{rule_fields}

`inhibits` was called `silences`, which is still read, with a warning.

## A table of your own

`tamiyo table default > mine.yaml` begins with all of `default`. A table that says only what
differs goes along with later releases:

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

- `extends` names a shipped table, or a file, relative to the one that says it. That may extend
  another in turn.
- A rule whose id the extended table has changes that rule field by field: what is not written
  stays. A rule with a condition keeps nothing of the former condition. Other rules are new, and
  follow behind.
- `remove` leaves rules out; rules that inhibit them no longer do.
- `baseline` and `conservative` change field by field as well. Without a `version` the table
  has that of the extended one.
- The hash in the version covers all files. While serving, a changed file takes effect whichever
  of them it is; tables that come with the package are not watched.
- A mistake is named with the file and line that it is in, also where that is the extended file.

A rule can be silenced for one run, while it runs, without a table:
[`tamiyo silence`](decisions.md#silence).

## Parameters

What a rule asks of the optimizer's update. A rule without any changes no update: OPTIMIZER
then only holds back a proposed seed operation, PAUSE only seeds.

{parameters}

A rule with parameters is evaluated twice. *After each step*, like every rule: the factor of
a decision made there stays in force from the next update on, and the trainer gives the rate
back when steps have been clean for a while. And *before an update*, by a trainer in
`enforce` mode that finds a value beyond one of its guards: what is decided then is about
this one update, so a gradient that would ruin the weights never reaches them.

- Guards are bounds on `loss`, `gradient_norm`, `optimizer_lr` and `nonfinite`, made from the
  rules with parameters and sent to the trainer when they change. In an `all` one condition
  on these metrics is enough to guard the rule, in an `any` every part needs one. A rule that
  cannot be guarded is evaluated before an update only when another rule's guard is crossed.
- Before an update these metrics are known: {told}. Conditions on others are unknown.
- The step counts as if it were the next observation: `for`, `of`, `cooldown` and `inhibits`
  count as usual, and nothing of the evaluation is remembered. A rule that fired and is
  `recovering` changes no update that is within its bounds.
- Of several rules, `restore` wins, then `skip_step`. Else `lr_scale` is that of the strongest
  rule with one, and `max_norm` the smallest of all.
- Rules about seeds, rules that compare ranks, and rules with `downgrade` are not evaluated
  before an update.

After a step, `restore` and the other parameters of its rule are also asked for when a stronger
rule wins: a PAUSE of seeds heals no weights. A trainer without a snapshot that is good does the
other parameters ([snapshots](enforcing.md#snapshots)).

## A condition

A metric and exactly one operator. The metrics are those of [metrics.md](metrics.md), the ones
worked out below, and `custom.NAME` for what the script
[reports itself](runs.md#values-of-your-own). A step without such a value leaves the condition
unknown.

{operators}

{condition_fields}

A value that is missing makes a condition unknown, never false. `all` is false when one
part is false and unknown when, failing that, one is unknown; `any` is true when one part
is true. Groups nest once.

With a `release` a rule that fired goes on until its condition does not hold with the
easier number either; in a group each condition may have one, and those that have none
keep their number.

## Baselines

{baselines}

`baseline` at the top of a table says what they span. A value is held against the past
only: it becomes part of a baseline after it was judged, and what is missing or was not
finite never does.

{baseline_fields}

## Records of excursions

A baseline says what is usual; a record says how far a run strays from it by itself.
`above_record` and `below_record` work on raw values. The ordinary state of a metric is a level
(the median of the newest values, the last {lag} left out) and a scatter (the 98th percentile of
what values lay above the level before them). A value that is more than one scatter out begins
an excursion, which ends after {calm} values within one scatter. What each excursion reached is
kept, and from it follows how far out chance alone may take the metric once in
`false_alarm_steps` observations: about four scatters with light-tailed noise, tens for a run
with outlier batches. A rule with `for` and `of` is compared with what so many values reached
*at once*: one outlier, however large, says nothing about six of eight. After {patience} values
outside, the metric has a new level. With `rising` a value counts only while it is a scatter
beyond the first three of its excursion: a change that is meant is farthest out at its
beginning, and what diverges goes on.

Until there is a level, and for as many observations again until there is a scatter, conditions
on a record are unknown: with the spans below a rule can fire after about 40 steps. A prior
stands in for the excursions that a young run has not had. A metric that has never moved, and is
zero, has no scatter, and conditions on it stay unknown. `run.phase_begins()` starts levels and
baselines anew; records stay.

A record is of how far single values stray. Whether a metric has come to *stay* somewhere else
is asked by `risen_for` and `fallen_for`, which look at no size: of a metric that stays as it
is, eleven values in a row are above its 80th percentile once in fifty million observations,
whatever its noise. In a metric that wanders by itself, as the losses of two networks against
each other, values are like their neighbours, and it happens: so such rules only tell, and
seldom.

{record_fields}

## Conservative mode

While it is on, every step with a proposed seed operation gets a PAUSE. Rules that say
`conservative: true` enter it. A step is clean when no rule has fired or is recovering, but
for those that only observe, only tell (action `CONTINUE`) or only downgrade. At the top of
a table, below `conservative`:

{conservative_fields}

## States

Each rule has a state for each rank and, if it is about seeds, for each seed.

{states}

## Warming up

A rank warms up while rules about its steps that act (their action is not `CONTINUE`, or they
begin conservative mode; neither `mode: observe` nor `downgrade`) have no past to compare with.
It lasts for as many steps, from the rank's first, as the longest of their conditions needs:
`warmup` for a baseline, `warmup` and `window` for a `frozen` one and for `runs_out_within`, and
twice the `warmup` of `record` and 16 for a record, and one and three quarters of `window` for
`risen_for` and `fallen_for`. So it ends after those steps also where a
metric never comes. A new process, a new phase of the training, and another table that needs
another past begin it anew. For the table `default` it is {warm_after} steps.

Meanwhile rules that need no past act, and a decision for which no rule fired has the reason
`warming_up` in place of `nominal`: `CONTINUE`, or `SEED` where the garden proposed something. A
trainer counts no such step as a clean one, and gives back nothing that it holds.

## Ranks and seeds

A rule with a seed's metric is judged for each seed by itself: its persistence, cool-down
and state are that seed's. Of several seeds for which it acts at a step, the first is named
in the decision; with a cool-down the next one has its turn at the next step.

A rule with `above_peers` or `below_peers` is judged in hindsight: of a step whose frame is
{hindsight} old, with the values and baselines of that step in all its conditions, when the
rank's next frame comes. What it finds counts from the frame after that one, and says which
`step` it is about. Ranks that only stream are heard later than one that asks; so a rank is
among the peers when it ended that step {arrival} before the frame at hand, by the times of
both, and only then. As long as everything arrives within {arrival}, in whatever order,
decisions are the same; what comes later is not compared. A rank that is alone is judged at
once: all that it lacks are the peers.

A rank that sends nothing breaks no rule that needs a frame. `missing_for` on the metric
`step` is for that; it takes no other condition beside it, no persistence and no action but
CONTINUE, for nobody asks. Silence is measured by the sidecar's own clock, from when a frame
came, so that a trainer's clock may be wrong. Whether a silence ended by a frame or the clock
noticed it first, it began at the same instant of the frames' time, so that a replay tells it
alike; only a frame that was late and not missing is told differently. One step counts for
ten times the others at most: a pause makes a rank a little more patient.

A rank that has said that its run ended is silent with good reason, and breaks no such rule.

With such a rule or without, `tamiyo status` and Tamiyo's metrics say `stale` of a rank that
was not heard of for {stale_after} of its step times, and for ten seconds at least, or for
ten minutes while only one step of it is known. Then its other rules are `unknown`, with what
they last were beside it.

## Metrics that Tamiyo works out

{derived}

## Another table without a restart

A table that is read again keeps what has not changed: the state of a rule that is the same
in every field, wherever it stands now, and the baselines that are still watched, unless
`window` or `warmup` changed. Records of a metric are kept while `record` and the `for` and `of`
that look at them are the same. Rules that are new or different begin unknown.
A restart of the sidecar does the same ([operating](operating.md#a-restart-of-tamiyo)).
"""
