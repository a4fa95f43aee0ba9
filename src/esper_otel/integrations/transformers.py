"""Hugging Face Transformers: ``Trainer(callbacks=[EsperCallback()])``.

Under ``esper-otel run`` every Trainer has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from esper_otel.integrations.training import Training, require, suits

if TYPE_CHECKING:
    from esper_otel.integrations.watch import Watch

OLDEST = "4.46"

_ON_TIME = ("_runtime", "_per_second", "_jit_compilation_time", "_preparation_time", "epoch")
"""Ends of names that are none of what was measured."""


class EsperCallback(TrainerCallback):
    """Records each optimizer step of ``trainer.train()``, and asks Tamiyo after it.

    ``settings`` are fields of :class:`esper_otel.settings.EsperSettings`. Raises
    :class:`~esper_otel.settings.SettingsError` when Transformers is too old.
    """

    def __init__(self, **settings: Any) -> None:
        require("transformers", OLDEST)
        self.training = Training(**settings)
        self._settings = settings

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer's optimizer sets the steps; a model trained again begins a phase."""
        self.training.start(kwargs.get("optimizer"), model=kwargs.get("model"), phase="train")
        self.training.share_losses()
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if saved and state.global_step:  # resumed from a checkpoint
            self.training.restore(saved["attributes"]["state"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer's checkpoints hold what decisions hold, in ``enforce``."""
        if control.should_save:
            self._save(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As after a step."""
        if control.should_save:
            self._save(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What an evaluation has measured, but for how long that took."""
        metrics = kwargs.get("metrics") or {}
        self.training.evaluated({k: v for k, v in metrics.items() if not k.endswith(_ON_TIME)})

    def _save(self, state: Any) -> None:
        held = self.training.state_dict()
        if held and state.stateful_callbacks is not None:
            settings = {name: str(value) for name, value in self._settings.items()}
            state.stateful_callbacks[type(self).__name__] = {
                "args": settings,
                "attributes": {"state": held},
            }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> EsperCallback:
        """Called for ``restore_callback_states_from_checkpoint``."""
        return cls(**state["args"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training is over. One that raises is closed when the next begins, or at exit."""
        self.training.stop()

    @classmethod
    def abandon(cls, trainer: Any) -> None:
        """The training of ``trainer`` has raised."""
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, cls):
                callback.training.stop()


def watch_transformers(watch: Watch, trainer: Any) -> None:
    """Have every ``transformers.Trainer`` name its optimizer to the run of ``watch``.

    ``trainer`` is the module ``transformers.trainer``, which was just imported.
    """
    callbacks = getattr(trainer, "DEFAULT_CALLBACKS", None)
    if not isinstance(callbacks, list) or not suits("transformers", OLDEST):
        return

    def train(original: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(trainer, *args, **kwargs)
        except BaseException:  # of which callbacks are not told
            watch.quietly(EsperCallback.abandon, trainer)
            raise

    callbacks.append(EsperCallback)
    watch.at_undo(lambda: callbacks.remove(EsperCallback))
    watch.wrap(trainer.Trainer, "train", train)
