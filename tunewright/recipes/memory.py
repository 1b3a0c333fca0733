"""What it looks like when memory runs out."""

import errno

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error, of host or GPU, means that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return "DefaultCPUAllocator" in text or "out of memory" in text or "std::bad_alloc" in text
