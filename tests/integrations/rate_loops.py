"""Training loops, each with another way to set its learning rate, that tell of their rates.

Each loop of :data:`LOOPS` makes :data:`STEPS` steps, knows nothing of us and fills a
:class:`Rates`: what every update used, as a probe *within* the optimizer's own ``step`` reads
it, and what the script itself sees of its rates meanwhile. None of the schedules depends on
the weights, so that a loop sets the same rates however its updates are scaled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, TensorDataset

from testkit.quiet_trainers import lightning_trainer, transformers_arguments

STEPS = 72
BATCH = 4


class Rates:
    """What one loop saw and used.

    ``used`` has, by the name of an optimizer, the rates of its groups at each update;
    ``seen`` is everything that the script read of its rates, in order.
    """

    def __init__(self) -> None:
        self.used: dict[str, list[list[Any]]] = {}
        self.seen: list[Any] = []
        self.weights: list[Tensor] = []

    def probed(self, kind: Any, name: str = "") -> Any:
        """A class like ``kind`` whose updates are noted, below all hooks of ``step``."""
        used = self.used.setdefault(name, [])
        own_step = raw_step(kind)

        class Probed(kind):
            def step(self, *args: Any, **kwargs: Any) -> Any:
                used.append([number(group["lr"]) for group in self.param_groups])
                return own_step(self, *args, **kwargs)

        Probed.__name__ = Probed.__qualname__ = kind.__name__
        return Probed

    def see(self, optimizer: Any, schedule: Any = None, *, saved: bool = True) -> None:
        """The script looks at its rates, and at what it would save of them."""
        self.seen += [exact(group["lr"]) for group in optimizer.param_groups]
        if saved:
            state = optimizer.state_dict()
            self.seen += [exact(group["lr"]) for group in state["param_groups"]]
        if schedule is not None:
            self.seen += [exact(rate) for rate in schedule.get_last_lr()]


def raw_step(kind: Any) -> Any:
    """The ``step`` of a class without the hooks that torch adds with its first instance."""
    step = kind.step
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return step


def number(rate: Any) -> Any:
    """A rate as a number; None where there is none."""
    return None if rate is None else float(rate)


def exact(rate: Any) -> tuple[str, str]:
    """Type and bits of a rate."""
    return type(rate).__name__, "None" if rate is None else float(rate).hex()


def batch() -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1, 1, BATCH * 4).reshape(BATCH, 4)
    return x, x.sum(1, keepdim=True)


def loader() -> DataLoader[Any]:
    x = torch.linspace(-1, 1, STEPS * BATCH * 4).reshape(STEPS * BATCH, 4)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=BATCH)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def backward(model: nn.Module) -> Tensor:
    x, y = batch()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    return loss


def sgd(rates: Rates, model: nn.Module, **options: Any) -> Any:
    return rates.probed(torch.optim.SGD)(model.parameters(), **{"lr": 0.02} | options)


def adamw(rates: Rates, model: nn.Module, **options: Any) -> Any:
    return rates.probed(torch.optim.AdamW)(model.parameters(), **{"lr": 1e-3} | options)


def scheduled(
    make_schedule: Callable[[Any], Any] | None = None,
    make_optimizer: Callable[..., Any] = sgd,
    *,
    metric: bool = False,
    in_tensor: bool = False,
    **options: Any,
) -> Callable[[Rates], None]:
    """A loop whose schedule steps after every update.

    ``metric``: the schedule wants one. ``in_tensor``: the rate is a tensor, as optimizers that
    are ``capturable`` have it.
    """

    def loop(rates: Rates) -> None:
        model = network()
        rate = {"lr": torch.tensor(0.01), "foreach": False} if in_tensor else {}
        optimizer = make_optimizer(rates, model, **rate | options)
        held = [group["lr"] for group in optimizer.param_groups]
        schedule = None if make_schedule is None else make_schedule(optimizer)
        for _ in range(STEPS):
            backward(model)
            rates.see(optimizer, schedule)
            optimizer.step()
            rates.see(optimizer, schedule)
            if schedule is not None:
                schedule.step(*([1.0] if metric else []))
            rates.see(optimizer, schedule)
            optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, held, strict=True):
            if isinstance(rate, Tensor):
                assert group["lr"] is rate, "a rate in a tensor is another tensor now"
        rates.weights = [p.detach().clone() for p in model.parameters()]

    return loop


def by_hand(rates: Rates) -> None:
    """As nanoGPT does: warm-up and cosine, written into the groups before every step."""
    model = network()
    optimizer = adamw(rates, model)
    for step in range(STEPS):
        warm = min(1.0, (step + 1) / 30)
        rate = 1e-3 * warm * (1 + torch.cos(torch.tensor(step / STEPS)).item()) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        backward(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rates.see(optimizer)
        optimizer.step()
        rates.see(optimizer)
        optimizer.zero_grad()


def two_groups(rates: Rates) -> None:
    """Groups with rates of their own, one of them frozen at zero for a while."""
    model = network()
    optimizer = rates.probed(torch.optim.Adam)(
        [
            {"params": model[0].parameters(), "lr": 1e-3},
            {"params": model[2].parameters(), "lr": 3e-2},
        ]
    )
    schedule = schedulers.LambdaLR(
        optimizer, [lambda step: float(step >= 40), lambda step: 0.97**step]
    )
    for _ in range(STEPS):
        backward(model)
        rates.see(optimizer, schedule)
        optimizer.step()
        schedule.step()
        rates.see(optimizer, schedule)
        optimizer.zero_grad()


def two_optimizers(rates: Rates) -> None:
    """A generator and its critic, each with a schedule of its own."""
    generator, critic = network(), nn.Linear(1, 1)
    of_critic = rates.probed(torch.optim.Adam, "critic")(critic.parameters(), lr=2e-3)
    of_generator = rates.probed(torch.optim.Adam, "generator")(generator.parameters(), lr=1e-3)
    both = [
        (of_critic, schedulers.LambdaLR(of_critic, lambda step: 1 / (1 + step))),
        (of_generator, schedulers.StepLR(of_generator, 9, 0.9)),
    ]
    for _ in range(STEPS):
        x, y = batch()
        of_critic.zero_grad()
        (critic(generator(x).detach()) - critic(y)).square().mean().backward()
        of_critic.step()
        of_generator.zero_grad()
        critic(generator(x)).square().mean().backward()
        of_generator.step()
        for optimizer, schedule in both:
            rates.see(optimizer, schedule)
            schedule.step()
            rates.see(optimizer, schedule)


def fused_and_scaled(rates: Rates) -> None:
    """A fused optimizer, which a GradScaler calls."""
    model = network()
    optimizer = adamw(rates, model, fused=True)
    schedule = schedulers.CosineAnnealingLR(optimizer, STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for _ in range(STEPS):
        x, y = batch()
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        rates.see(optimizer, schedule)
        scaler.step(optimizer)
        scaler.update()
        rates.see(optimizer, schedule)
        schedule.step()
        optimizer.zero_grad()


def unfused_and_scaled(rates: Rates) -> None:
    """Gradients are unscaled and clipped before the step."""
    model = network()
    optimizer = sgd(rates, model)
    schedule = schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for _ in range(STEPS):
        x, y = batch()
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rates.see(optimizer, schedule)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        rates.see(optimizer, schedule)
        optimizer.zero_grad()


def lbfgs(rates: Rates) -> None:
    """A closure, called several times within one step."""
    model = network()
    optimizer = rates.probed(torch.optim.LBFGS)(model.parameters(), lr=0.1, max_iter=3)
    schedule = schedulers.CosineAnnealingLR(optimizer, STEPS)

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model)

    for _ in range(STEPS):
        rates.see(optimizer, schedule)
        optimizer.step(closure)
        rates.see(optimizer, schedule)
        schedule.step()


def looking_in_its_closure(rates: Rates) -> None:
    """A closure that logs the rate, as a ``training_step`` of Lightning may."""
    model = network()
    optimizer = adamw(rates, model)
    schedule = schedulers.CosineAnnealingLR(optimizer, STEPS)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = backward(model)
        rates.see(optimizer, schedule)
        return loss

    for _ in range(STEPS):
        optimizer.step(closure)
        schedule.step()


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation as it goes around: a wrapper that shares its groups."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        grads = [p.grad.norm() for g in self.param_groups for p in g["params"]]
        scale = 0.05 / (torch.stack(grads).norm() + 1e-12)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["moved"] = p.grad * scale
                p.add_(self.state[p]["moved"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p]["moved"])
        self.base_optimizer.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        closure = torch.enable_grad()(closure)
        self.first_step()
        closure()
        self.second_step()


def sam_by_closure(rates: Rates) -> None:
    """The step of the wrapped optimizer lies within that of the wrapper."""
    model = network()
    optimizer = Sam(model.parameters(), rates.probed(torch.optim.SGD), lr=0.02)
    schedule = schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(STEPS):
        backward(model)
        rates.see(optimizer, schedule)
        optimizer.step(lambda: backward(model))
        schedule.step()
        rates.see(optimizer, schedule)


def sam_by_hand(rates: Rates) -> None:
    """Both halves called by the loop."""
    model = network()
    optimizer = Sam(model.parameters(), rates.probed(torch.optim.SGD), lr=0.02)
    schedule = schedulers.StepLR(optimizer, 11, 0.8)
    for _ in range(STEPS):
        backward(model)
        optimizer.first_step()
        backward(model)
        rates.see(optimizer, schedule)
        optimizer.second_step()
        schedule.step()
        rates.see(optimizer, schedule)


def subclass_of_a_used_class(rates: Rates) -> None:
    """A subclass that calls ``super().step()``: torch runs all hooks of a step twice then."""
    model = network()
    kind = rates.probed(torch.optim.Adam)
    kind(network().parameters(), lr=1.0)  # now torch has its hooks in the class itself

    class Centred(kind):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad.dim() > 1:
                        p.grad -= p.grad.mean()
            return super().step(closure)

    optimizer = Centred(model.parameters(), lr=1e-3)
    schedule = schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(STEPS):
        backward(model)
        rates.see(optimizer, schedule)
        optimizer.step()
        schedule.step()
        rates.see(optimizer, schedule)
        optimizer.zero_grad()


def within_backward(rates: Rates) -> None:
    """One optimizer per parameter, each stepping as soon as its gradient is there."""
    model = network()
    optimizers, schedules = {}, []
    for nth, parameter in enumerate(model.parameters()):
        kind = rates.probed(torch.optim.SGD, f"parameter {nth}")
        optimizers[parameter] = kind([parameter], lr=0.01 * (nth + 1))
        schedules.append(
            schedulers.LambdaLR(optimizers[parameter], lambda step: 1 / (1 + step))
        )

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(STEPS):
        backward(model)
        for optimizer, schedule in zip(optimizers.values(), schedules, strict=True):
            rates.see(optimizer, schedule)
            schedule.step()
            rates.see(optimizer, schedule)


def relative_adafactor(rates: Rates) -> None:
    """An optimizer that works its rate out by itself: there is none to scale."""
    from transformers.optimization import Adafactor

    model = network()
    optimizer = rates.probed(Adafactor)(
        model.parameters(), scale_parameter=True, relative_step=True, warmup_init=True, lr=None
    )
    for _ in range(STEPS):
        backward(model)
        rates.see(optimizer)
        optimizer.step()
        rates.see(optimizer)
        optimizer.zero_grad()
    rates.weights = [p.detach().clone() for p in model.parameters()]


def lightning(rates: Rates) -> None:
    """Its closure holds the whole training step; it logs the rate where people do."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            rates.see(self.optimizers(), self.lr_schedulers(), saved=False)
            return nn.functional.mse_loss(self.network(x), y)

        def on_train_batch_start(self, *_: Any) -> None:
            rates.see(self.optimizers(), self.lr_schedulers())

        def on_train_batch_end(self, *_: Any) -> None:
            rates.see(self.optimizers(), self.lr_schedulers())

        def configure_optimizers(self) -> Any:
            optimizer = adamw(rates, self)
            schedule = schedulers.OneCycleLR(optimizer, 1e-2, total_steps=STEPS + 1)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    lightning_trainer(gradient_clip_val=1.0).fit(Module(), loader())


def transformers(schedule: str) -> Callable[[Rates], None]:
    """The Trainer, with the schedule of that name; its log is part of what the script sees."""

    def loop(rates: Rates) -> None:
        import transformers as hf

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = network()

            def forward(self, x: Any = None, labels: Any = None) -> dict[str, Tensor]:
                return {"loss": nn.functional.mse_loss(self.network(x), labels)}

        class Look(hf.TrainerCallback):
            def on_pre_optimizer_step(self, *_: Any, **known: Any) -> None:
                rates.see(known["optimizer"], known["lr_scheduler"])

            def on_optimizer_step(self, *_: Any, **known: Any) -> None:
                rates.see(known["optimizer"], known["lr_scheduler"])

            def on_step_end(self, *_: Any, **known: Any) -> None:
                rates.see(known["optimizer"], known["lr_scheduler"])

            def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
                rates.seen.append(logs.get("learning_rate"))

        model = Model()
        with tempfile.TemporaryDirectory() as folder:
            trainer = hf.Trainer(
                model=model,
                args=transformers_arguments(
                    folder,
                    BATCH,
                    learning_rate=1e-3,
                    warmup_steps=30,
                    lr_scheduler_type=schedule,
                    logging_steps=1,
                ),
                train_dataset=[
                    {"x": x, "labels": y}
                    for x, y in zip(*loader().dataset.tensors, strict=True)
                ],
                optimizers=(adamw(rates, model), None),
                callbacks=[Look()],
            )
            trainer.remove_callback(hf.PrinterCallback)
            trainer.train()

    return loop


def accelerate(rates: Rates) -> None:
    """With the linear schedule of Transformers."""
    from accelerate import Accelerator
    from transformers import get_linear_schedule_with_warmup

    accelerator = Accelerator(cpu=True)
    model = network()
    optimizer = adamw(rates, model)
    schedule = get_linear_schedule_with_warmup(optimizer, 30, STEPS)
    model, optimizer, batches, schedule = accelerator.prepare(
        model, optimizer, loader(), schedule
    )
    for x, y in batches:
        loss = nn.functional.mse_loss(model(x), y)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        rates.see(optimizer, schedule)
        optimizer.step()
        schedule.step()
        rates.see(optimizer, schedule)
        optimizer.zero_grad()


class Loop(NamedTuple):
    """One row of the table.

    ``scaled`` False: there is no rate that could be scaled. ``needs``: what else than torch.
    """

    run: Callable[[Rates], None]
    scaled: bool = True
    needs: tuple[str, ...] = ()


LOOPS: dict[str, Loop] = {
    "no schedule": Loop(scheduled()),
    "StepLR": Loop(scheduled(lambda o: schedulers.StepLR(o, 7, 0.9))),
    "MultiStepLR": Loop(scheduled(lambda o: schedulers.MultiStepLR(o, [10, 30, 50], 0.1))),
    "LambdaLR": Loop(scheduled(lambda o: schedulers.LambdaLR(o, lambda n: 1 / (1 + n)))),
    "OneCycleLR": Loop(
        scheduled(lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=STEPS + 1), momentum=0.9)
    ),
    "CyclicLR": Loop(
        scheduled(lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=9), momentum=0.9)
    ),
    "CosineAnnealingLR": Loop(
        scheduled(lambda o: schedulers.CosineAnnealingLR(o, STEPS, 1e-4))
    ),
    "CosineAnnealingWarmRestarts": Loop(
        scheduled(lambda o: schedulers.CosineAnnealingWarmRestarts(o, 13))
    ),
    "ReduceLROnPlateau": Loop(
        scheduled(lambda o: schedulers.ReduceLROnPlateau(o, patience=5), metric=True)
    ),
    "LinearLR warm-up": Loop(scheduled(lambda o: schedulers.LinearLR(o, 0.1, 1.0, 40))),
    "SequentialLR": Loop(
        scheduled(
            lambda o: schedulers.SequentialLR(
                o,
                [schedulers.LinearLR(o, 0.1, 1.0, 30), schedulers.CosineAnnealingLR(o, 42)],
                [30],
            )
        )
    ),
    "by hand, per step": Loop(by_hand),
    "two groups": Loop(two_groups),
    "two optimizers": Loop(two_optimizers),
    "fused, GradScaler": Loop(fused_and_scaled),
    "GradScaler": Loop(unfused_and_scaled),
    "tensor rate": Loop(scheduled(make_optimizer=adamw, in_tensor=True)),
    "tensor rate, LambdaLR": Loop(
        scheduled(
            lambda o: schedulers.LambdaLR(o, lambda n: 1 / (1 + n)), adamw, in_tensor=True
        )
    ),
    "tensor rate, fused": Loop(
        scheduled(
            lambda o: schedulers.StepLR(o, 7, 0.9), in_tensor=True, fused=True, foreach=None
        )
    ),
    "LBFGS": Loop(lbfgs),
    "closure that logs the rate": Loop(looking_in_its_closure),
    "SAM, by closure": Loop(sam_by_closure),
    "SAM, by hand": Loop(sam_by_hand),
    "subclass of a used class": Loop(subclass_of_a_used_class),
    "within backward": Loop(within_backward),
    "Adafactor, relative": Loop(relative_adafactor, scaled=False, needs=("transformers",)),
    "Lightning": Loop(lightning, needs=("lightning",)),
    "Transformers, linear": Loop(transformers("linear"), needs=("transformers",)),
    "Transformers, cosine": Loop(transformers("cosine"), needs=("transformers",)),
    "Transformers, constant": Loop(transformers("constant"), needs=("transformers",)),
    "Accelerate, linear": Loop(accelerate, needs=("accelerate", "transformers")),
}
"""Loops by how they set their rates."""
