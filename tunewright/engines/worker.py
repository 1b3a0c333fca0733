"""The engine worker: `python -m tunewright.engines.worker <worker_folder>` serves one base until it is told to end.

Exit codes: 0 after SIGTERM or as an idle orphan, 78 when the operator must change something, 1 when the engine died.
"""

import asyncio
import ctypes
import gc
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tunewright.clock import mono_s
from tunewright.deployments.ports import WorkerProcess, WorkerSpec
from tunewright.engines.base_files import verify_files
from tunewright.errors import Misconfigured, TunewrightError
from tunewright.files_on_disk import write_atomically
from tunewright.i18n import mark
from tunewright.models.whole_models import verify
from tunewright.rendering.canary import canaries
from tunewright.rendering.renderer import Renderer

if TYPE_CHECKING:
    from tunewright.engines.torch import Engine
    from tunewright.engines.vllm import VllmEngine

_NAME = "tunewright.engines.worker"
_log = logging.getLogger(_NAME)
_WATCH_INTERVAL_S = 0.5
_MISCONFIGURED = 78


def main(folder: Path) -> int:
    """Serve; returns the exit code."""
    parent = os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # until the event loop takes over
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        spec = msgspec.json.decode((folder / "spec.json").read_bytes(), type=WorkerSpec)
        if spec.engine == "vllm" and spec.python not in (None, sys.executable):
            # The same process goes on as one of the other environment: whoever waits for it need not know.
            os.execv(spec.python, [spec.python, "-P", "-m", _NAME, str(folder)])
        return asyncio.run(_serve(folder, spec, parent))
    except TunewrightError as error:
        _log.error("%s", error)
        return _MISCONFIGURED
    except (OSError, msgspec.MsgspecError):
        _log.exception("the worker can't start")
        return _MISCONFIGURED


async def _serve(folder: Path, spec: WorkerSpec, parent: int) -> int:
    from tunewright.engines.connections import Connections

    gc.disable()  # a fifth of the time that the libraries take to import
    engine = await asyncio.to_thread(_build_engine, spec, folder)
    gc.collect()
    _give_back()
    gc.freeze()  # what is there now stays: no need to look through it again
    gc.enable()
    await asyncio.to_thread(engine.start)
    connections = Connections(engine, spec.secret)
    server = await connections.listen()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    port = server.sockets[0].getsockname()[1]
    process = WorkerProcess(pid=os.getpid(), start_ticks=_own_start_ticks(), port=port, worker_id=spec.worker_id)
    write_atomically(folder / "worker.json", msgspec.json.encode(process))
    _log.info("serving %s on port %d", spec.base_code, port)
    orphaned_s: float | None = None
    while True:
        try:
            await asyncio.wait_for(stop.wait(), _WATCH_INTERVAL_S)
            return 0
        except TimeoutError:
            pass
        if not engine.alive:
            _log.critical("the engine's thread died")
            return 1
        if os.getppid() != parent:
            orphaned_s = mono_s() if orphaned_s is None else orphaned_s
            idle_since_s = max(orphaned_s, connections.last_open_s)
            if not connections.n_open and mono_s() - idle_since_s >= spec.idle_exit_s:
                _log.info("no server needs this worker any more")
                return 0


def _build_engine(spec: WorkerSpec, worker_folder: Path) -> "Engine | VllmEngine":
    folder = Path(spec.base_path)
    if spec.engine == "vllm":
        return _build_vllm(spec, worker_folder)
    with ThreadPoolExecutor(2) as side_by_side:  # both go on while the libraries are imported, which takes seconds
        verified = side_by_side.submit(_verify, spec)
        rendering = side_by_side.submit(Renderer, folder)
        from tunewright.engines.constraints import Constraints
        from tunewright.engines.loading import load_decoder
        from tunewright.engines.placement import placement_of, use_threads
        from tunewright.engines.references import order_of, reference
        from tunewright.engines.torch import Engine

        spec = msgspec.structs.replace(spec, threads=use_threads(spec.threads))
        verified.result()
        renderer = rendering.result()
        _check_renderer(renderer, spec)
        weights = Path(spec.weights_path or folder)
        placement = placement_of(weights, spec.precision, spec.weights)
        texts = canaries(renderer)
        remembered = reference(order_of(spec, placement, texts), spec)
        decoder = load_decoder(weights, placement, spec.context_tokens, texts, remembered)
    decoder_of = renderer.stream_decoder
    constraints = Constraints(folder / "tokenizer.json", renderer.stop_ids, renderer.vocabulary_size, decoder_of)
    return Engine(
        decoder,
        decoder_of,
        spec,
        vocabulary=renderer.vocabulary_size,
        placement=placement,
        constraints=constraints,
    )


def _build_vllm(spec: WorkerSpec, worker_folder: Path) -> "VllmEngine":
    from tunewright.engines.vllm import VllmEngine, end_group_with_this_process

    end_group_with_this_process()
    _verify(spec)
    renderer = Renderer(Path(spec.base_path))
    _check_renderer(renderer, spec)
    return VllmEngine(spec, renderer, worker_folder)


def _check_renderer(renderer: Renderer, spec: WorkerSpec) -> None:
    if renderer.hash != spec.renderer_hash:
        raise Misconfigured(
            "renderer_changed", mark("This worker would render conversations in another way than the server.")
        )


def _verify(spec: WorkerSpec) -> None:
    """Raises Misconfigured(`base_changed`), InvalidRequest(`model_files_changed`)."""
    files = spec.base_files
    if spec.weights_path is not None:
        verify(Path(spec.weights_path), spec.weights_sha256 or "")
        files = {name: sha256 for name, sha256 in files.items() if not name.endswith(".safetensors")}  # not loaded
    verify_files(Path(spec.base_path), files)


def _give_back() -> None:
    """Memory that was freed goes back to the system, where the C library does that: loading leaves holes of hundreds of MB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _own_start_ticks() -> int:
    """Field 22 of /proc/self/stat; the name in field 2 may hold spaces and brackets."""
    stat = Path("/proc/self/stat").read_text()
    return int(stat.rpartition(")")[2].split()[19])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tunewright.engines.worker WORKER_FOLDER")
    code = main(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)  # open connections close with the process; the libraries' own farewells take seconds
