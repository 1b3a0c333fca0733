"""What the engine's tests share: one tiny base, adapters of three ranks, reference answers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engines.adapters import Reference, make_adapter
from tests.engines.engine_calls import CPU, Factory
from tunewright.engines.decoder import Decoder
from tunewright.engines.loading import load_decoder
from tunewright.rendering.renderer import Renderer


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two cores are shared with everything else."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Ranks 2, 8 and 16; the last changes only two kinds of layers and scales by rsLoRA's rule."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(tiny_base, folder / "small", seed=1, rank=2),
        make_adapter(tiny_base, folder / "middle", seed=2, rank=8),
        make_adapter(
            tiny_base, folder / "large", seed=3, rank=16, target_modules=["q_proj", "v_proj"], use_rslora=True
        ),
    ]


@pytest.fixture(scope="session")
def reference(tiny_base: Path) -> Reference:
    return Reference(tiny_base)


@pytest.fixture(scope="module")
def tiny_decoder(tiny_base: Path) -> Decoder:
    return load_decoder(tiny_base, CPU, 256)


@pytest.fixture(scope="module")
def renderer(tiny_base: Path) -> Renderer:
    return Renderer(tiny_base)


@pytest.fixture
def engine_of(tiny_base: Path, renderer: Renderer) -> Iterator[Factory]:
    factory = Factory(tiny_base, renderer)
    yield factory
    for engine in factory.engines:
        engine.stop()
