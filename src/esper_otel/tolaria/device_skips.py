"""Updates left out by a device itself, which nobody waits for to tell that they should be.

A GradScaler tells a fused optimizer whether gradients overflowed by a tensor, ``found_inf``,
that the optimizer's kernel reads on the device. The same way is taken here for a gradient
norm that is not finite.
"""

from __future__ import annotations

from typing import Any


def withhold_unless_finite(optimizer: Any, norm: Any) -> Any:
    """Have ``optimizer`` leave its next update out if ``norm``, a tensor, is not finite.

    Returns the tensor of one element that is 1.0 then, for :func:`release`; None where the
    optimizer cannot be told so, or a GradScaler tells it already. Nothing is read.
    """
    import torch

    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None  # the attribute by which GradScaler itself knows fused optimizers
    if getattr(optimizer, "found_inf", None) is not None:
        return None
    if norm.is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # a graph would repeat the choice of this one step
    with torch.no_grad():
        found = torch.isfinite(norm.detach()).logical_not().to(torch.float32).reshape(())
    optimizer.found_inf = found
    return found


def release(optimizer: Any, found: Any) -> None:
    """``optimizer`` has stepped: it is told nothing any more."""
    if getattr(optimizer, "found_inf", None) is found:
        del optimizer.found_inf
