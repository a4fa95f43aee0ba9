"""Trainers of Lightning and Transformers: one epoch on the CPU; they print and save nothing."""

from __future__ import annotations

import logging
from typing import Any


def lightning_trainer(**options: Any) -> Any:
    """A ``Trainer`` of Lightning, with these ``options`` besides."""
    import lightning.pytorch as pl

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**quiet | options)


def transformers_arguments(folder: object, batch: int, **options: Any) -> Any:
    """``TrainingArguments`` of Transformers, with these ``options`` besides."""
    import transformers as hf

    quiet: dict[str, Any] = {
        "num_train_epochs": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return hf.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, **quiet | options
    )
