import contextlib
import logging
import math
import os
import random
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import esper_otel  # noqa: E402
from esper_otel import loop  # noqa: E402
from esper_otel.integrations import watch as watching  # noqa: E402
from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402
from esper_otel.settings import SettingsError  # noqa: E402
from esper_otel.tolaria.ordinary_steps import OrdinarySteps  # noqa: E402
from testkit import without_compiler  # noqa: E402
from testkit.patience import PATIENCE_S  # noqa: E402

REQUIRED = {
    "step",
    "loss",
    "gradient_norm",
    "samples_per_s",
    "hook_latency_ms",
    "tamiyo_latency_ms",
    "step_latency_ms",
    "forward_ms",
    "backward_ms",
    "optimizer_ms",
    "input_wait_ms",
    "kasmina.apply_ms",
    "kasmina.finalize_ms",
    "loss_delta",
    "loss_ewma",
    "loss_volatility",
    "grad_norm_ewma",
    "grad_var",
    "optimizer_lr",
    "optimizer_momentum",
    "nonfinite",
}


@pytest.fixture
def instrumented(captured):
    instrumentor = TorchInstrumentor()
    instrumentor.instrument(skip_dep_check=True)
    yield captured
    instrumentor.uninstrument()


def data(n=96, batch_size=32, **options):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator)
    return DataLoader(
        TensorDataset(x, x.sum(1, keepdim=True)), batch_size=batch_size, **options
    )


def plain_loop(*, epochs=2, clip=None, accumulate=1, loader=None, evaluate=False):
    """A training loop as people write it; returns its losses and final weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(epochs):
        model.train()
        for i, (x, y) in enumerate(loader or data()):
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            losses.append(loss.item())
            if (i + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        if evaluate:
            model.eval()
            with torch.no_grad():
                for x, y in data(batch_size=96):
                    nn.functional.mse_loss(model(x), y)
    return losses, [p.detach().clone() for p in model.parameters()]


def test_every_optimizer_step_is_one_frame_with_what_a_step_has(instrumented):
    losses, _ = plain_loop()
    assert [frame["step"] for frame in instrumented.frames] == list(range(1, 7))
    assert [frame["loss"] for frame in instrumented.frames] == losses
    later = instrumented.frames[-1]
    assert later.keys() >= REQUIRED
    assert later["optimizer_lr"] == pytest.approx(0.05)
    assert later["optimizer_momentum"] == pytest.approx(0.9)
    assert ("h2d_copy_ms" in later) == torch.cuda.is_available()


@pytest.mark.parametrize("clips", [True, False])
def test_steps_of_a_plain_loop_are_made_of_notes_at_once(instrumented, monkeypatch, clips):
    """Few are not: the first ones, and those at the end of an epoch."""
    record, ordinary = OrdinarySteps.record, []

    def counted(*what):
        row = record(*what)
        ordinary.append(row is not None)
        return row

    monkeypatch.setattr(OrdinarySteps, "record", counted)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    for inputs, targets in data(n=4 * 100, batch_size=4):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert len(instrumented.frames) == 100
    assert sum(ordinary) > 80


def test_phases_add_up_to_the_step(instrumented):
    plain_loop(epochs=4)
    parts = ("input_wait_ms", "forward_ms", "backward_ms", "optimizer_ms", "hook_latency_ms")
    for frame in instrumented.frames[1:]:
        assert sum(frame[part] for part in parts) <= frame["step_latency_ms"] + 1e-6


def test_losses_weights_and_random_states_are_bit_identical(captured):
    def observed():
        random.seed(3)
        losses, weights = plain_loop(clip=1.0, loader=data(shuffle=True))
        return losses, weights, random.random(), torch.rand(1).item()

    bare = observed()
    instrumentor = TorchInstrumentor()
    instrumentor.instrument(skip_dep_check=True)
    try:
        watched = observed()
    finally:
        instrumentor.uninstrument()
    assert watched[0] == bare[0]
    assert all(torch.equal(a, b) for a, b in zip(watched[1], bare[1], strict=True))
    assert watched[2:] == bare[2:]
    assert len(captured.frames) == 6


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
        norms.append(math.sqrt(sum(p.grad.norm().item() ** 2 for p in model.parameters())))
        nn.utils.clip_grad_norm_(model[0].parameters(), 1e9)
        optimizer.step()
    assert [f["gradient_norm"] for f in instrumented.frames] == pytest.approx(norms)


def norm_of(model):
    return math.sqrt(sum(p.grad.norm().item() ** 2 for p in model.parameters()))


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


def test_gradient_accumulation_is_one_step(instrumented):
    losses, _ = plain_loop(epochs=2, accumulate=3)
    assert [frame["step"] for frame in instrumented.frames] == [1, 2]
    means = [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
    assert [frame["loss"] for frame in instrumented.frames] == pytest.approx(means)


def test_validation_is_not_counted_as_training(instrumented):
    plain_loop(epochs=2, evaluate=True)
    assert len(instrumented.frames) == 6
    for frame in instrumented.frames[1:]:
        assert frame["samples_per_s"] * frame["step_latency_ms"] / 1e3 == pytest.approx(32)


def test_nan_is_counted_and_left_out(instrumented):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model(torch.ones(1, 2)) * math.nan).sum().backward()
    optimizer.step()
    (frame,) = instrumented.frames
    assert frame["nonfinite"] == 2, "loss and gradient norm"
    assert not frame.keys() & {"loss", "gradient_norm"}


def test_the_loss_under_a_gradient_scaler_is_the_users(instrumented):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = model(torch.ones(1, 2)).square().sum()
    scaler.scale(loss).backward()
    gradient = model.weight.grad.norm().item(), model.bias.grad.norm().item()
    scaler.step(optimizer)
    scaler.update()
    (frame,) = instrumented.frames
    assert frame["loss"] == pytest.approx(loss.item())
    assert frame["gradient_norm"] == pytest.approx(math.hypot(*gradient) / 1024)


def test_workers_of_a_loader_report_nothing(instrumented):
    plain_loop(epochs=1, loader=data(num_workers=2))
    assert [frame["step"] for frame in instrumented.frames] == [1, 2, 3]


def test_a_second_optimizer_does_not_make_steps_of_its_own(instrumented):
    first = torch.optim.SGD([a := torch.ones(1, requires_grad=True)], lr=0.1)
    second = torch.optim.SGD([b := torch.ones(1, requires_grad=True)], lr=0.1)
    for _ in range(3):
        (a * b).sum().backward()
        first.step()
        second.step()
    assert len(instrumented.frames) == 3


def originals():
    from torch.optim import optimizer as hooks

    wrapped = {
        "backward": torch.Tensor.__dict__["backward"],
        "autograd's backward": torch.autograd.backward,
        "clip": nn.utils.clip_grad_norm_,
        "clip at home": nn.utils.clip_grad.clip_grad_norm_,
        "scale": torch.amp.GradScaler.__dict__["scale"],
        "scaler's step": torch.amp.GradScaler.__dict__["step"],
        "next": torch.utils.data.dataloader._BaseDataLoaderIter.__dict__["__next__"],
        "exit": os._exit,
        "to": torch.Tensor.to,
        "cuda": torch.Tensor.cuda,
    }
    hooked = [
        dict(hooks._global_optimizer_pre_hooks),
        dict(hooks._global_optimizer_post_hooks),
    ]
    return wrapped, hooked


def test_uninstrumenting_puts_every_object_back(captured):
    before, hooks_before = originals()
    instrumentor = TorchInstrumentor()
    instrumentor.instrument(skip_dep_check=True)
    during, _ = originals()
    same = {name for name in before if during[name] is before[name]}
    assert same == (set() if torch.cuda.is_available() else {"to", "cuda"})
    instrumentor.uninstrument()
    after, hooks_after = originals()
    assert all(after[name] is before[name] for name in before)
    assert hooks_after == hooks_before
    plain_loop()
    assert captured.frames == []


def test_what_cannot_be_taken_off_keeps_nothing_else_on(captured, caplog):
    before, hooks_before = originals()
    run = esper_otel.start()
    watch = watching.Watch(torch, run)
    watch._undo.append(lambda: [].remove("what somebody else has removed"))
    watch.undo()
    run.close()
    after, hooks_after = originals()
    assert all(after[name] is before[name] for name in before)
    assert hooks_after == hooks_before
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "could not be removed" in caplog.text


def test_instrumenting_twice_is_instrumenting_once(instrumented, caplog):
    TorchInstrumentor().instrument(skip_dep_check=True)
    plain_loop(epochs=1)
    assert len(instrumented.frames) == 3


TWICE_BEFORE_IMPORT = f"""{without_compiler.SOURCE}
from esper_otel import process
from esper_otel.integrations.torch import TorchInstrumentor
instrumentor = TorchInstrumentor()
instrumentor.instrument(skip_dep_check=True, mode="off", run_id="first")
instrumentor.uninstrument()
instrumentor.instrument(skip_dep_check=True, mode="off", run_id="second")
import torch, accelerate.accelerator, transformers.trainer
print(process.automatic().run_id)
print(hasattr(accelerate.accelerator.Accelerator.backward.__wrapped__, "__wrapped__"))
instrumentor.uninstrument()
"""


def test_of_several_times_before_torch_is_imported_the_last_holds(tmp_path):
    for name, source in {
        "accelerate/accelerator.py": "class Accelerator:\n    def backward(self): pass",
        # Not the one that is known: what cannot be instrumented can still be imported.
        "transformers/trainer.py": "DEFAULT_CALLBACKS = []",
    }.items():
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(source)
        (path.parent / "__init__.py").touch()
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", TWICE_BEFORE_IMPORT],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (done.returncode, done.stdout) == (0, "second\nFalse\n"), done.stderr
    assert "transformers.trainer could not be instrumented" in done.stderr


def test_a_wrong_setting_raises_from_code_and_warns_from_the_environment(
    captured, monkeypatch, caplog
):
    with pytest.raises(SettingsError, match="spam=1: there is no such setting"):
        TorchInstrumentor().instrument(skip_dep_check=True, spam=1)
    TorchInstrumentor().uninstrument()
    monkeypatch.setenv("ESPER_SPAN_EVERY", "often")
    TorchInstrumentor().instrument(skip_dep_check=True)
    assert "ESPER_SPAN_EVERY='often': expected a whole number; 50 is used" in caplog.text
    plain_loop(epochs=1)
    TorchInstrumentor().uninstrument()
    assert captured.frames


def test_a_failure_of_ours_does_not_reach_the_loop(instrumented, monkeypatch, caplog):
    monkeypatch.setattr(loop, "gradient_norm", lambda _: 1 / 0)
    monkeypatch.setattr(loop, "_told", set())
    with caplog.at_level(logging.WARNING):
        losses, _ = plain_loop(epochs=1)
    assert len(losses) == 3
    assert [("gradient_norm" in f, "loss" in f) for f in instrumented.frames] == [
        (False, True)
    ] * 3
    assert len([r for r in caplog.records if "gradient norm" in r.message]) == 1


def test_a_users_error_passes_through_unchanged(instrumented):
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar"):
        (x * 2).backward()
    with pytest.raises(StopIteration):
        next(iter(data(n=0)))


class OnCuda:
    """A tensor that says it lies on a CUDA device."""

    device = torch.device("cuda", 0)


class Copies:
    """Stands where the timer of copies stands: every timed copy takes 2.5 ms."""

    def __init__(self):
        self.timed = 0
        self.reading = None

    @contextlib.contextmanager
    def copying(self, device=None):
        self.timed += 1
        yield
        self.reading = 2.5

    def first_copy(self):
        reading, self.reading = self.reading, None
        return reading


def test_with_cuda_the_first_copy_of_a_step_is_timed(captured, monkeypatch):
    copies = Copies()
    real_to = torch.Tensor.to
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(watching, "CopyTimer", lambda: copies)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda t, *a: OnCuda() if a == ("cuda",) else real_to(t, *a)
    )
    instrumentor = TorchInstrumentor()
    instrumentor.instrument(skip_dep_check=True)
    try:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            x = torch.ones(2, 4).to(torch.float32)
            if step != 1:
                torch.ones(2, 4).to("cuda")
                torch.ones(2, 4).to("cuda")
            model(x).sum().backward()
            optimizer.step()
    finally:
        instrumentor.uninstrument()
    assert [frame.get("h2d_copy_ms") for frame in captured.frames] == [2.5, None, 2.5]
    assert copies.timed == 5, "three casts and one copy in each of two steps"


# The explicit way in.


def explicit_loop(run, model, optimizer, epochs=2):
    losses = []
    for _ in range(epochs):
        for x, y in run.batches(data()):
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            run.report(loss=loss, accuracy=0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def test_three_added_lines_record_a_loop(captured):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    run = esper_otel.start(optimizer)
    losses = explicit_loop(run, model, optimizer)
    run.close()
    frames = captured.frames
    assert [frame["loss"] for frame in frames] == losses
    assert frames[-1].keys() >= REQUIRED - {"forward_ms", "backward_ms"} | {"accuracy"}
    assert frames[-1]["optimizer_momentum"] == pytest.approx(0.9)


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


def test_phases_can_be_told(captured):
    run = esper_otel.start()
    for _ in range(2):
        with run.phase("forward"):
            pass
        with run.phase("backward"):
            pass
        run.report(loss=torch.tensor(2.0), gradient_norm=1.5)
        run.step()
    run.close()
    assert captured.frames[-1].keys() >= {"forward_ms", "backward_ms", "gradient_norm", "loss"}


def test_both_ways_in_count_a_step_once(instrumented):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    run = esper_otel.start(optimizer)
    losses = explicit_loop(run, model, optimizer)
    assert [frame["step"] for frame in instrumented.frames] == list(range(1, 7))
    assert [frame["loss"] for frame in instrumented.frames] == losses
    for frame in instrumented.frames[1:]:
        assert frame["samples_per_s"] * frame["step_latency_ms"] / 1e3 == pytest.approx(32)


def test_a_closed_run_takes_its_hooks_off(captured):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    run = esper_otel.start(optimizer)
    explicit_loop(run, model, optimizer, epochs=1)
    run.close()
    plain = len(captured.frames)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert len(captured.frames) == plain == 3


class Broken:
    """Stands where an agreement or an optimizer's hook stands, and cannot be ended."""

    def close(self):
        raise RuntimeError("not while the interpreter ends")

    remove = close


def test_whatever_cannot_be_ended_what_was_recorded_is_still_sent(captured, caplog):
    run = esper_otel.start()
    run._loop._handles, run._sharing.agreement = [Broken()], Broken()
    run.step()
    assert run.close() is captured
    run.step()
    assert len(captured.frames) == 1
    told = "a part of the run could not be ended"
    assert [r.message[: len(told)] for r in caplog.records] == [told] * 2


def test_a_setting_that_does_not_exist_or_fit_is_refused_at_once(captured):
    with pytest.raises(SettingsError, match="no such setting"):
        esper_otel.start(moode="advise")
    with pytest.raises(SettingsError, match="mode='always'"):
        esper_otel.start(mode="always")


def test_a_disabled_sdk_disables_everything(captured, monkeypatch):
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    run = esper_otel.start(optimizer)
    explicit_loop(run, model, optimizer)
    run.close()
    assert captured.frames == []


def test_a_phase_that_there_is_not_is_refused_before_its_block_runs(captured):
    run = esper_otel.start()
    ran = []
    with pytest.raises(ValueError, match="phase 'validation': expected one of forward"):  # noqa: SIM117
        with run.phase("validation"):
            ran.append(1)
    assert ran == []
    with pytest.raises(RuntimeError, match="the script's own"), run.phase("forward"):
        raise RuntimeError("the script's own")
    run.close()
