"""Self-attention of ViTDet's plain ViT: decomposed relative positions, and padded tokens as keys.

Li et al. 2022 ("Exploring Plain Vision Transformer Backbones for Object Detection"), with the relative
positions of MViTv2 (Li et al., CVPR 2022, section 4.1). Reference: detectron2's `modeling/backbone/vit.py`.

B windows or images · N tokens of a window or image, row by row · C channels
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from giantdet.errors import InputError


class RelativeAttention(nn.Module):
    """Self-attention `[B, N, C]` to `[B, N, C]` on a grid of tokens, with the weights of timm's `Attention`.

    The logit of a query q and a key is scale * q.k + q.rows[dy] + q.columns[dx], where dy and dx are the
    distances of the two tokens on the grid. The tables `rel_pos_h` and `rel_pos_w` are `[2 * side - 1, head
    dimension]`, shared by the heads, and zero at the start.
    """

    row_index: Tensor
    column_index: Tensor
    row_and_column: Tensor

    def __init__(self, attn: nn.Module, grid: tuple[int, int]) -> None:
        """Take over the layers of `attn`. Raises InputError for another attention than ViT's and DeiT's."""
        super().__init__()
        if not isinstance(attn, Attention) or attn.gate is not None or not isinstance(attn.norm, nn.Identity):
            raise InputError(
                f"relative_positions is for the attention of ViT and DeiT, not for {type(attn).__name__}"
            )
        self.grid, self.num_heads, self.scale = grid, attn.num_heads, attn.scale
        self.qkv, self.q_norm, self.k_norm = attn.qkv, attn.q_norm, attn.k_norm
        self.attn_drop, self.proj, self.proj_drop = attn.attn_drop, attn.proj, attn.proj_drop
        height, width = grid
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * height - 1, attn.head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * width - 1, attn.head_dim))
        self.register_buffer("row_index", _distances(height), persistent=False)
        self.register_buffer("column_index", _distances(width), persistent=False)
        self.register_buffer("row_and_column", _row_and_column(height, width), persistent=False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        assert not is_causal  # an argument of timm's blocks, never set here
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        size = v.shape[-1]
        q, k = self._with_positions(q, k)
        v = F.pad(v, (0, q.shape[-1] - size))  # fused kernels want the same size of all three
        dropout = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p=dropout, scale=1.0)[..., :size]
        projected: Tensor = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return projected

    def _with_positions(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys `[B, heads, N, D + rows + columns]` whose products are the logits.

        A key ends with its row and its column as one-hot vectors. A query begins with q times the scale and
        ends with its terms for every row and every column. So a fused kernel computes the attention, and no
        matrix `[N, N]` of terms is stored, which a mask would need.
        """
        height, width = self.grid
        rows = F.embedding(self.row_index, self.rel_pos_h)  # [query's row, key's row, D]
        columns = F.embedding(self.column_index, self.rel_pos_w)
        grid = q.unflatten(2, (height, width))
        of_rows = torch.einsum("bnyxd,ykd->bnyxk", grid, rows)
        of_columns = torch.einsum("bnyxd,xkd->bnyxk", grid, columns)
        terms = torch.cat([of_rows, of_columns], -1).flatten(2, 3)
        place = self.row_and_column.to(k.dtype).expand(*k.shape[:2], -1, -1)
        return torch.cat([q * self.scale, terms], -1), torch.cat([k, place], -1)


def zero_padding(attn: nn.Module, inside: Tensor) -> None:
    """Set padded tokens to zero at the entry of any attention, from now on.

    `inside`, bool `[windows, N]`, is False at padded tokens; B of the input `[B, N, C]` is a multiple of
    `windows`. Padding is zero after the norm, as in ViTDet, so that keys and values of padded tokens are the
    biases.
    """
    attn.register_buffer("inside", inside, persistent=False)
    attn.register_forward_pre_hook(_zero_padding)


def _zero_padding(attn: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *others = inputs
    padded = ~attn.get_buffer("inside")[..., None]
    return x.unflatten(0, (-1, len(padded))).masked_fill(padded, 0.0).flatten(0, 1), *others


def _distances(side: int) -> Tensor:
    """Return the row of a table, int64 `[side, side]`, of each distance from query to key."""
    place = torch.arange(side)
    return place[:, None] - place[None, :] + side - 1


def _row_and_column(height: int, width: int) -> Tensor:
    """Return one-hot rows and columns of the tokens, `[height * width, height + width]`."""
    rows, columns = torch.eye(height), torch.eye(width)
    return torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], 1)
