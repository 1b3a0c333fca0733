"""The output head and the table of embeddings, which are one matrix in many models: then it is in memory once.

Shape legend: T tokens, V vocabulary, E model size, P outputs side by side in a packed weight.
"""

import ctypes
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as functional

from tunewright.engines.products import FLOAT16, FLOAT32, HEAD, Product, Products, half_scale
from tunewright.engines.weight_files import WeightFiles

Rows = Callable[[torch.Tensor], torch.Tensor]
"""From token ids [T] to their embeddings [T, E]."""
_PANELS = (64, 48, 32, 24, 16, 8)
"""How many outputs oneDNN's kernels for one processor or another have side by side."""


def head_and_rows(weights: WeightFiles, head: str, embedding: str, products: Products) -> tuple[Product, Rows]:
    """The product with the tensor `head`, and what looks up rows of the tensor `embedding`, which may be the same."""
    weight_VE = weights(head)
    on_processor = weight_VE.device.type == "cpu" and weight_VE.dtype == torch.float32
    exact = products.precision == FLOAT32 and not (products.half and half_scale(weight_VE))
    if head == embedding and on_processor and exact and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_VE)
        rows = _rows_of_packed(packed, weight_VE)
        if rows is not None:
            pointwise = torch.ops.mkldnn._linear_pointwise
            return lambda x_TE: pointwise(x_TE, packed, None, "none", [], ""), rows
    table_VE = weight_VE if head == embedding else weights(embedding)
    product = products.of(HEAD, weight_VE)
    small_VE = _in_two_bytes(table_VE, rounded=products.precision == FLOAT16)  # nothing of the file stays mapped
    dtype = table_VE.dtype  # the function must not hold the table itself
    return product, lambda ids_T: functional.embedding(ids_T, small_VE).to(dtype)


def _in_two_bytes(table_VE: torch.Tensor, *, rounded: bool) -> torch.Tensor:
    """A copy, with 2 bytes for each number where that loses nothing, or is wanted."""
    for dtype in (torch.float16, torch.bfloat16):
        small_VE = table_VE.to(dtype, copy=True)
        if rounded or torch.equal(small_VE.to(table_VE.dtype), table_VE):
            return small_VE
    return table_VE.clone()


def _rows_of_packed(packed: torch.Tensor, weight_VE: torch.Tensor) -> Rows | None:
    """Looks up rows where they lie in `packed`; None if they are not found there to the last bit.

    oneDNN does not say how it packs: for P outputs at a time the weights of each input side by side, on all processors known.
    """
    find = getattr(torch.ops.mkldnn, "data_ptr", None)
    if find is None:
        return None
    outputs, inputs = weight_VE.shape
    numbers = torch.ops.mkldnn._nbytes(packed) // weight_VE.element_size()
    memory = (ctypes.c_float * numbers).from_address(find(packed))
    flat = torch.from_numpy(np.ctypeslib.as_array(memory))
    for panel in _PANELS:
        whole = outputs // panel
        if not whole or numbers != -(-outputs // panel) * panel * inputs:
            continue
        panels_NEP = flat.view(-1, inputs, panel)
        expected_NPE, rest_RE = weight_VE[: whole * panel].view(whole, panel, inputs), weight_VE[whole * panel :]
        if (
            torch.equal(panels_NEP[0].t(), expected_NPE[0])  # soon tells most of the wrong ones
            and torch.equal(panels_NEP[:whole].transpose(1, 2), expected_NPE)
            and torch.equal(panels_NEP[-1, :, : len(rest_RE)].t(), rest_RE)
        ):
            return partial(_look_up, packed, panels_NEP)
    return None


def _look_up(_: torch.Tensor, panels_NEP: torch.Tensor, ids_T: torch.Tensor) -> torch.Tensor:
    """The first argument is who owns the memory of the second."""
    outputs = panels_NEP.shape[2]
    return panels_NEP[ids_T // outputs, :, ids_T % outputs]
