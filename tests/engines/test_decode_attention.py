"""Attention of decoding rows is the same by torch and by numpy, and the faster one is found."""

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

from tunewright.engines import decode_attention
from tunewright.engines.decode_attention import by_numpy, by_torch, fastest_attention


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("heads, queries", [(3, 3), (2, 16), (1, 71), (4, 1)])
@pytest.mark.parametrize("length", [1, 31, 64, 341, 342, 700])
@pytest.mark.parametrize("scale", [None, 0.3])
@torch.inference_mode()
def test_both_are_the_same(heads: int, queries: int, length: int, scale: float | None) -> None:
    """All at once, in blocks, and in blocks with a rest; part of a larger memory; queries as views; values of another size."""
    torch.manual_seed(0)
    query_BHGD = torch.randn(5, heads * queries + 2, 8)[:, : heads * queries].unflatten(1, (heads, queries))
    key_BHLD, value_BHLD = torch.randn(5, heads, 768, 8)[:, :, :length], torch.randn(5, heads, 768, 12)[:, :, :length]
    added_B11L = torch.zeros(5, 1, 1, length)
    added_B11L[1, ..., length // 2 + 1 :] = torch.finfo(torch.float32).min
    kept = query_BHGD.clone(), key_BHLD.clone(), value_BHLD.clone(), added_B11L.clone()
    for added in (None, added_B11L):
        expected_BHGD = by_torch(query_BHGD, key_BHLD, value_BHLD, added, scale)
        torch.testing.assert_close(by_numpy(query_BHGD, key_BHLD, value_BHLD, added, scale), expected_BHGD)
    after = query_BHGD, key_BHLD, value_BHLD, added_B11L
    assert all(torch.equal(one, other) for one, other in zip(kept, after, strict=True))


@torch.inference_mode()
def test_a_row_that_is_not_finite_stays_alone_and_nothing_is_printed() -> None:
    query_BHGD, stored = torch.ones(2, 1, 2, 4), torch.ones(2, 1, 700, 4)
    stored[1, 0, 5] = torch.inf
    with warnings.catch_warnings(action="error"):
        found_BHGD = by_numpy(query_BHGD, stored, stored, None, None)
    assert found_BHGD[1].isnan().any() and torch.equal(found_BHGD[0], torch.ones(1, 2, 4))


@pytest.mark.usefixtures("one_thread")
def test_the_faster_one_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, took_s = [0.0], {"by_torch": 1.0, "by_numpy": 1.0}
    monkeypatch.setattr(decode_attention, "thread_cpu_s", lambda: now_s[0])

    def timed(name: str) -> object:
        def attend(*_: object) -> None:
            now_s[0] += took_s[name]

        return attend

    kinds = {name: timed(name) for name in took_s}
    for name, kind in kinds.items():
        monkeypatch.setattr(decode_attention, name, kind)
    assert fastest_attention(9, 3, 64) is kinds["by_torch"]
    took_s["by_numpy"] = 0.8
    assert fastest_attention(9, 3, 64) is kinds["by_numpy"]
    torch.set_num_threads(2)
    assert fastest_attention(9, 3, 64) is kinds["by_torch"]
    torch.set_num_threads(1)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert fastest_attention(9, 3, 64) is kinds["by_torch"]


@pytest.mark.usefixtures("one_thread")
def test_models_of_all_sizes_can_be_measured() -> None:
    for q_heads, kv_heads, head_size in ((9, 3, 64), (1, 1, 4), (128, 128, 192)):
        assert fastest_attention(q_heads, kv_heads, head_size) in (by_torch, by_numpy)
