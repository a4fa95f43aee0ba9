"""The norm of a step's gradients, from before anybody has clipped them.

A script may clip in ways that nobody is told of (``p.grad.data.clamp_(-1, 1)``, a norm computed
by hand). So where a loop has one optimizer whose steps follow the same number of ``backward``
calls each time, its gradients are measured behind the last of these, and not when it steps:
once a step in either case. The functions of torch that clip tell what they do, and what they
were given is the norm then.

Until an optimizer has stepped once nobody knows of how many calls its steps are made; until
then its gradients are measured behind each. After each of its first steps they are measured
once more: where the script only multiplies them by a number that is always the same (their
mean over micro-batches, taken at the end) it is the norm of the product that counts. So it is
where one of these is greater than before: no clipping does that, but others are made of them
(several tasks' gradients projected on each other, noise).

In a process of several ranks gradients may be averaged by the script between backward and the
step: there only clipping that tells of itself is seen.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from math import isfinite
from time import perf_counter_ns
from typing import Any, NamedTuple

from esper_otel.integrations.jobs import Job, Jobs
from esper_otel.integrations.kept_gradients import KeptGradients
from esper_otel.integrations.primary import parameters_of
from esper_otel.leyline.frames import Value
from esper_otel.loop import tell_once
from esper_otel.tolaria.gradients import gradient_norm, whole_norm, with_gradients
from esper_otel.tolaria.identities import IdentityMap

MAX_CLIPS = 8
"""Norms that are remembered until the optimizer steps whose gradients they may be of."""

MOST_UNSTEPPED = 4
"""Optimizers that have not stepped yet whose gradients are measured behind a ``backward``."""

PATIENCE = 16
"""Times that this is done for one that never steps."""

TRIALS = 3
"""Steps of a training at which gradients are measured before and after clipping."""

MOST_NOTED = 8
"""Optimizers of a training beyond which none is looked at when another is made."""

SAME = 1e-3
"""Relative difference up to which two of these say the same."""

_UNKNOWN = "whether gradients were kept is not known"


class _Known(NamedTuple):
    """The ``norm`` of gradients of these ``parameters``, by id, behind the n-th backward."""

    backwards: int
    parameters: list[int]
    norm: Any
    told: bool
    """Whether a function that clips has told it."""


class _Early(NamedTuple):
    """What was measured behind backward."""

    optimizer: weakref.ref[Any]
    tensor: Any
    value: Value
    changes: tuple[int, int]
    """Changes in place that the gradients had been through by then, and which the last was."""


class _Habit:
    """How the loop of one training treats its gradients."""

    def __init__(self) -> None:
        self.backwards = 0
        """Calls of ``backward`` before the last step."""
        self.tells = False
        """Whether that was clipped by a function that tells of it."""
        self.remakes = False
        """Whether the script does something else to gradients than clip them."""
        self.trials: list[float] | None = []
        """Norm at the step by norm behind backward, of the first steps; None after these."""


class GradientNorms:
    """Measures, or is told, the norm of gradients as the loop of ``jobs`` made them."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._known: deque[_Known] = deque(maxlen=MAX_CLIPS)
        self._unstepped: IdentityMap[int] = IdentityMap()
        self.any_unstepped = False
        self._habits: weakref.WeakKeyDictionary[Job, _Habit] = weakref.WeakKeyDictionary()
        self._early: _Early | None = None
        self._kept = KeptGradients()
        self._backwards = 0
        """Calls of ``backward`` since the optimizer that sets the steps stepped."""
        self.engine: Any = None
        """An optimizer around the one that steps, which knows the norm (DeepSpeed's)."""
        self.use(jobs.current)

    def use(self, job: Job) -> None:
        """The loop works on ``job`` from here on."""
        self._job = job
        self._loop = job.run._loop
        self._recorder = job.recorder
        self._is_alone = job.run.settings.world_size == 1
        self._habit = self._habits.setdefault(job, _Habit())

    # Optimizers that nobody knows of yet.

    def made(self, optimizer: Any) -> None:
        """The script has made an ``optimizer``."""
        self._unstepped[optimizer] = 0
        self.any_unstepped = True
        if len(self._job.optimizers) <= MOST_NOTED:
            self._job.note_parameters()  # of one that it may replace, while that lives

    @property
    def unstepped(self) -> Iterator[Any]:
        """Optimizers that have not stepped, seeds' excepted."""
        return (each for each in self._unstepped if not self._jobs.is_seed_optimizer(each))

    # What the loop does, in the order in which a step does it.

    def backward_begins(self) -> None:
        """Gradients are about to change."""
        self._backwards += 1
        if self._early is not None:
            self._drop_early()
        try:
            self._kept.before_backward()
            control = self._recorder.control
            if control.clears_gradients:
                control.clears_gradients = self._kept.clear()
        except Exception:
            tell_once(_UNKNOWN)

    def backward_ended(self, *, scaled: bool, optimizing: bool) -> None:
        """They have; ``scaled`` by a ``GradScaler``, ``optimizing``: within a closure."""
        try:
            self._kept.after_backward()
        except Exception:
            tell_once(_UNKNOWN)
        if scaled or not self._is_alone or self._recorder.norm is not None:
            return
        habit = self._habit
        if self.any_unstepped and not optimizing:
            self._measure_unstepped()
        if habit.tells or habit.remakes:
            return
        is_last = self._backwards == habit.backwards
        if is_last or (optimizing and not habit.backwards):
            self._measure(self._job.primary.current)

    def unscaled(self, optimizer: Any) -> None:
        """A ``GradScaler`` has taken its scale out of the gradients of ``optimizer``."""
        if not self._is_alone or not self._recorder.wants_norm:
            return
        if optimizer in self._unstepped:
            self._measure_unstepped(optimizer)
        elif optimizer is self._job.primary.current and not (
            self._habit.tells or self._habit.remakes
        ):
            self._measure(optimizer)

    def clipped(self, parameters: list[Any], norm: Any) -> None:
        """The script clips gradients of ``parameters``, whose norm was ``norm`` before."""
        norm = whole_norm(norm, parameters)
        if norm is not None:
            ids = with_gradients(parameters)
            self._known.append(_Known(self._backwards, ids, norm, True))

    def before_clipping(self, parameters: list[Any]) -> None:
        """The script is about to clip gradients of ``parameters`` by something else."""
        if self._early is None:
            norm = gradient_norm(parameters)
            if norm is not None:
                self._remember(parameters, norm, told=True)

    def update_begins(self, optimizer: Any, *, has_closure: bool) -> None:
        """``optimizer``, whose steps are the run's, is about to step.

        Where it ``has_closure``, its gradients are still to be made.
        """
        habit, early = self._habit, self._early
        if has_closure:
            self._drop_early()
            self._known.clear()
            return
        habit.backwards = self._backwards
        habit.tells = False
        if self.engine is not None:
            self._take_from(self.engine)
        elif self._known and self.tell(optimizer):
            return
        if early is None:
            return
        if early.optimizer() is not optimizer:
            self._drop_early()
            return
        self._early = None
        if early.tensor.is_cuda:
            self._loop.norm_on_device(optimizer, early.tensor)
        if type(early.value) is not float:
            return
        if habit.trials is not None:
            self._try(habit, early.value, optimizer)
        elif _changes(optimizer) != early.changes:
            self._look_for_more(early.value, optimizer)

    def begins_to_step(self, optimizer: Any) -> None:
        """``optimizer`` is about to step, for the first time perhaps."""
        self._unstepped.discard(optimizer)
        self.any_unstepped = len(self._unstepped) > 0

    def step_ended(self, optimizer: Any) -> None:
        """``optimizer``, whose steps are the run's, has stepped."""
        if self._known:  # clipped by a closure, within the step
            self.tell(optimizer)
        if self._were_kept(optimizer):
            self._recorder.under_way.gradients_kept = 1.0
        self._habit.backwards = self._backwards
        self._backwards, self._early = 0, None

    def skipped(self, optimizer: Any) -> None:
        """It was not let step: its gradients are over all the same."""
        self._were_kept(optimizer)
        self._known.clear()
        self._backwards, self._early = 0, None

    def tell(self, optimizer: Any) -> bool:
        """Tell the norm of what was clipped, if that is all that ``optimizer`` steps by.

        Not before it steps: which optimizer that will be is not known for certain. The norm
        of a part of its gradients, or of others, is not the norm the registry means.
        """
        stepped = with_gradients(parameters_of(optimizer))
        found: _Known | None = None
        for known in self._known:
            if known.backwards == 0 < self._backwards:
                continue  # clipped before backward: these were the gradients of the step before
            if found is not None and known.backwards == found.backwards and found.told:
                continue  # clipped twice: the first saw them as they were
            if known.parameters == stepped or sorted(known.parameters) == sorted(stepped):
                found = known
        self._known.clear()
        if found is None:
            return False
        self._early = None
        value = self._loop.scalars.read_async(found.norm)
        self._recorder.clipped(value)
        if not found.told and type(value) is float:
            self._look_for_more(value, optimizer)
        if getattr(found.norm, "is_cuda", False):
            self._loop.norm_on_device(optimizer, found.norm)
        self._habit.tells = found.told
        return True

    def _were_kept(self, optimizer: Any) -> bool:
        """Whether gradients of the last update of ``optimizer`` were in this one as well."""
        try:
            return self._kept.after_update(optimizer)
        except Exception:
            tell_once(_UNKNOWN)
            return False

    def _measure(self, optimizer: Any) -> None:
        if optimizer is None:
            return
        began = perf_counter_ns()
        tensor = self._norm_of(optimizer)
        if tensor is None:
            return
        value = self._loop.scalars.read_async(tensor)
        if type(value) is float and not isfinite(value):
            return  # a script may take out what is not finite: the step tells
        self._recorder.measured(value, began)
        self._early = _Early(weakref.ref(optimizer), tensor, value, _changes(optimizer))

    def _norm_of(self, optimizer: Any) -> Any:
        try:
            return self._loop.norm_tensor(optimizer)
        except Exception:
            return None  # it fails once more at the step, and is reported there

    def _measure_unstepped(self, *optimizers: Any) -> None:
        for optimizer in optimizers or list(self.unstepped)[:MOST_UNSTEPPED]:
            times = (self._unstepped.get(optimizer) or 0) + 1
            if times > PATIENCE:
                self._unstepped.discard(optimizer)
                continue
            self._unstepped[optimizer] = times
            norm = self._norm_of(optimizer)
            if norm is not None and (norm.is_cuda or bool(norm.isfinite())):
                self._remember(parameters_of(optimizer), norm, told=False)

    def _remember(self, parameters: Iterable[Any], norm: Any, *, told: bool) -> None:
        self._known.append(_Known(self._backwards, with_gradients(parameters), norm, told))

    def _take_from(self, engine: Any) -> None:
        norm = getattr(engine, "_global_grad_norm", None)
        if norm:
            self._recorder.clipped(self._loop.scalars.read_async(norm))

    def _drop_early(self) -> None:
        early, self._early = self._early, None
        if early is not None:
            self._recorder.under_way.forget_norm(early.value)

    def _look_for_more(self, early: float, optimizer: Any) -> Value | None:
        """Tell the norm anew if gradients have grown since: what is clipped has not, and what
        went wrong behind backward is what the update must not be made with. Returns what it is
        now."""
        began = perf_counter_ns()
        tensor = self._norm_of(optimizer)
        late = None if tensor is None else self._loop.scalars.read_async(tensor)
        if type(late) is float and not late <= early * (1.0 + SAME):
            self._recorder.measured(late, began)
        return late

    def _try(self, habit: _Habit, early: float, optimizer: Any) -> None:
        """Whether what the script does to gradients is no clipping."""
        late, trials = self._look_for_more(early, optimizer), habit.trials
        if trials is None or type(late) is not float or early <= 0.0:
            return
        trials.append(late / early)
        if len(trials) < TRIALS:
            return
        least, most = min(trials), max(trials)
        is_product = most - least <= SAME * most and most < 1.0 - SAME
        habit.remakes = is_product or most > 1.0 + SAME
        habit.trials = None


def _changes(optimizer: Any) -> tuple[int, int]:
    """How often the gradients of ``optimizer`` were changed in place, as torch counts it, and
    the ``id`` of the last: who puts others in their place does so with all of them."""
    versions, gradient = 0, None
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                gradient = parameter.grad
                versions += gradient._version
    return versions, id(gradient)
