"""Linear layers that share an input, computed as one matrix product, with their LoRA pairs as one more.

The merged weight holds the layers' own: they become views of it, so it costs no memory. Gradients are made by hand:
none of frozen weights, and none of the input where nothing below is trained.
"""

from typing import Any

import torch

from tunewright.recipes.adapters import ADAPTER_NAME
from tunewright.recipes.products import product


class Linears:
    """The layers of one input. `parameters` are those trained: all A and then all B, or all weights."""

    def __init__(self, modules: list[Any], dtype: torch.dtype) -> None:
        self.dtype = dtype
        bases = [getattr(module, "base_layer", module) for module in modules]
        self.widths = [base.out_features for base in bases]
        self.weight = torch.cat([base.weight.detach() for base in bases])
        for base, part in zip(bases, self.weight.split(self.widths), strict=True):
            base.weight.data = part
        self.adapted = len(bases) > 0 and bases[0] is not modules[0]
        if self.adapted:
            self.down = [module.lora_A[ADAPTER_NAME].weight for module in modules]
            self.up = [module.lora_B[ADAPTER_NAME].weight for module in modules]
            self.scale = float(modules[0].scaling[ADAPTER_NAME])
            self.ranks = [len(down) for down in self.down]
            self.parameters = self.down + self.up
        else:
            self.parameters = [base.weight for base in bases]
        self._copy: tuple[tuple[int, ...], torch.Tensor] | None = None

    def now(self) -> "LinearsNow":
        """The weights as they are now, in the type that is computed in."""
        if not self.adapted:
            return LinearsNow(self, self._current_copy(), None, None)
        down = torch.cat([down.detach() for down in self.down]).to(self.dtype)
        up = [(up.detach() * self.scale).to(self.dtype) for up in self.up]
        return LinearsNow(self, self.weight, down, up)

    def _current_copy(self) -> torch.Tensor:
        """Trained weights are float32; where bfloat16 is computed in, they are copied once after each change."""
        if self.weight.dtype == self.dtype:
            return self.weight
        versions = tuple(parameter._version for parameter in self.parameters)
        if self._copy is None or self._copy[0] != versions:
            self._copy = (versions, self.weight.to(self.dtype))
        return self._copy[1]


class LinearsNow:
    """One pass forward and backward through them. Shapes: inputs (T, in), outputs (T, sum of widths), R the sum of ranks."""

    def __init__(
        self, linears: Linears, weight: torch.Tensor, down_RC: torch.Tensor | None, up: list[torch.Tensor] | None
    ) -> None:
        """`up` are the B of each layer, (its width, its rank)."""
        self.linears = linears
        self.weight = weight
        self.down, self.up = down_RC, up

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(outputs; what the A made of the inputs, (T, R), for `backward`)."""
        if self.down is None or self.up is None:
            return product(inputs, self.weight.t()), None
        inner = product(inputs, self.down.t())
        if self.linears.dtype == torch.float32:
            outputs = product(inputs, self.weight.t())
            for part, inner_part, up in zip(self._by_layer(outputs), self._by_rank(inner), self.up, strict=True):
                part.addmm_(inner_part, up.t())
            return outputs, inner
        # One product, so that it is rounded once: a young adapter's change is less than half of the last place of a bfloat16
        # sum, and added to a rounded one it is lost each time. Together they are right on average.
        return torch.cat([inputs, inner], 1) @ torch.cat([self.weight, torch.block_diag(*self.up)], 1).t(), inner

    def backward(
        self, inputs: torch.Tensor, inner: torch.Tensor | None, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(gradient of the inputs; gradients of `Linears.parameters`). `inner` None is made again."""
        inner_gradient = None if self.up is None else self._inner_gradient(gradient, self.up)
        made = product(gradient, self.weight)
        if inner_gradient is not None and self.down is not None:
            made.addmm_(inner_gradient, self.down)
        return made, self.of_parameters(inputs, inner, gradient, inner_gradient)

    def of_parameters(
        self,
        inputs: torch.Tensor,
        inner: torch.Tensor | None,
        gradient: torch.Tensor,
        inner_gradient: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Gradients of `Linears.parameters` alone; what is None is made again."""
        if self.down is None or self.up is None:
            return list(product(gradient.t(), inputs).split(self.linears.widths))
        inner = product(inputs, self.down.t()) if inner is None else inner
        inner_gradient = self._inner_gradient(gradient, self.up) if inner_gradient is None else inner_gradient
        of_down = product(inner_gradient.t(), inputs).split(self.linears.ranks)
        of_up = [
            # twice as fast as the other way round
            product(inner_part.t(), part).t().float().mul_(self.linears.scale).contiguous()
            for part, inner_part in zip(self._by_layer(gradient), self._by_rank(inner), strict=True)
        ]
        return [part.float() for part in of_down] + of_up

    def _inner_gradient(self, gradient: torch.Tensor, up: list[torch.Tensor]) -> torch.Tensor:
        parts = zip(self._by_layer(gradient), up, strict=True)
        return torch.cat([product(part, up_of_part) for part, up_of_part in parts], 1)

    def _by_layer(self, outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return outputs.split(self.linears.widths, 1)

    def _by_rank(self, inner: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return inner.split(self.linears.ranks, 1)
