"""Optimizers whose updates are looked at, and made with a part of their rate."""

import torch

from esper_otel.tolaria.updates import AS_IT_IS, Updates


def sgd(*rates, **options):
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates]
    made = torch.optim.SGD(groups, lr=0.1, **options)
    for group in made.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones(2)
    return made


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def change(subject, optimizer, factor, order=AS_IT_IS):
    """As a step that begins does it; returns whether a rate was scaled."""
    subject.scaled = False
    subject.prepare(optimizer, factor, order)
    if subject.is_prepared(optimizer):
        subject.enter(optimizer, (optimizer,), {})
    return subject.scaled


class Probed(torch.optim.SGD):
    """Notes the rates of its updates; ``error`` is raised by the next one."""

    error: BaseException | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.used = []

    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.used.append(rates(self)[0])
        error, self.error = self.error, None
        if error is not None:
            raise error
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data -= group["lr"] * parameter.grad
        return loss


def halved(optimizer, subject=None, **options):
    """Every step of ``optimizer`` is made with half of its rate from now on."""
    subject = subject or Updates()
    optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: subject.prepare(optimizer, 0.5, **options)
    )
    return subject
