"""The decoder's input sequence: visible tokens, then mask tokens, each with the position of its own cube.

out[b, :V] = visible[b] + positions[visible_index[b]]
out[b, V:] = mask_token + positions[masked_index[b]]

The order is not undone: positions travel with the tokens, and the masked ones stand last, where the decoder's head
takes them.
"""

import torch
from torch import Tensor

from kernels.launch import check, check_index


def decoder_input_ref(
    visible: Tensor, mask_token: Tensor, positions: Tensor, visible_index: Tensor, masked_index: Tensor
) -> Tensor:
    """What the kernel must equal: two gathers, two sums and a concatenation."""
    rows = positions.to(visible.dtype)
    seen = visible + rows[visible_index.long()]
    hidden = mask_token.to(visible.dtype) + rows[masked_index.long()]
    return torch.cat((seen, hidden), dim=1)


def decoder_input(
    visible: Tensor, mask_token: Tensor, positions: Tensor, visible_index: Tensor, masked_index: Tensor
) -> Tensor:
    """The sequence [B, V + M, E] for the decoder, in the dtype of visible; differentiable in visible and mask_token.

    visible: [B, V, E]. mask_token: [E]. positions: [N, E]. visible_index: integer [B, V]. masked_index: integer [B, M].
    Raises ValueError when shapes or devices do not fit together.
    """
    check(visible.ndim == 3, f"visible must be [B, V, E]; got shape {tuple(visible.shape)}")
    batch, num_visible, width = visible.shape
    check(mask_token.shape == (width,), f"mask_token must be ({width},); got {tuple(mask_token.shape)}")
    check(
        positions.ndim == 2 and positions.shape[1] == width,
        f"positions must be [N, {width}]; got {tuple(positions.shape)}",
    )
    check_index(visible_index, "visible_index", batch, visible)
    check_index(masked_index, "masked_index", batch, visible)
    check(
        visible_index.shape[1] == num_visible,
        f"visible_index must be {(batch, num_visible)}; got {tuple(visible_index.shape)}",
    )
    return decoder_input_ref(visible, mask_token, positions, visible_index, masked_index)
