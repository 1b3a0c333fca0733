"""What it looks like when memory runs out."""

import errno

import torch

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
