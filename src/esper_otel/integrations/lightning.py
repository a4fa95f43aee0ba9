"""PyTorch Lightning: ``Trainer(callbacks=[EsperCallback()])``.

Under ``esper-otel run`` nothing has to be added: Lightning asks :func:`callbacks`, through
an entry point, for callbacks that every Trainer should have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback

from esper_otel import process
from esper_otel.integrations.training import Training, require, suits
from esper_otel.leyline.custom import is_evaluation
from esper_otel.leyline.endings import end_by

OLDEST = "2.2"


class EsperCallback(Callback):
    """Records each optimizer step of ``trainer.fit``, and asks Tamiyo after it.

    ``settings`` are fields of :class:`esper_otel.settings.EsperSettings`. Raises
    :class:`~esper_otel.settings.SettingsError` when Lightning is too old.
    """

    def __init__(self, **settings: Any) -> None:
        require("lightning", OLDEST)
        self.training = Training(**settings)
        self._before: set[str] = set()
        self._evaluated: set[str] = set()
        """What validations have logged so far."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The first optimizer's steps are the run's; a model fitted again begins a phase."""
        self.training.start(*trainer.optimizers, model=pl_module, phase="fit")
        if trainer.accumulate_grad_batches > 1:
            self.training.share_losses()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """What was logged before is not of this validation."""
        if not trainer.sanity_checking:
            self._before = set(trainer.callback_metrics) - self._evaluated

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """What the validation has logged: names that say so, and those new with it."""
        if trainer.sanity_checking:
            return
        self._report(trainer.callback_metrics)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """As of a validation."""
        self._before = set(trainer.callback_metrics) - self._evaluated

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """As of a validation."""
        self._report(trainer.callback_metrics)

    def _report(self, metrics: Mapping[str, Any]) -> None:
        of_it = {k: v for k, v in metrics.items() if is_evaluation(k) or k not in self._before}
        self._evaluated.update(of_it)
        self.training.evaluated(of_it)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Training is over."""
        self.training.stop()

    def state_dict(self) -> dict[str, Any]:
        """Lightning's checkpoints hold what decisions hold, in ``enforce``."""
        return self.training.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A checkpoint is loaded, before the training begins."""
        self.training.restore(state_dict)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Training has failed, or was interrupted."""
        self.training.stop(end_by(exception))


def callbacks() -> list[Callback]:
    """What every Trainer of this process gets: a callback where it is instrumented."""
    instrumented = process.automatic() is not None and suits("lightning", OLDEST)
    return [_OfEveryTrainer()] if instrumented else []


class _OfEveryTrainer(EsperCallback):
    """Beside one that the script adds itself: Lightning saves one callback of each class."""
