"""What the engine's tests share: one tiny base, adapters of three ranks, reference answers."""

from pathlib import Path

import pytest
import torch

from tests.engines.adapters import Reference, make_adapter


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
