"""What the rows of a piece are multiplied by.

E local slots, D model width, U and F widths of an expert's first projection and of its activation.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_moe.moe.overlap.payload import hidden_of
from lightning_moe.moe.overlap.plan import Piece
from lightning_moe.parallel.sm_margin import SmMargin
from lightning_moe.weight_grad.grouped import can_group, grouped_product


class ExpertMatrices:
    """The experts' weights in the dtype of the computation, and their products with the rows of a piece.

    Args:
        up: ``[E, U, D]``.
        down: ``[E, D, F]``.
        dtype: Dtype of the computation.
        offsets: For pieces of several slots the end of each slot's rows, int32 on the device.
        grouped_gemm: Whether to use the grouped GEMM where it is available.
        sm_margin: Multiprocessors that products leave to messages.
    """

    def __init__(
        self,
        up: Tensor,
        down: Tensor,
        dtype: torch.dtype,
        offsets: Mapping[Piece, Tensor],
        grouped_gemm: bool,
        sm_margin: int = 0,
    ) -> None:
        self._up, self._down = up.detach().to(dtype), down.detach().to(dtype)
        self._offsets, self._grouped_gemm = offsets, grouped_gemm
        self._margin = SmMargin(sm_margin, up.device)

    def project(self, piece: Piece, rows: Tensor) -> Tensor:
        """The first projection ``[rows, U]`` of payload rows."""
        return self._product(piece, hidden_of(rows), self._up.transpose(1, 2))

    def project_down(self, piece: Piece, inner: Tensor) -> Tensor:
        """The second projection ``[rows, D]``."""
        return self._product(piece, inner, self._down.transpose(1, 2))

    def grad_inner(self, piece: Piece, grad: Tensor) -> Tensor:
        """The gradient of the second projection's input, ``[rows, F]``."""
        return self._product(piece, grad, self._down)

    def grad_hidden(self, piece: Piece, grad: Tensor) -> Tensor:
        """The gradient of the first projection's input, ``[rows, D]``."""
        return self._product(piece, grad, self._up)

    def _product(self, piece: Piece, left: Tensor, matrices: Tensor) -> Tensor:
        with self._margin:
            if len(piece.counts) == 1:
                return left @ matrices[piece.first_slot]
            matrices = matrices[piece.slots]
            stacked = matrices if matrices.is_contiguous() else matrices.transpose(1, 2)
            grouped = self._grouped_gemm and can_group(left, stacked)
            return grouped_product(left, matrices, piece.counts, self._offsets[piece], grouped)
