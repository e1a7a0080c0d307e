"""When ranks that share out experts take steps together: in waves. Pure; what is sent is returned.

    front end --start(w)--> every rank     a request came and no wave is known to run
    rank --wants(w)--> front end           it has work, and its wave w has not been started
    rank 0 --ended(w)--> front end         a step of wave w was empty on every rank

In a wave every rank takes every step, an empty one without work; a step that is empty on all of them ends it, which all
see in the same step, so that none waits for another that has gone home. A rank begins on start(w) alone. A request that
reaches a rank behind the end of a wave which the front end believes to run is what wants(w) is for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class FrontWave:
    """What the front end knows: the wave that runs, or is the next to run."""

    wave: int = 0
    running: bool = False

    def request(self) -> tuple[FrontWave, int | None]:
        """A request goes to some rank. Return what is known then, and which wave to start at every rank, if any."""
        return (self, None) if self.running else (replace(self, running=True), self.wave)

    def wants(self, wave: int) -> tuple[FrontWave, int | None]:
        """A rank has work and waits for this wave; as `request`."""
        if wave < self.wave or (wave == self.wave and self.running):
            return self, None  # it has been started: start(wave) is on its way
        return FrontWave(wave, True), wave

    def ended(self, wave: int) -> FrontWave:
        """A wave has ended on every rank. A later one may have been started meanwhile."""
        return FrontWave(wave + 1, False) if wave == self.wave else self


@dataclass(frozen=True, slots=True)
class RankWave:
    """What a rank knows: the wave that it is in, or the next; whether it has said that it waits for that one."""

    wave: int = 0
    running: bool = False
    said: bool = False

    def start(self, wave: int) -> RankWave:
        """The front end starts a wave, which is the next of every rank."""
        assert wave == self.wave and not self.running, (wave, self)
        return replace(self, running=True)

    def wants(self) -> tuple[RankWave, int | None]:
        """The rank has work. Return what it knows then, and which wave it says that it waits for, if any."""
        return (self, None) if self.running or self.said else (replace(self, said=True), self.wave)

    def stepped(self, empty: bool) -> tuple[RankWave, int | None]:
        """A step has ended. Return what the rank knows then, and which wave has ended with it, if any.

        empty  no rank had tokens in it
        """
        assert self.running, self
        return (RankWave(self.wave + 1), self.wave) if empty else (self, None)
