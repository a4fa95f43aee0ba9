"""Loops of the kinds that public scripts have, against the account they keep themselves."""

import pytest

torch = pytest.importorskip("torch")

from esper_otel import loop as loops  # noqa: E402
from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402
from testkit.ledger import Ledger  # noqa: E402
from testkit.public_frameworks import PUBLIC_FRAMEWORKS  # noqa: E402
from testkit.public_loops import PUBLIC  # noqa: E402

QUICK = ("Lightning, clipped by value", "Transformers", "Accelerate")
"""Frameworks that are tried here; ``bench.awkward`` tries them all."""

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about one another


def kept(loop):
    torch.manual_seed(0)
    ledger = Ledger()
    loop(ledger)
    return ledger


def same(told, values):
    return told == [
        value if value is None else pytest.approx(value, rel=1e-5) for value in values
    ]


@pytest.mark.parametrize("name", [*PUBLIC, *QUICK])
def test_what_is_recorded_is_what_the_loop_took(captured, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loops, "_told", set())
    if name == "torchtitan" and not hasattr(torch.nn.utils, "get_total_norm"):
        pytest.skip("needs PyTorch 2.6")
    if name in PUBLIC:
        loop = PUBLIC[name]
    else:
        module, loop = PUBLIC_FRAMEWORKS[name]
        pytest.importorskip(module)
    bare = kept(loop)
    TorchInstrumentor().instrument(skip_dep_check=True)
    try:
        watched = kept(loop)
    finally:
        TorchInstrumentor().uninstrument()
    frames = captured.frames
    assert len(frames) == len(watched.losses)
    assert same([frame.get("loss") for frame in frames], watched.losses)
    assert same([frame.get("gradient_norm") for frame in frames], watched.norms)
    assert same([frame.get("optimizer_lr") for frame in frames], watched.used)
    pairs = zip(bare.weights, watched.weights, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
