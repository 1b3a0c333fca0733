"""What it looks like when memory runs out, and what is said of it."""

import errno
from collections.abc import Callable
from typing import TypeVar

import torch

from tunewright.errors import InvalidRequest
from tunewright.i18n import mark
from tunewright.recipes.attempt import Attempt

_Done = TypeVar("_Done")
_WORDS = (
    "DefaultCPUAllocator",
    "out of memory",
    "std::bad_alloc",
    "annot allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error, of host or GPU, means that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return any(words in text for words in _WORDS)


def explaining_memory(attempt: Attempt, work: Callable[[], _Done]) -> _Done:
    """What `work` returns. Raises what it raises, and InvalidRequest(`out_of_memory`) when memory was not enough."""
    try:
        return work()
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        wanted = attempt.spec.hyperparameters
        raise InvalidRequest(
            "out_of_memory",
            mark(
                "Memory was not enough to train with batch_size {batch_size} and rows of up to {max_length} tokens. "
                "Shorten the longest rows, lower batch_size, or choose a smaller base model."
            ),
            param="hyperparameters.batch_size",
            batch_size=wanted.batch_size,
            max_length=wanted.max_length,
        ) from error
