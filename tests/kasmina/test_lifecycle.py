import pytest

from esper_otel.kasmina.lifecycle import GROWING, NEXT, TARGET, Lifecycle
from esper_otel.leyline.decisions import SeedOperation
from esper_otel.leyline.stages import TRANSITIONS, IllegalTransitionError, Stage


@pytest.mark.parametrize("source", Stage)
@pytest.mark.parametrize("target", Stage)
def test_only_the_transitions_of_the_registry_are_made(source, target):
    lifecycle = Lifecycle(source, dwelt=7)
    if target in TRANSITIONS[source]:
        assert lifecycle.move(target) is source
        assert (lifecycle.stage, lifecycle.dwelt) == (target, 0)
    else:
        with pytest.raises(IllegalTransitionError):
            lifecycle.move(target)
        assert (lifecycle.stage, lifecycle.dwelt) == (source, 7)


def test_a_stage_s_clock_is_whoever_passes_its_steps():
    lifecycle = Lifecycle(Stage.EMBARGOED)
    for _ in range(3):
        lifecycle.pass_step()
    assert lifecycle.dwelt == 3


def test_every_operation_has_its_stage_and_every_growing_stage_what_comes_next():
    assert set(TARGET) == set(SeedOperation)
    assert set(NEXT) == GROWING
    for stage, operation in NEXT.items():
        assert TARGET[operation] in TRANSITIONS[stage]
