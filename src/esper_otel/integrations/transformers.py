"""Hugging Face Transformers: ``Trainer(callbacks=[EsperCallback()])``.

Under ``esper-otel run`` every Trainer has it.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from esper_otel.integrations.training import Training, require

OLDEST = "4.46"


class EsperCallback(TrainerCallback):
    """Records each optimizer step of ``trainer.train()``, and asks Tamiyo after it.

    ``settings`` are fields of :class:`esper_otel.settings.EsperSettings`. Raises
    :class:`~esper_otel.settings.SettingsError` when Transformers is too old.
    """

    def __init__(self, **settings: Any) -> None:
        require("transformers", OLDEST)
        self.training = Training(**settings)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer's optimizer sets the run's steps."""
        self.training.begin(kwargs.get("optimizer"))
        self.training.share_losses()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training is over. One that raises is closed when the next begins, or at exit."""
        self.training.end()

    @classmethod
    def abandon(cls, trainer: Any) -> None:
        """The training of ``trainer`` has raised."""
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, cls):
                callback.training.end()
