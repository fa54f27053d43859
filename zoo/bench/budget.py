"""Wall-clock time of a run, shared out over what is still to be measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Budget:
    """Time until a deadline.

    seconds: wall-clock seconds from now, > 0, or infinity for no limit. clock: seconds, rising.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._begun = clock()

    def left(self, until: float = 1.0) -> float:
        """Seconds left before the share `until` (0 to 1) of the whole time is used up, >= 0."""
        if math.isinf(self.seconds):
            return math.inf
        return max(0.0, self._begun + until * self.seconds - self._clock())

    def share(self, waiting: int, until: float = 1.0) -> float:
        """Seconds for each of `waiting` tasks (>= 1) that have to be done before the share `until` is used up."""
        return self.left(until) / waiting
