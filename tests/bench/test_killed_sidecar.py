"""Whether what was decided can be explained by what may have been heard."""

from itertools import islice

import pytest
from msgspec import structs

from bench.killed_sidecar import Runs, Step, differing, troubled
from esper_otel.leyline.decisions import BREAKER_OPEN, TIMEOUT, Severity, unanswered
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.language.table_file import load

UNHEARD, HEARD, NOT_SENT = 40, 90, 120


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "table.yaml"
    path.write_text("extends: default\n")
    return path


@pytest.fixture(scope="module")
def steps(table):
    """A run of which three steps have no answer; one of these was heard."""
    engine = Engine(load(str(table)))
    made = []
    for nth, (frame, proposal) in enumerate(islice(Runs(troubled()).next_run(), 250)):
        at_ns = frame.step * 5_000_000
        if nth in (UNHEARD, NOT_SENT):
            reason = TIMEOUT if nth == UNHEARD else BREAKER_OPEN
            decision = unanswered(frame.run, frame.step, reason)
        else:
            decision = engine.observe(frame, proposal, at_ns, asked=True)
            if nth == HEARD:
                decision = unanswered(frame.run, frame.step, TIMEOUT)
        made.append(Step(frame, proposal, at_ns, decision, nth != NOT_SENT, 1.0))
    return made


def test_some_step_is_told_apart_by_what_was_heard(steps, table):
    """Else this would show nothing."""
    assert differing(steps, table)[1] > 0


def test_one_way_to_read_what_was_heard_explains_all(steps, table):
    assert differing(steps, table)[0] == 0


def test_what_nothing_explains_is_counted(steps, table):
    wrong = list(steps)
    told = structs.replace(wrong[200].decision, severity=Severity.CRITICAL)
    wrong[200] = wrong[200]._replace(decision=told)
    assert differing(wrong, table)[0] == 1
