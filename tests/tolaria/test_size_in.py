from collections import OrderedDict, UserDict, namedtuple

import numpy
import pytest

from esper_otel.tolaria.fetches import size_in

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
    assert size_in(batch)[0] == samples


def test_the_length_is_the_second_dimension_of_the_same_tensor():
    assert size_in({"input_ids": numpy.zeros((8, 128), int), "labels": X}) == (8, 128)
    assert size_in([numpy.zeros(8), X]) == (8, 0)


class Decodes(dict):
    """Makes its values when it is asked for them, at random."""

    def __getitem__(self, key):
        raise AssertionError("decoded")

    values = items = __iter__ = __len__ = __contains__ = get = __getitem__


class Sequence(list):
    def __getitem__(self, key):
        raise AssertionError("decoded")

    __iter__ = __len__ = __getitem__


class Lazy:
    """A batch that is loaded when it is looked at."""

    def __getattr__(self, name):
        raise RuntimeError(f"looked at: {name}")


class Encoding(UserDict):
    def __getattr__(self, name):
        raise RuntimeError(f"looked at: {name}")


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (Decodes(x=X), 32),
        (Sequence([X, X]), 32),
        (OrderedDict(x=X), 32),
        (Pair(X, None), 32),
        (Encoding(input_ids=X), 32),
        (Lazy(), 0),
        ([Lazy(), X], 32),
        ({"first": Lazy(), "second": X}, 32),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_batch_is_not_asked_for_anything(batch, samples):
    assert size_in(batch)[0] == samples


def test_a_tensor_of_the_scripts_own_kind_is_measured_without_its_code():
    torch = pytest.importorskip("torch")

    class Image(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            raise AssertionError(f"called: {function}")

    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise AssertionError(f"called: {function}")

    image = torch.zeros(32, 3).as_subclass(Image)
    assert size_in([image, torch.zeros(32)]) == (32, 3)
    assert size_in((torch.zeros(32, 1).as_subclass(Wrapper), torch.zeros(16))) == (16, 0)
