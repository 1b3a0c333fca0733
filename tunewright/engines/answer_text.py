"""From tokens to the text that may be shown: whole characters, and never a part of a stop string."""

from typing import Protocol


class StreamDecoder(Protocol):
    """What the renderer gives: tokens in, whole characters out."""

    def push(self, token_id: int, /) -> str:
        """Text that is complete after this token; may be empty."""
        ...

    def flush(self) -> str:
        """What is left at the end."""
        ...


class AnswerText:
    """Turns a row's tokens into text, holding back whatever may still become a stop string."""

    def __init__(self, decoder: StreamDecoder, stop: list[str]) -> None:
        self._decoder = decoder
        self._stop = [text for text in stop if text]
        self._held = ""
        self.taken = 0
        """Characters of the answer so far, held back ones included."""
        self.shown = 0
        self.stopped = False

    def push(self, token_id: int) -> tuple[str, bool]:
        """Text that can be shown now, and whether a stop string was met (the text before it is then all there is)."""
        return self._release(self._decoder.push(token_id))

    def finish(self) -> tuple[str, bool]:
        """The rest, when the answer ends for another reason; again whether a stop string was met in it."""
        text, met = self._release(self._decoder.flush())
        if met:
            return text, True
        text, self._held = text + self._held, ""
        self.shown = self.taken
        return text, False

    def _release(self, new: str) -> tuple[str, bool]:
        self.taken += len(new)
        if not self._stop:
            self.shown = self.taken
            return new, False
        self._held += new
        places = [place for place in (self._held.find(stop) for stop in self._stop) if place >= 0]
        if places:
            text, self._held, self.stopped = self._held[: min(places)], "", True
        else:
            keep = max(_overlap(self._held, stop) for stop in self._stop)
            text = self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
        self.shown += len(text)
        return text, self.stopped


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning (not the whole) of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
