"""Trainers of Lightning and Transformers, as small as they can be, and what they train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from testkit import quiet_trainers
from testkit.framework_loops import BATCH, dataset, network


def lightning_module():
    """A class of modules of Lightning."""
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch, index):
            x, y = batch
            return nn.functional.mse_loss(self.network(x), y)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    return Module


def lightning_trainer(folder, *, watched=False, **options):
    """Of one epoch; with our callback, where it is ``watched``."""
    pytest.importorskip("lightning.pytorch")
    from esper_otel.integrations.lightning import EsperCallback

    return quiet_trainers.lightning_trainer(
        default_root_dir=folder,
        callbacks=[EsperCallback()] if watched else [],
        **options,
    )


class Losing(nn.Module):
    """A model of Transformers: it computes its own loss."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, x=None, labels=None):
        return {"loss": nn.functional.mse_loss(self.network(x), labels)}


def transformers_trainer(model, folder, *, watched=False, **arguments):
    """Of one epoch; with our callback, where it is ``watched``."""
    hf = pytest.importorskip("transformers")
    from esper_otel.integrations.transformers import EsperCallback

    data = [{"x": x, "labels": y} for x, y in zip(*dataset().tensors, strict=True)]
    return hf.Trainer(
        model=model,
        args=quiet_trainers.transformers_arguments(folder, BATCH, **arguments),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[EsperCallback()] if watched else [],
    )
