"""Training loops of the kinds that public scripts have, which keep their own account.

Each loop of :data:`PUBLIC` trains for :data:`~testkit.ledger.STEPS` steps, knows nothing of us
and writes into a :class:`~testkit.ledger.Ledger` what it took: the loss of each step as its
author would report it, norms and rates. Loops of frameworks are in
:mod:`testkit.public_frameworks`.
"""

from __future__ import annotations

from collections.abc import Callable

from testkit.ledger import Ledger
from testkit.public_examples import (
    dcgan,
    fairseq,
    mnist,
    muon_and_adamw,
    nano_gpt,
    pix2pix,
    schedule_free,
    torchtitan,
    wgan_gp,
    word_language_model,
)
from testkit.public_losses import (
    adversarial_training,
    clips_too_early,
    curvature_now_and_then,
    dqn,
    dqn_of_old,
    last_step_is_shorter,
    micro_batches,
    reinforce,
    sam_by_closure,
    sam_by_hand,
    soft_actor_critic,
    two_tasks,
)
from testkit.public_trainers import (
    by_autograd_grad,
    by_torch_func,
    clipped_under_a_scaler,
    deepspeed,
    ignite,
    low_rank,
    meta_learning,
    no_rate,
    skorch,
    timm,
    ultralytics,
)

PUBLIC: dict[str, Callable[[Ledger], None]] = {
    "examples: mnist": mnist,
    "examples: word_language_model": word_language_model,
    "examples: dcgan": dcgan,
    "examples: reinforce": reinforce,
    "tutorial: dqn": dqn,
    "dqn, clamp by hand": dqn_of_old,
    "wgan-gp": wgan_gp,
    "pix2pix": pix2pix,
    "nanoGPT": nano_gpt,
    "torchtitan": torchtitan,
    "fairseq": fairseq,
    "Muon and AdamW": muon_and_adamw,
    "schedule-free": schedule_free,
    "soft actor-critic": soft_actor_critic,
    "SAM, by hand": sam_by_hand,
    "SAM, by closure": sam_by_closure,
    "adversarial training": adversarial_training,
    "clips too early": clips_too_early,
    "curvature now and then": curvature_now_and_then,
    "two tasks, one graph": two_tasks,
    "micro-batches": micro_batches,
    "micro-batches, a shorter last step": last_step_is_shorter,
    "torch.func": by_torch_func,
    "autograd.grad": by_autograd_grad,
    "meta-learning": meta_learning,
    "skorch": skorch,
    "GradScaler, clipped by hand": clipped_under_a_scaler,
    "DeepSpeed's engine": deepspeed,
    "timm": timm,
    "ultralytics": ultralytics,
    "ignite": ignite,
    "PEFT": low_rank,
    "relative Adafactor": no_rate,
}
"""Loops by whose they are like."""
