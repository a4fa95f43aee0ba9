"""What is instrumented is put back; twice is once, and a mistake is told."""

import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import esper_otel  # noqa: E402
from esper_otel.integrations import watch as watching  # noqa: E402
from esper_otel.integrations.torch import TorchInstrumentor  # noqa: E402
from esper_otel.settings import SettingsError  # noqa: E402
from integrations.plain_loops import plain_loop  # noqa: E402
from testkit import without_compiler  # noqa: E402
from testkit.patience import PATIENCE_S  # noqa: E402


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
