"""Tables with rules on records of excursions, and steps by which a record is known."""

from hypothesis import strategies as st

from esper_tamiyo.language.table_file import TableSource, parse
from sidecar.frames_made import frame

KNOWN_AFTER = 40
"""Steps after which every condition on a record is known, with the spans of :data:`TOP`."""

TOP = "record: {window: 8, warmup: 8, false_alarm_steps: 1000}"


def wobble(step):
    """A number from 0.9 to 1.1, another at each step."""
    return 1.0 + 0.1 * ((step * 7919) % 13 - 6) / 6


def steady(count, **also):
    """Frames of a run that goes as most runs go."""
    return [
        frame(
            step,
            loss=wobble(step),
            gradient_norm=2.0 * wobble(step + 5),
            optimizer_lr=0.1 + 0.01 * wobble(step),
            nonfinite=0.0,
            **also,
        )
        for step in range(count)
    ]


@st.composite
def record_conditions(draw):
    """A condition on a record, with all that may stand beside it."""
    metric = draw(st.sampled_from(["loss", "loss", "gradient_norm", "optimizer_lr"]))
    operator = draw(st.sampled_from(["above_record", "above_record", "below_record"]))
    number = draw(st.sampled_from([0.3, 1, 2, 4]))
    rising = draw(st.sampled_from(["true", "false"]))
    release = draw(st.sampled_from(["", f", release: {number / 2}"]))
    return f"metric: {metric}, {operator}: {number}, rising: {rising}{release}"


@st.composite
def record_rules(draw, parameters=False):
    """A rule on records, alone or in a group with others."""
    form = draw(st.sampled_from(["{0}", "all: [{{{0}}}, {{{1}}}]", "any: [{{{0}}}, {{{1}}}]"]))
    others = record_conditions() | st.sampled_from(
        ["metric: loss, above_baseline: 1.2", "metric: gradient_norm, above: 2.1"]
    )
    when = form.format(draw(record_conditions()), draw(others))
    needed = draw(st.integers(1, 3))
    rest = f"for: {needed}, of: {needed + draw(st.integers(0, 2))}"
    rest += f", cooldown: {draw(st.sampled_from([0, 0, 3]))}"
    if parameters:
        asked = draw(
            st.sampled_from(
                ["lr_scale: 0.5", "skip_step: true", "usual_norm: true", "max_norm: 1"]
            )
        )
        rest += f", parameters: {{{asked}}}"
    return f"{when}, {rest}, severity: HIGH, action: OPTIMIZER"


@st.composite
def record_tables(draw, parameters=False):
    """A table of rules on records."""
    rules = draw(st.lists(record_rules(parameters), min_size=1, max_size=3))
    lines = "\n".join(f"- {{id: r{place}, {rule}}}" for place, rule in enumerate(rules))
    head = f"version: records\nbaseline: {{window: 8, warmup: 4}}\n{TOP}"
    return parse(TableSource("records", f"{head}\nrules:\n{lines}\n".encode()))
