"""What GPUs get, as far as processors can show it: the choice, flex attention uncompiled, FlashAttention's calls, replays."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engines.engine_calls import CPU
from tunewright.engines import gpu_attention
from tunewright.engines.batch import Part, make_batch
from tunewright.engines.decode_graphs import DecodeGraphs, Run
from tunewright.engines.kv_cache import SlotCache
from tunewright.engines.loading import load_decoder
from tunewright.engines.placement import FLASH, FLEX, PLAIN, choose_attention


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "flash", "expected"),
    [
        ((9, 0), "bfloat16", 128, True, FLASH),
        ((8, 0), "float16", 64, True, FLASH),
        ((8, 0), "bfloat16", 64, False, FLEX),
        ((8, 0), "float32", 64, True, FLEX),
        ((8, 6), "bfloat16", 20, True, FLEX),
        ((8, 6), "bfloat16", 512, True, FLEX),
        ((7, 5), "float16", 64, True, FLEX),
        ((7, 0), "float16", 64, True, PLAIN),
        ((6, 1), "float16", 64, False, PLAIN),
    ],
)
def test_the_choice(capability: tuple[int, int], dtype: str, head_size: int, flash: bool, expected: str) -> None:
    found = choose_attention(capability=capability, dtype=dtype, head_size=head_size, flash=flash)
    assert found == expected


def test_processors_use_plain_attention() -> None:
    assert gpu_attention.attention_of(torch.device("cpu"), torch.float32, 64) == PLAIN


def attention(query: Any, key: Any, value: Any, lengths: Any, softmax_scale: Any, window_size: Any) -> torch.Tensor:
    """What flash_attn's documentation says of causal attention: query i of n sees up to key length - n + i."""
    out = torch.empty_like(query)
    for row in range(len(query)):
        length, n = int(lengths[row]), query.shape[1]
        for head in range(query.shape[2]):
            shared = head // (query.shape[2] // key.shape[2])
            scores = query[row, :, head] @ key[row, :length, shared].T * softmax_scale
            places = torch.arange(length)[None] - (torch.arange(n)[:, None] + length - n)
            hidden = places > 0
            if window_size[0] >= 0:
                hidden |= places < -window_size[0]
            out[row, :, head] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value[row, :length, shared]
    return out


def fake_flash() -> SimpleNamespace:
    def whole(q: Any, k: Any, v: Any, *, softmax_scale: Any, causal: bool, window_size: Any) -> torch.Tensor:
        assert causal
        return attention(q, k, v, [k.shape[1]] * len(q), softmax_scale, window_size)

    def cached(
        q: Any, k_cache: Any, v_cache: Any, *, cache_seqlens: Any, softmax_scale: Any, causal: bool, window_size: Any
    ) -> torch.Tensor:
        assert causal and cache_seqlens.dtype == torch.int32
        return attention(q, k_cache, v_cache, cache_seqlens, softmax_scale, window_size)

    return SimpleNamespace(flash_attn_func=whole, flash_attn_with_kvcache=cached)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("way", [FLASH, FLEX])
def test_both_ways_are_plain_attention(way: str, window: int | None, flash: None) -> None:
    """Two chunks, one of them with tokens before it, and three decoding rows of different lengths behind another slot."""
    generator = torch.Generator().manual_seed(0)
    cache = SlotCache(slots=6, context_tokens=64)
    cache.reserve(6, 64)

    def part(slot: int, offset: int, n: int, decoding: bool) -> Part:
        return Part(slot, offset, [1] * n, None, True, decoding)

    def random(n: int, heads: int) -> torch.Tensor:
        return torch.randn(n, heads, 8, generator=generator)

    before = make_batch([part(slot, 0, n, False) for slot, n in ((1, 9), (2, 4), (3, 14), (4, 6))], "cpu")
    cache.write(0, random(33, 2), random(33, 2), before)
    batch = make_batch(
        [part(1, 9, 1, True), part(2, 4, 1, True), part(3, 14, 1, True), part(4, 6, 5, False), part(5, 0, 7, False)],
        "cpu",
    )
    cache.write(0, random(15, 2), random(15, 2), batch)
    query_TQD = random(15, 4)
    attend: Callable[..., torch.Tensor] = gpu_attention.attend_flash if way == FLASH else gpu_attention.attend_flex
    found = attend(query_TQD, cache._keys[0], cache._values[0], batch, 0.3, window)
    torch.testing.assert_close(found, cache.attend(0, query_TQD, batch, 0.3, window), rtol=1e-5, atol=1e-5)


class FlashCache(SlotCache):
    """What the cache does where FlashAttention is: no length is more than a number in a tensor."""

    def attend(
        self, layer: int, query_TQD: Any, batch: Any, scale: Any = None, window: Any = None, decoding: Any = None
    ) -> torch.Tensor:
        return gpu_attention.attend_flash(query_TQD, self._keys[layer], self._values[layer], batch, scale, window)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash())


class Recorder:
    """Records as a CUDA graph does: what it runs again reads and writes the same memory."""

    def __init__(self, *, fault: float = 0.0) -> None:
        self.recorded = self.replayed = 0
        self._fault = fault

    def __call__(self, run: Run) -> Run:
        self.recorded += 1
        out = run().clone()

        def replay() -> torch.Tensor:
            self.replayed += 1
            out.copy_(run() + self._fault)
            return out

        return replay


@torch.inference_mode()
@pytest.mark.parametrize("fault", [0.0, 100.0])
def test_replayed_steps_are_the_same_steps(fault: float, tiny_base: Path, flash: None) -> None:
    """Rows that grow and change slots, and prompts in between; a recording that says something else is never used."""
    decoder: Any = load_decoder(tiny_base, CPU, 300)
    recorder = Recorder(fault=fault)
    graphs = DecodeGraphs(decoder.logits, recorder)
    caches = [FlashCache(slots=4, context_tokens=300) for _ in range(2)]
    lengths = [5, 9, 2]

    def step(parts: list[Part]) -> None:
        results = []
        for cache, logits in zip(caches, (decoder.logits, graphs.logits), strict=True):
            cache.reserve(max(part.slot for part in parts) + 1, max(part.offset + len(part.tokens) for part in parts))
            results.append(logits(make_batch(parts, "cpu"), cache).clone())
        torch.testing.assert_close(results[1], results[0])

    step([Part(i, 0, list(range(3, 3 + n)), None, True, False) for i, n in enumerate(lengths)])
    for turn in range(12):
        step([Part(i, n, [(7 * turn + i) % 500], None, True, True) for i, n in enumerate(lengths)])
        lengths = [n + 1 for n in lengths]
    step(
        [Part(3, 0, [4, 5, 6], None, True, False), *(Part(i, n, [9], None, True, True) for i, n in enumerate(lengths))]
    )
    lengths = [*(n + 1 for n in lengths), 3]
    for turn in range(8):
        step([Part(i, n, [(5 * turn + i) % 500], None, True, True) for i, n in enumerate(lengths)])
        lengths = [n + 1 for n in lengths]
    if fault:
        assert (recorder.recorded, recorder.replayed) == (1, 1)
    else:
        assert recorder.recorded >= 2
        assert recorder.replayed > 10


@torch.inference_mode()
def test_a_cache_that_moved_is_recorded_anew(tiny_base: Path, flash: None) -> None:
    decoder: Any = load_decoder(tiny_base, CPU, 900)
    recorder = Recorder()
    graphs = DecodeGraphs(decoder.logits, recorder)
    cache = FlashCache(slots=4, context_tokens=900)
    for length in range(5, 15):
        cache.reserve(1, length + 1)
        graphs.logits(make_batch([Part(0, length, [7], None, True, True)], "cpu"), cache)
    assert recorder.recorded == 1
    before = cache.allocation
    cache.reserve(2, 600)
    assert cache.allocation != before
    for length in range(15, 25):
        graphs.logits(make_batch([Part(0, length, [7], None, True, True)], "cpu"), cache)
    assert recorder.recorded == 2
