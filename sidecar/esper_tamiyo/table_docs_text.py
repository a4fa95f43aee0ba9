"""The words of ``docs/tables.md`` around what the classes of a table say."""

PAGE_TEXT = """\
<!-- Made by python -m esper_tamiyo.table_docs; edits here are lost. -->

# Threshold tables

A table says when something is wrong with a run and what to do about it. It is YAML, read
by `tamiyo serve --table FILE`; two come with the package, `default` and `prototype`.
`default` holds a run against its own past, and a rise of the loss against the size that the
loss had: where that is far below zero (a log-likelihood of -50) it has to rise by half its
size before `loss_spike` speaks, however unusual a smaller jump would be.
`tamiyo check FILE` says what a table does, or what is wrong with it: every mistake with
its file, line and field, and rules that can never fire, never be heard or never end, or
that silence in vain. `table.schema.json` beside this page is its JSON Schema: with
`# yaml-language-server: $schema=table.schema.json` as the first line most editors
complete and check a table while it is written.

```yaml
version: mine-1
rules:
  - id: loss_diverging
    all:
      - metric: loss
        above_baseline: 2
        release: 1.5
      - metric: loss_volatility
        above_baseline: 10
    for: 2
    cooldown: 15
    severity: HIGH
    action: OPTIMIZER
    parameters: {{lr_scale: 0.25}}
    text: The loss stays several times above its baseline.
```

Every rule is tried at every step. PAUSE wins over OPTIMIZER, OPTIMIZER over a proposed
seed operation, that over CONTINUE; with the same action the higher severity wins, then
the order of the table. Every rule that fired is among the decision's findings, also when
another one won.

## A rule

A rule has one condition, or one group of them, and these fields.

{rule_fields}

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
- The step counts as if it were the next observation: `for`, `of`, `cooldown` and `silences`
  count as usual, and nothing of the evaluation is remembered. A rule that fired and is
  `recovering` changes no update that is within its bounds.
- Of several rules, `skip_step` wins. Else `lr_scale` is that of the strongest rule with one,
  and `max_norm` the smallest of all.
- Rules about seeds, rules that compare ranks, and rules with `downgrade` are not evaluated
  before an update.

## A condition

A metric and exactly one operator. The metrics are those of [metrics.md](metrics.md), and
the ones worked out below.

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

## Conservative mode

While it is on, every step with a proposed seed operation gets a PAUSE. Rules that say
`conservative: true` enter it. A step is clean when no rule has fired or is recovering, but
for those that only observe, only tell (action `CONTINUE`) or only downgrade. At the top of
a table, below `conservative`:

{conservative_fields}

## States

Each rule has a state for each rank and, if it is about seeds, for each seed.

{states}

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

With such a rule or without, `tamiyo status` and Tamiyo's metrics say `unknown` of a rank that
was not heard of for {unknown_after} of its step times, and for ten seconds at least, or for
ten minutes while only one step of it is known. Then its other rules are `unknown` as well,
with what they last were beside it.

## Metrics that Tamiyo works out

{derived}

## Another table without a restart

A table that is read again keeps what has not changed: the state of a rule that is the same
in every field, wherever it stands now, and the baselines that are still watched, unless
`window` or `warmup` changed. Rules that are new or different begin unknown.
"""
