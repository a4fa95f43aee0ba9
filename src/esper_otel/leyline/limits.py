"""Limits of the contents of a step record, the same for every sender and channel.

They are checked at the edge, before anything is copied or kept; what is beyond one is refused
and counted. What is within them stays within 64 bits through all sums that are made of it, as
that is what MessagePack and OTLP can carry.
"""

from __future__ import annotations

MAX_STEP = (1 << 53) - 1
"""Largest number of a step: from there on a double no longer tells one step from the next."""

MAX_RANK = (1 << 31) - 1
"""Largest rank, and largest number of ranks that a trainer may name: what torch.distributed and
MPI count with."""

MAX_TIME_UNIX_NANO = (1 << 62) - 1
"""Latest time of a frame, in the year 2116: two such times can be added. 0 says no time."""

MAX_NAME = 256
"""Longest id of a run, an instance or a seed, in characters."""

MAX_CUSTOM = 64
"""Custom values that a run may have, and so a step of one rank."""

MAX_CUSTOM_NAME = 100
"""Longest name of a custom value, in characters."""

MAX_SEEDS_PER_FRAME = 256
"""Seeds that one step of one rank may report. An Ask with all their values is near the 64 KiB
that a message may have."""
