"""How much a name (a key, an address) may use up in a minute."""

from tunewright.clock import mono_s

_MOST_NAMES = 10_000


class Buckets:
    """For each name `burst` at once and `per_minute` in the long run; 0 per minute means no limit."""

    def __init__(self, per_minute: int, burst: int) -> None:
        self.per_minute = per_minute
        self._burst = burst
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, name: str) -> tuple[int, float]:
        """Take one: how many are left, and how many seconds until there is one if there was none (else 0)."""
        wait_s = self.wait_s(name)
        if wait_s:
            return 0, wait_s
        return self.spend(name, 1), 0.0

    def wait_s(self, name: str) -> float:
        """How many seconds until there is one; 0 if there is."""
        level = self._level(name) if self.per_minute else 1.0
        return 0.0 if level >= 1 else (1 - level) * 60 / self.per_minute

    def spend(self, name: str, amount: int) -> int:
        """Take `amount`, also more than there is: what is known only afterwards is paid back by waiting. Returns what is left."""
        if not self.per_minute:
            return self._burst
        level = self._level(name) - amount
        if len(self._levels) >= _MOST_NAMES:
            self._levels = {other: kept for other, kept in self._levels.items() if self._level(other) < self._burst}
        self._levels[name] = (level, mono_s())
        return max(0, int(level))

    def _level(self, name: str) -> float:
        level, at = self._levels.get(name, (float(self._burst), 0.0))
        return min(self._burst, level + (mono_s() - at) * self.per_minute / 60)
