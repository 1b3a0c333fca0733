"""The ways in which a trainer dies without a last record, as signatures that `last_words.py` looks for."""

import signal
from typing import NamedTuple

from tunewright.i18n import mark

PREEMPTED = "preempted"
OUT_OF_MEMORY = "out_of_memory"
DISK_FULL = "insufficient_storage"
STALLED = "stalled"
CRASHED = "crashed"
EXIT_NOT_OURS = 75


class Signature(NamedTuple):
    """One way to die. `code` is that of the job if it fails by it, `pattern` is looked for in every line of the log,
    `exits` are exit codes; either is enough. `cause` and `advice` are marked sentences; no advice: that of the code."""

    name: str
    code: str
    cause: str
    pattern: str = ""
    exits: tuple[int, ...] = ()
    advice: str = ""


_INSTALLATION = mark("An operator must mend the server's installation; then retry the job as it is.")
_DEVICE = mark("An operator must look at the GPU and its driver; then retry the job as it is.")
_DISK = mark("An operator must look at the disk and its permissions; then retry the job as it is.")
_LIMITS = mark("An operator must raise the limits of the server's user; then retry the job as it is.")
_HARDWARE = mark(
    "Retry the job as it is. If it happens again, an operator must test the machine's memory and its libraries."
)

SILENT = Signature("silent", STALLED, mark("The trainer gave no sign of life and was ended."))
STARVED = Signature(
    "killed_for_memory",
    OUT_OF_MEMORY,
    mark("The kernel ended the trainer because the memory of the machine, or of its container, was used up."),
)
WORDLESS = Signature("unknown", CRASHED, mark("The trainer ended without a word in its log."))

SIGNATURES: tuple[Signature, ...] = (
    Signature(
        "terminated",
        PREEMPTED,
        mark("The trainer was asked to end from outside: a node that shuts down, a scheduler, or a person."),
        r"^KeyboardInterrupt",
        (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP),
    ),
    # memory
    Signature(
        "cuda_out_of_memory",
        OUT_OF_MEMORY,
        mark("The memory of the GPU was used up."),
        r"CUDA out of memory|CUDA error: out of memory|HIP out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED",
    ),
    Signature(
        "host_out_of_memory",
        OUT_OF_MEMORY,
        mark("The memory that this process may have was used up."),
        r"(?i)out of memory|can(no|')t allocate memory|unable to allocate|\bMemoryError\b|bad_alloc|"
        # CPython says the last two of an allocation that failed where nobody looks.
        r"failed to map segment|DefaultCPUAllocator|SystemError: error return without exception set|"
        r"SystemError: .* returned NULL without setting an exception",
    ),
    # disk
    Signature(
        "disk_full",
        DISK_FULL,
        mark("The disk is full."),
        r"No space left on device|Disk quota exceeded|File too large|os error (28|122|27)\b",
    ),
    # the processor's own complaints
    Signature(
        "illegal_instruction",
        CRASHED,
        mark("The processor lacks an instruction that a library was built for."),
        r"Illegal instruction",
        (-signal.SIGILL,),
        _INSTALLATION,
    ),
    Signature(
        "bus_error",
        CRASHED,
        mark("A file that was mapped into memory was cut short or can't be read, or /dev/shm is full."),
        r"Bus error",
        (-signal.SIGBUS,),
        _DISK,
    ),
    Signature(
        "segmentation_fault",
        CRASHED,
        mark("A library touched memory that is not its own: a bug of a library, or broken hardware."),
        r"Segmentation fault|Fatal Python error: Segmentation",
        (-signal.SIGSEGV,),
        _HARDWARE,
    ),
    Signature(
        "arithmetic",
        CRASHED,
        mark("A library divided by zero: a bug of a library."),
        r"Floating.point exception",
        (-signal.SIGFPE,),
        _HARDWARE,
    ),
    Signature(
        "cpu_time",
        CRASHED,
        mark("The trainer used up the processor time that its user may have (ulimit -t)."),
        r"CPU time limit exceeded",
        (-signal.SIGXCPU,),
        _LIMITS,
    ),
    Signature(
        "heap_corrupted",
        CRASHED,
        mark("A library damaged the memory of the process: a bug of a library, or broken hardware."),
        r"double free or corruption|free\(\): invalid|malloc\(\): |corrupted size vs|munmap_chunk|stack smashing detected",
        (),
        _HARDWARE,
    ),
    # GPUs
    Signature(
        "cuda_driver",
        CRASHED,
        mark("The GPU's driver and this PyTorch do not fit each other."),
        r"CUDA driver version is insufficient|no kernel image is available|forward compatibility was attempted|"
        r"CUDA driver initialization failed",
        (),
        _DEVICE,
    ),
    Signature(
        "cuda_taken",
        CRASHED,
        mark("No GPU is free: another process has it, or it is not visible."),
        r"CUDA-capable device\(s\) is/are busy|all CUDA-capable devices are busy|No CUDA GPUs are available|"
        r"no CUDA-capable device",
        (),
        _DEVICE,
    ),
    Signature(
        "cuda_hardware",
        CRASHED,
        mark("The GPU failed: a memory error, or it is gone from the bus."),
        r"uncorrectable (ECC|NVLink)|fallen off the bus|CUDA error: unspecified launch failure|CUDA error: unknown error|\bXid\b",
        (),
        _DEVICE,
    ),
    Signature(
        "cuda_assert",
        CRASHED,
        mark("A program on the GPU read outside of its data, for example a token that the model does not have."),
        r"device-side assert|illegal memory access|misaligned address",
    ),
    Signature(
        "cuda_collective",
        CRASHED,
        mark("GPUs could not talk to each other."),
        r"NCCL error|ncclSystemError|ncclUnhandledCudaError|ncclInternalError|Watchdog caught collective",
        (),
        _DEVICE,
    ),
    Signature(
        "cuda_library",
        CRASHED,
        mark("A library of the GPU failed."),
        r"cuDNN error|CUBLAS_STATUS_|CUDA error",
        (),
        _DEVICE,
    ),
    # the installation
    Signature(
        "missing_library",
        CRASHED,
        mark("A shared library is missing on this machine."),
        r"cannot open shared object file|error while loading shared libraries",
        (),
        _INSTALLATION,
    ),
    Signature(
        "wrong_library",
        CRASHED,
        mark("A shared library is of another version than a package was built for."),
        r"undefined symbol|version `\w+_[\d.]+' not found|symbol lookup error|wrong ELF class",
        (),
        _INSTALLATION,
    ),
    Signature(
        "missing_package",
        CRASHED,
        mark("A Python package is missing."),
        r"ModuleNotFoundError|No module named",
        (),
        _INSTALLATION,
    ),
    Signature(
        "mixed_packages",
        CRASHED,
        mark("Python packages of versions that do not fit each other are installed."),
        r"numpy\.dtype size changed|compiled using NumPy|_ARRAY_API not found|operator torchvision::|"
        r"is required for a normal functioning of this module",
        (),
        _INSTALLATION,
    ),
    Signature(
        "math_library",
        CRASHED,
        mark("The library for matrices could not be loaded for this processor."),
        r"MKL FATAL ERROR|OMP: Error|libgomp: (?!Thread creation)",
        (),
        _INSTALLATION,
    ),
    Signature("import", CRASHED, mark("A Python package could not be loaded."), r"^ImportError", (), _INSTALLATION),
    # limits and files
    Signature(
        "too_many_threads",
        CRASHED,
        mark("The server's user may not start more processes or threads (ulimit -u, or the container's limit)."),
        r"can't start new thread|pthread_create failed|Thread creation failed|Resource temporarily unavailable",
        (),
        _LIMITS,
    ),
    Signature(
        "too_many_files",
        CRASHED,
        mark("The server's user may not open more files (ulimit -n)."),
        r"Too many open files",
        (),
        _LIMITS,
    ),
    Signature(
        "read_only",
        CRASHED,
        mark("The disk can only be read: many systems do that to a disk that fails."),
        r"Read-only file system",
        (),
        _DISK,
    ),
    Signature(
        "disk_failed",
        CRASHED,
        mark("The disk, or the network disk, failed while it was read or written."),
        r"Input/output error|Stale file handle|Transport endpoint is not connected|os error (5|116)\b",
        (),
        _DISK,
    ),
    Signature("no_locks", CRASHED, mark("The disk of the home can't lock files."), r"No locks available", (), _DISK),
    Signature(
        "not_permitted",
        CRASHED,
        mark("The trainer may not read or write a file that it needs."),
        r"Permission denied|Operation not permitted|os error 13\b",
        (),
        _DISK,
    ),
    Signature(
        "file_gone",
        CRASHED,
        mark("A file or folder that the trainer needs is gone or is something else: somebody changed the home."),
        r"FileNotFoundError|NotADirectoryError|IsADirectoryError|FileExistsError|No such file or directory",
        (),
        _DISK,
    ),
    Signature(
        "weights_unreadable",
        CRASHED,
        mark("A file of weights can't be read: it was cut short or damaged."),
        r"SafetensorError|HeaderTooLarge|InvalidHeader|MetadataIncompleteBuffer",
        (),
        _DISK,
    ),
    # our own
    Signature(
        "shapes",
        CRASHED,
        mark("Weights have not the shapes that the model's description says."),
        r"size mismatch for|loading state_dict|shapes cannot be multiplied",
    ),
    Signature(
        "unreadable_text",
        CRASHED,
        mark("A file that the trainer reads is not what it should be: its text can't be decoded."),
        r"UnicodeDecodeError|JSONDecodeError|msgspec\.(DecodeError|ValidationError)",
    ),
    Signature(
        "compiler",
        CRASHED,
        mark("PyTorch tried to compile a part of the model and could not."),
        r"torch\._(dynamo|inductor)|InductorError|CppCompileError",
        (),
        _INSTALLATION,
    ),
    Signature("too_deep", CRASHED, mark("The trainer ran in circles: a bug."), r"RecursionError"),
    Signature("timed_out", CRASHED, mark("Something did not answer the trainer in time."), r"TimeoutError|timed out"),
    Signature(
        "aborted",
        CRASHED,
        mark("A library gave up: its reason is in the evidence."),
        r"^terminate called|^Aborted",
        (-signal.SIGABRT,),
    ),
    Signature(
        "killed",
        CRASHED,
        mark("The trainer was killed from outside (SIGKILL): by a person, a scheduler, or a container without memory."),
        "",
        (-signal.SIGKILL,),
    ),
    Signature(
        "not_ours",
        CRASHED,
        mark("Another trainer had the job, or a newer attempt of it had begun."),
        "",
        (EXIT_NOT_OURS,),
    ),
    Signature(
        "exception",
        CRASHED,
        mark("An error inside the trainer that has no name yet: a bug."),
        r"^Traceback \(most recent",
    ),
)
"""The first that fits counts: what is certain before what may be a consequence."""
