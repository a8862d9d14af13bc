"""How long a run has taken, as all its processes agree."""

from __future__ import annotations

import time


class Clock:
    """The time of a run, over all its sessions, without that between them.

    The main rank's clock decides: what it reads travels with what the ranks tell each other before each step
    (`fastflower.runtime.distributed.Ranks.lockstep`), so that all decide the same by `agreed_s`.
    """

    def __init__(self) -> None:
        """Start it, at 0."""
        self._start = time.monotonic()
        self.agreed_s = 0.0

    def go_on_from(self, agreed_s: float) -> None:
        """Count this session's time, since the clock was started, after what earlier ones took."""
        self._start -= agreed_s
        self.agreed_s = agreed_s

    def read_ms(self) -> int:
        """What this process's clock shows (milliseconds)."""
        return round(1000 * (time.monotonic() - self._start))

    def agree(self, ms: int) -> None:
        """Take over what the main rank's clock showed; it never goes back."""
        self.agreed_s = max(self.agreed_s, ms / 1000)
