from collections import UserDict

import numpy
import pytest

from esper_otel.tolaria.fetches import samples_in

X = numpy.zeros((32, 3))


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (X, 32),
        ([X, X[:5]], 32),
        ((X, None), 32),
        ({"input_ids": X, "labels": X}, 32),
        (UserDict(input_ids=X), 32),
        (["a name", {"image": (X,)}], 32),
        (numpy.float64(3.0), 0),
        ("text", 0),
        (None, 0),
        ([], 0),
        ([[[[[[X]]]]]], 0),
    ],
    ids=repr,
)
def test_samples_are_the_first_dimension_of_the_first_tensor(batch, samples):
    assert samples_in(batch) == samples
