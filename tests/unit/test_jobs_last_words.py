"""Of what a trainer died, from what it left behind; and that nothing else of it is shown."""

import signal

import pytest

from tunewright.jobs.last_words import Death, evidence_of, recognise
from tunewright.jobs.recovery import judge
from tunewright.jobs.signatures import CRASHED, SIGNATURES, SILENT, STARVED, WORDLESS

TRACEBACK = """Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "/srv/secret-home/lib/python3.11/site-packages/tunewright/recipes/text.py", line 217, in _step
    loss, hits = summed_loss("the answer is: my cat is called Tom", flat)
"""
DEATHS: dict[str, Death] = {
    "terminated": Death(exit_code=-signal.SIGTERM),
    "cuda_out_of_memory": Death("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB."),
    "host_out_of_memory": Death(
        "RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate"
    ),
    "disk_full": Death("OSError: [Errno 28] No space left on device"),
    "illegal_instruction": Death("Fatal Python error: Illegal instruction", -signal.SIGILL),
    "bus_error": Death("Fatal Python error: Bus error"),
    "segmentation_fault": Death("Fatal Python error: Segmentation fault", -signal.SIGSEGV),
    "arithmetic": Death(exit_code=-signal.SIGFPE),
    "cpu_time": Death(exit_code=-signal.SIGXCPU),
    "heap_corrupted": Death("double free or corruption (!prev)", -signal.SIGABRT),
    "cuda_driver": Death("RuntimeError: CUDA error: no kernel image is available for execution on the device"),
    "cuda_taken": Death("RuntimeError: No CUDA GPUs are available"),
    "cuda_hardware": Death("RuntimeError: CUDA error: uncorrectable ECC error encountered"),
    "cuda_assert": Death("RuntimeError: CUDA error: device-side assert triggered"),
    "cuda_collective": Death("torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1970"),
    "cuda_library": Death("RuntimeError: cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    "missing_library": Death("OSError: libgomp.so.1: cannot open shared object file: No such file or directory"),
    "wrong_library": Death("ImportError: /usr/lib/libc10.so: undefined symbol: _ZN3c10"),
    "missing_package": Death("ModuleNotFoundError: No module named 'peft'"),
    "mixed_packages": Death("ValueError: numpy.dtype size changed, may indicate binary incompatibility."),
    "math_library": Death("Intel MKL FATAL ERROR: Cannot load libmkl_avx512.so"),
    "import": Death("ImportError: DLL load failed"),
    "too_many_threads": Death("RuntimeError: can't start new thread"),
    "too_many_files": Death("OSError: [Errno 24] Too many open files: 'model.safetensors'"),
    "read_only": Death("OSError: [Errno 30] Read-only file system: '/srv/x'"),
    "disk_failed": Death("OSError: [Errno 5] Input/output error"),
    "no_locks": Death("OSError: [Errno 37] No locks available"),
    "not_permitted": Death("PermissionError: [Errno 13] Permission denied: 'step-4'"),
    "file_gone": Death("NotADirectoryError: [Errno 20] Not a directory: 'checkpoints'"),
    "weights_unreadable": Death("safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge"),
    "shapes": Death("RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x8 and 9x2)"),
    "unreadable_text": Death("msgspec.DecodeError: JSON is malformed"),
    "compiler": Death("torch._inductor.exc.InductorError: CppCompileError"),
    "too_deep": Death("RecursionError: maximum recursion depth exceeded"),
    "timed_out": Death("TimeoutError: [Errno 110] Connection timed out"),
    "aborted": Death("terminate called after throwing an instance of 'c10::Error'", -signal.SIGABRT),
    "killed": Death(exit_code=-signal.SIGKILL),
    "not_ours": Death(exit_code=75),
    "exception": Death(TRACEBACK + "KeyError: 'Tom'", 1),
}


def test_every_signature_has_a_death_that_only_it_explains() -> None:
    assert [row.name for row in SIGNATURES] == list(DEATHS)
    assert [recognise(death).name for death in DEATHS.values()] == list(DEATHS)


@pytest.mark.parametrize(
    ("death", "name"),
    [
        (Death("MemoryError\nFatal Python error: Segmentation fault", -signal.SIGSEGV), "host_out_of_memory"),
        (Death("a warning: Permission denied\nSegmentation fault", -signal.SIGSEGV), "segmentation_fault"),
        (Death("KeyboardInterrupt", 1), "terminated"),
        (Death("SystemError: error return without exception set", 1), "host_out_of_memory"),
        (Death("the user wrote KeyboardInterrupt", 1), "unknown"),
        (Death("", -signal.SIGKILL, starved=True), "killed_for_memory"),
        (Death("MemoryError", None, silent=True), "silent"),
        (Death("", 1), "unknown"),
        (Death("", None), "unknown"),
        (Death(TRACEBACK, 1), "exception"),
    ],
)
def test_what_is_certain_goes_before_what_follows_from_it(death: Death, name: str) -> None:
    assert recognise(death).name == name


def test_evidence_shows_places_and_kinds_and_nothing_that_rows_or_operators_said() -> None:
    log = (
        "what a row says: 我的密码是 123\n"
        + TRACEBACK
        + "RuntimeError: can't allocate memory for 'my cat' at /srv/secret-home/jobs/x with Bearer abc.def token=hunter22\n\n"
        "During handling of the above exception, another exception occurred:\n\n"
        + TRACEBACK
        + "ValueError: Tom is no number\n"
    )
    shown = evidence_of(Death(log, -signal.SIGKILL, starved=True))
    assert shown.splitlines() == [
        "exit: signal 9 (SIGKILL)",
        "kernel: oom_kill",
        "File <frozen runpy>, line 198, in _run_module_as_main",
        "File tunewright/recipes/text.py, line 217, in _step",
        "RuntimeError: can't allocate memory for … at x with … …",
        "File <frozen runpy>, line 198, in _run_module_as_main",
        "File tunewright/recipes/text.py, line 217, in _step",
        "ValueError: …",
    ]


def test_evidence_is_short_however_long_the_log_is() -> None:
    frames = "".join(f'  File "/x/site-packages/torch/f.py", line {n}, in f\n' for n in range(500))
    shown = evidence_of(Death("Traceback (most recent call last):\n" + frames + "RuntimeError: " + "x" * 9000, 1))
    assert shown.splitlines()[1:] == [*(f"File torch/f.py, line {n}, in f" for n in range(496, 500)), "RuntimeError: …"]
    assert len(evidence_of(Death("MemoryError: " + "x" * 10**6))) < 300
    assert evidence_of(Death()) == ""


def verdict(name: str, *, failures: int = 0, halved: bool = False):
    row = next(row for row in (*SIGNATURES, SILENT, STARVED, WORDLESS) if row.name == name)
    return judge(row, failures=failures, step=9, checkpoint_step=8, halved=halved, max_attempts=3)


def test_what_follows_from_a_death() -> None:
    assert [verdict("killed", failures=n).fatal for n in range(4)] == [False, False, True, True]
    assert (verdict("killed").code, verdict("killed", failures=2).code) == ("trainer_died", CRASHED)
    assert verdict("silent", failures=2).code == "stalled"
    assert verdict("killed").delay_s < verdict("killed", failures=1).delay_s


@pytest.mark.parametrize("name", ["terminated", "disk_full"])
def test_what_is_nobodys_fault_is_not_counted(name: str) -> None:
    found = verdict(name, failures=2)
    assert (found.fatal, found.failures) == (False, 2) and found.delay_s > 0


@pytest.mark.parametrize("name", ["cuda_out_of_memory", "host_out_of_memory", "killed_for_memory"])
def test_want_of_memory_is_met_once(name: str) -> None:
    first, second = verdict(name, failures=5), verdict(name, halved=True)
    assert (first.code, first.fatal) == ("micro_batch_halved", False)
    assert (second.code, second.fatal) == ("out_of_memory", True)
