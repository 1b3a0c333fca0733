"""One slow call in a thread of its own, so that the control loop never waits."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Errand(Generic[T]):
    """Starts at once. A daemon thread: a process that ends leaves it behind, so the call must survive being cut off."""

    def __init__(self, call: Callable[[], T], then: Callable[[], None]) -> None:
        """`then` is called from that thread once the call is over, whatever came of it."""
        self._call = call
        self._then = then
        self._value: T
        self._error: BaseException | None = None
        self._over = threading.Event()
        threading.Thread(target=self._run, name="errand", daemon=True).start()

    @property
    def over(self) -> bool:
        return self._over.is_set()

    def result(self) -> T:
        """What the call returned; raises what it raised. Only once it is over."""
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:  # handed to `result`
            self._error = error
        self._over.set()
        self._then()
