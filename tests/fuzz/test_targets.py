"""Whatever comes: no process ends, nothing is raised, and what was sent is accounted for."""

import pytest

from fuzz import at_rest, network
from fuzz.fuzzing import minutes, wanted

TARGETS = {target.name: target for target in (*network.TARGETS, *at_rest.TARGETS)}


@pytest.mark.parametrize("name", wanted([*TARGETS]))
def test_whatever_comes(name, tmp_path):
    target = TARGETS[name]
    if minutes():
        assert target.try_for(tmp_path, minutes()) > 0
    else:
        target.try_some(tmp_path)
