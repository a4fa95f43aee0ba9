"""Registry: the workload that a scenario trains.

==============  ===========================================================================
``heavytail``   a regression with Student's t as noise: single batches far out
``curriculum``  a language model whose texts get longer and harder, in phases
``alternating`` batches of two kinds by turns, or a penalty at every eighth step
``finetune``    a classifier that has nearly fitted: a loss close to zero, hard batches
``policy``      an actor-critic that balances a pole
``dqn``         deep Q-learning of the same game
``gan``         a generator and its critic, with an optimizer each
``triplet``     embeddings by a triplet loss that is often exactly zero
``vae``         a variational autoencoder, its loss summed, with a KL warm-up
``embedding``   a matrix from some of its entries
==============  ===========================================================================

Steps of these take about 0.5 to 3 ms, on one thread. The three larger ones are in
:mod:`~bench.scenarios.workloads`.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.scenarios.classifiers import Alternating, FineTune, Triplet
from bench.scenarios.curriculum import Curriculum
from bench.scenarios.games import Dqn, Policy
from bench.scenarios.generators import Gan, Vae
from bench.scenarios.regressions import Embedding, HeavyTail
from bench.scenarios.suite import Scenario
from bench.scenarios.varied import Varied, variant_of
from bench.scenarios.workloads import WORKLOADS, Workload

VARIED: dict[str, Callable[[int], Varied]] = {
    "heavytail": HeavyTail,
    "curriculum": Curriculum,
    "alternating": Alternating,
    "finetune": FineTune,
    "policy": Policy,
    "dqn": Dqn,
    "gan": Gan,
    "triplet": Triplet,
    "vae": Vae,
    "embedding": Embedding,
}


def workload_of(scenario: Scenario) -> Workload:
    """The workload of ``scenario``, before it is trained; draws from torch's generator."""
    if scenario.workload in WORKLOADS:
        return WORKLOADS[scenario.workload]()
    return VARIED[scenario.workload](variant_of(scenario))
