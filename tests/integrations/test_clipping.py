"""The norm of a step is that before anybody has clipped."""

import math

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import esper_otel  # noqa: E402
from integrations.plain_loops import norm_of, plain_loop  # noqa: E402


def test_the_norm_is_that_before_clipping(instrumented):
    plain_loop(epochs=1)
    plain_loop(epochs=1, clip=1e-3)
    free, clipped = instrumented.frames[:3], instrumented.frames[3:]
    assert clipped[0]["gradient_norm"] == pytest.approx(free[0]["gradient_norm"])
    assert clipped[0]["gradient_norm"] > 1e-2


@pytest.mark.skipif(
    not hasattr(nn.utils, "get_total_norm"), reason="before 2.6 PyTorch cannot compile this"
)
def test_code_that_is_compiled_as_one_graph_may_clip(instrumented):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def clip():
        return nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    compiled = torch.compile(clip, backend=counting, fullgraph=True)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).sum().backward()
        before = norm_of(model)
        assert compiled().item() == pytest.approx(before)
        assert norm_of(model) == pytest.approx(1e-3, rel=1e-2)
        optimizer.step()
    assert len(graphs) == 1
    assert len(instrumented.frames) == 3
    torch.compiler.reset()


def test_clipping_a_part_does_not_pass_for_the_whole_norm(instrumented):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).sum().backward()
        norms.append(norm_of(model))
        nn.utils.clip_grad_norm_(model[0].parameters(), 1e9)
        optimizer.step()
    assert [f["gradient_norm"] for f in instrumented.frames] == pytest.approx(norms)


def test_clipping_another_model_of_the_same_shape_does_not_pass_for_it_either(instrumented):
    ours, others = nn.Linear(4, 1), nn.Linear(4, 1)
    first, second = (torch.optim.SGD(m.parameters(), lr=0.0) for m in (ours, others))
    for _ in range(2):
        first.zero_grad()
        second.zero_grad()
        ours(torch.ones(3, 4)).sum().backward()
        (others(torch.ones(3, 4)).sum() * 1000).backward()
        nn.utils.clip_grad_norm_(others.parameters(), 1e9)
        first.step()
        second.step()
    norms = [frame["gradient_norm"] for frame in instrumented.frames]
    assert norms == pytest.approx([norm_of(ours)] * 2)


def test_a_second_model_is_told_before_clipping_from_its_first_step(instrumented):
    for _ in range(2):
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(3, 4)).sum().backward()
            before = norm_of(model)
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
    norms = [frame["gradient_norm"] for frame in instrumented.frames]
    assert norms == pytest.approx([before] * 4)


def test_groups_in_another_order_and_frozen_parameters_are_still_the_whole(instrumented):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    model[0].bias.requires_grad_(False)
    weights = [layer.weight for layer in model]
    optimizer = torch.optim.SGD(
        [{"params": [model[1].bias]}, {"params": reversed(weights)}], lr=0.0
    )
    model(torch.ones(3, 4)).sum().backward()
    before = math.sqrt(sum(p.grad.norm().item() ** 2 for p in [*weights, model[1].bias]))
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    (frame,) = instrumented.frames
    assert frame["gradient_norm"] == pytest.approx(before)


def test_what_a_closure_clips_is_told_before_clipping(instrumented):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def evaluate():
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).sum()
        loss.backward()
        norms.append(norm_of(model))
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        return loss

    norms = []
    for _ in range(2):
        optimizer.step(evaluate)
    assert [f["gradient_norm"] for f in instrumented.frames] == pytest.approx(norms)


def test_what_was_clipped_for_a_step_that_was_skipped_is_forgotten(instrumented):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(3, 4)).sum() * factor).backward()
        scaler.unscale_(optimizer)
        if factor == math.inf:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    (frame,) = instrumented.frames
    assert frame["nonfinite"] == 0
    assert frame["gradient_norm"] == pytest.approx(norm_of(model))


def test_a_loop_that_clips_tells_the_norm_of_before(captured):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    run = esper_otel.start(optimizer)
    model(torch.ones(3, 4)).sum().backward()
    before = norm_of(model)
    run.report(gradient_norm=nn.utils.clip_grad_norm_(model.parameters(), 1e-3))
    optimizer.step()
    run.close()
    (frame,) = captured.frames
    assert frame["gradient_norm"] == pytest.approx(before)
