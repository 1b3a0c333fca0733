"""Products of activations and weights in the precision that was chosen. What goes in and comes out stays as it is: float32 on
processors, the model's own number format on GPUs.

Shape legend: T tokens of the step, I and O features in and out.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as functional

Product = Callable[[torch.Tensor], torch.Tensor]

FLOAT32, BFLOAT16, INT8 = "float32", "bfloat16", "int8"
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


class Products(NamedTuple):
    """How a decoder multiplies. `largest` says by linear layer how large each feature of what it is given was in some texts;
    int8 goes by that. `plain`: exact weights with few outputs are not packed (`measuring.plain_is_faster`)."""

    precision: str = FLOAT32
    largest: Mapping[str, torch.Tensor] = {}
    plain: bool = False

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
