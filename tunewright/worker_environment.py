"""The environment of worker processes. A module of its own: what starts a process must not wait for pydantic first."""

import os

_KEPT = (
    "PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR",
    "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip

LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""For engines, which read the same large matrices all the time: a tenth faster in pages of 2 MB than of 4 KB."""

VLLM = {
    "VLLM_NO_USAGE_STATS": "1",
    # The worker has threads: a copy of it by fork, which is vLLM's way on GPUs, may have their locks held for ever.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else two workers share the first core
}
"""For engines that have vLLM compute; nobody else reads it."""


def worker_environment() -> dict[str, str]:
    """The whole environment of a worker process: an allow-list, so that no database URL and no key gets there."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return (
        kept
        | {
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OPENBLAS_NUM_THREADS": "1",  # numpy's products: no setting of ours tells them of threads
        }
        | VLLM
    )


def numpy_has_one_thread() -> bool:
    """Whether numpy's BLAS computes on the thread that asks alone: so it is in a worker, and where there is but one core."""
    return os.environ.get("OPENBLAS_NUM_THREADS") == "1" or len(os.sched_getaffinity(0)) == 1
