"""torch's and numpy's products are the same, and the faster ones are found."""

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

from tunewright.recipes import products
from tunewright.recipes.products import NUMPY, TORCH, product


@pytest.fixture(autouse=True)
def torchs_afterwards() -> Iterator[None]:
    yield
    products.use(TORCH)


@pytest.mark.parametrize("name", [TORCH, NUMPY])
def test_products_of_matrices_and_batches(name: str) -> None:
    torch.manual_seed(0)
    products.use(name)
    left, right = torch.randn(7, 5), torch.randn(9, 5, requires_grad=True)
    batches, others = torch.randn(3, 8, 5)[:, 1:], torch.randn(3, 4, 7)
    with torch.no_grad():
        out = torch.empty(7, 9)
        assert product(left, right.t(), out=out) is out
        found = [out, product(batches, others.transpose(1, 2)[:, :5]), product(left.chunk(2)[0].t(), batches[0][:4])]
        expected = [
            torch.einsum("ik,jk->ij", left, right),
            torch.einsum("bik,bjk->bij", batches, others[..., :5]),
            torch.einsum("ki,kj->ij", left[:4], batches[0][:4]),
        ]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
        assert not one.requires_grad


def test_numpys_are_for_float32_alone_and_silent_about_what_is_not_finite() -> None:
    products.use(NUMPY)
    half = torch.ones(4, 4, dtype=torch.bfloat16)
    assert product(half, half).dtype == torch.bfloat16
    with warnings.catch_warnings(action="error"):
        assert product(torch.full((40, 40), 1e38), torch.full((40, 40), 1e38)).isinf().all()
        assert product(torch.full((40, 40), torch.inf), torch.zeros(40, 40)).isnan().all()


def test_the_faster_ones_are_measured_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    now, threads = [0.0], []
    monkeypatch.setattr(products, "thread_cpu_s", lambda: now[0])

    def slow(name: str) -> None:
        took = {TORCH: 0.0, NUMPY: 0.0, name: 1.0}

        def timed(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> None:
            threads.append(torch.get_num_threads())
            now[0] += 1 + took[NUMPY if products._by_numpy else TORCH]

        monkeypatch.setattr(products, "product", timed)

    torch.set_num_threads(2)
    slow(TORCH)
    name, figures = products.faster(512, 512)
    assert name == NUMPY and set(threads) == {1}
    assert figures["numpy_products_gflop_per_s"] == pytest.approx(2 * figures["torch_products_gflop_per_s"], abs=0.1)
    slow(NUMPY)
    assert products.faster(512, 512)[0] == TORCH
    slow("neither")
    assert products.faster(512, 512)[0] == TORCH
    assert torch.get_num_threads() == 2 and not products._by_numpy
    torch.set_num_threads(1)


def test_tiny_models_and_a_blas_of_many_threads_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    assert products.faster(512, 512)[1]
    assert products.faster(64, 128) == (TORCH, {})
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert products.faster(512, 512) == (TORCH, {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1})
    assert products.faster(512, 512)[1]
