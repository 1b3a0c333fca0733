"""Products of activations and weights in the precision that was chosen. What goes in and comes out stays as it is: float32 on
processors, the model's own number format on GPUs.

Shape legend: T tokens of the step, I and O features in and out.
"""

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as functional

Product = Callable[[torch.Tensor], torch.Tensor]

FLOAT32, BFLOAT16, FLOAT16, INT8 = "float32", "bfloat16", "float16", "int8"
HEAD = "lm_head"
_STEPS = 127
_STEPS_WITHOUT_VNNI = 63
"""Of weights: older processors add two products in 16 bits, where 255 * 127 * 2 has no room."""
_MIDDLE = 128
"""What 0 becomes: the kernel takes activations without sign."""
_EXACT = 8
"""As near to float32 as 16, and a quarter cheaper (docs/log.md)."""
_FEW_OUTPUTS = 3
"""Times as many as inputs. With more of them, packed is faster everywhere."""
_TINY = 1e-20
_LARGEST_EXPONENT = 15
"""Of numbers of 16 bits."""
_HALF_UNIT = 2.0**-24
"""What float32 itself rounds away, beside the number that is rounded."""
_SOME_ROWS = 128
"""Of weights are looked at together: the first ones tell of most that 2 bytes do not hold them."""
_FBGEMM = "wrapped_fbgemm_linear_fp16_weight"
_MOST_ROWS = 120
"""So many at a time FBGEMM multiplies; what is left it takes in pieces."""


class Products(NamedTuple):
    """How a decoder multiplies. `largest` says by linear layer how large each feature of what it is given was in some texts;
    int8 goes by that. What is fastest for exact weights is measured (`measuring.fastest_exact`): `plain` leaves those with few
    outputs unpacked, `half` keeps those in 2 bytes each that lose nothing by it."""

    precision: str = FLOAT32
    largest: Mapping[str, torch.Tensor] = {}
    plain: bool = False
    half: bool = False

    def of(self, name: str, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> Product:
        """A function x -> x @ weight.T + bias that does not change x. The weight itself is not needed any more."""
        if (
            weight_OI.device.type != "cpu"
            or weight_OI.dtype != torch.float32
            or not torch.backends.mkldnn.is_available()
        ):
            return _linear(weight_OI, bias_O)
        if self.precision == INT8:
            return _int8(weight_OI, bias_O, self.largest.get(name, weight_OI.new_ones(weight_OI.shape[1])))
        if self.precision == BFLOAT16:
            packs = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # not on processors with AVX2 alone
            make = packed_product if packs else _linear
            product = make(weight_OI.bfloat16(), None if bias_O is None else bias_O.bfloat16())
            return lambda x_TI: product(x_TI.bfloat16()).float()
        if self.precision == FLOAT16:
            return half_product(weight_OI, bias_O) if has_half() else packed_product(weight_OI.half().float(), bias_O)
        if self.half and (scale := half_scale(weight_OI)):
            return half_product(weight_OI, bias_O, scale)
        if self.plain and len(weight_OI) <= _FEW_OUTPUTS * weight_OI.shape[1]:
            return plain_product(weight_OI, bias_O)
        return packed_product(weight_OI, bias_O)


def _linear(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> Product:
    return lambda x_TI: functional.linear(x_TI, weight_OI, bias_O)


def plain_product(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> Product:
    """As it is but for the order in memory, for the BLAS that torch comes with."""
    weight_IO = weight_OI.t().contiguous()
    return lambda x_TI: torch.mm(x_TI, weight_IO) if bias_O is None else torch.addmm(bias_O, x_TI, weight_IO)


def packed_product(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> Product:
    """Packed once for oneDNN: twice as fast for small batches."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
    pointwise = torch.ops.mkldnn._linear_pointwise
    return lambda x_TI: pointwise(x_TI, packed, bias_O, "none", [], "")


def has_half() -> bool:
    """Whether torch comes with FBGEMM for this processor."""
    return torch.backends.quantized.engine in ("x86", "fbgemm") and hasattr(torch.ops._quantized, _FBGEMM)


def half_scale(weight_OI: torch.Tensor) -> float | None:
    """A power of two times which the weights are 16 bit floats, as of models that were trained in bfloat16; None if there is
    none. Weights so small that float32 rounds more away beside the largest one may differ by that."""
    largest = float(weight_OI.abs().max())
    if not 0 < largest < torch.inf:
        return None
    for scale in (1.0, 2.0 ** (_LARGEST_EXPONENT - math.frexp(largest)[1])):
        if all(_rounding(some_OI * scale) <= _HALF_UNIT * largest * scale for some_OI in weight_OI.split(_SOME_ROWS)):
            return scale
    return None


def _rounding(weight_OI: torch.Tensor) -> float:
    """How far the weights are from 16 bit floats at most."""
    return float(weight_OI.half().float().sub_(weight_OI).abs_().max())


def half_product(weight_OI: torch.Tensor, bias_O: torch.Tensor | None, scale: float = 1.0) -> Product:
    """Weights, times `scale`, in 2 bytes each, all else in float32 (FBGEMM): few rows mostly wait for weights."""
    multiply = _half_multiply(weight_OI * scale, None if bias_O is None else bias_O * scale)
    spare = _spare_rows()

    def product(x_TI: torch.Tensor) -> torch.Tensor:
        rows = len(x_TI)
        extra = spare[rows % _MOST_ROWS]
        if extra:
            x_TI = functional.pad(x_TI, (0, 0, 0, extra))
        y_TO = multiply(x_TI)
        if scale != 1:
            y_TO.mul_(1 / scale)
        return y_TO[:rows] if extra else y_TO

    return product


def _half_multiply(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> Product:
    """The operation of the same name in `torch.ops.quantized` takes 12 us longer a call to find its weights."""
    packed, outputs = torch.ops._quantized.wrapped_fbgemm_pack_gemm_matrix_fp16(weight_OI), len(weight_OI)
    multiply = getattr(torch.ops._quantized, _FBGEMM).default
    return lambda x_TI: multiply(x_TI, packed, bias_O, outputs)


@cache
def _spare_rows() -> list[int]:
    """How many rows to add to so many, that each is summed in the same order whatever its company.

    FBGEMM's kernels for one and two rows have an order of their own; which numbers of rows end in them depends on the
    processor and is found by trying.
    """
    generator = torch.Generator().manual_seed(0)
    x_TI, weight_OI = (torch.randn(n, 128, generator=generator) for n in (_MOST_ROWS, 32))
    multiply = _half_multiply(weight_OI, None)
    all_TO = multiply(x_TI)
    alike = [torch.equal(multiply(x_TI[:rows]), all_TO[:rows]) for rows in range(_MOST_ROWS)] + [True]
    return [next(more for more in range(_MOST_ROWS) if alike[rows + more]) for rows in range(_MOST_ROWS)]


def _int8(weight_OI: torch.Tensor, bias_O: torch.Tensor | None, largest_I: torch.Tensor) -> Product:
    """Weights rounded to 255 steps for each output, activations at each product to 255 steps for each token.

    The few features that are largest are left out of that and multiplied as they are, for they would leave few steps to the
    others. Of the others, large features give a part of their size to their weights first (as in SmoothQuant).
    """
    exact_K = largest_I.topk(max(1, min(_EXACT, len(largest_I) // 8))).indices
    exact_KO = weight_OI[:, exact_K].t().contiguous()
    factor_I = (largest_I.clamp(min=_TINY) / weight_OI.abs().amax(dim=0).clamp_(min=_TINY)).sqrt_()
    shrink_I = factor_I.reciprocal()
    factor_I[exact_K] = shrink_I[exact_K] = 0
    grown_OI = weight_OI * factor_I
    steps = _STEPS if torch.cpu._is_vnni_supported() else _STEPS_WITHOUT_VNNI
    scale_O = grown_OI.abs().amax(dim=1).clamp_(min=_TINY).div_(steps)
    packed = torch.ops.onednn.qlinear_prepack(grown_OI.div_(scale_O[:, None]).round_().to(torch.int8), None)
    zero_O = torch.zeros(len(scale_O), dtype=torch.int32)
    pointwise = torch.ops.onednn.qlinear_pointwise

    def product(x_TI: torch.Tensor) -> torch.Tensor:
        shrunk_TI = x_TI * shrink_I
        # Two looks at the numbers, but no copy of them as for abs().
        most_T1, least_T1 = shrunk_TI.amax(dim=1, keepdim=True), shrunk_TI.amin(dim=1, keepdim=True)
        scale_T1 = torch.maximum(most_T1, least_T1.neg_()).clamp_(min=_TINY).div_(_STEPS)
        steps_TI = shrunk_TI.div_(scale_T1).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(_MIDDLE)
        y_TO = pointwise(
            steps_TI, 1.0, _MIDDLE, packed, scale_O, zero_O, None, 1.0, 0, torch.float32, "none", [], ""
        ).mul_(scale_T1)
        y_TO.addmm_(x_TI.index_select(1, exact_K), exact_KO)
        return y_TO if bias_O is None else y_TO.add_(bias_O)

    return product
