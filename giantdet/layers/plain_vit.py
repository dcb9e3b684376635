"""Plain ViTs (ViT, DeiT, DINOv2/v3, SigLIP, EVA, EVA-02) as detection backbones, after ViTDet.

Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection": attention within
windows, a few evenly spaced blocks with global attention, one map of stride 16. The blocks are timm's own;
this file calls them with another layout of tokens. Three defaults deviate from ViTDet's code, each with an
option for ViTDet's way: no relative positions, which timm's checkpoints do not have (`relative_positions`);
padded tokens are masked as keys (`attend_padding`); absolute positions are interpolated when weights are
loaded and not in every forward pass (`position_grid`).

The blocks see patch tokens only: class and register tokens are dropped. With `window` 0 they are kept, all
blocks are global, and the result equals timm's own forward pass.

B images · H, W size of the map in patches · w side of a window · N tokens of a window · C channels
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from timm.layers.pos_embed_sincos import get_mixed_freqs, get_mixed_grid
from torch import Tensor

from giantdet.config.architectures.common import BackboneConfig
from giantdet.errors import InputError
from giantdet.layers.blocks import StochasticDepth
from giantdet.layers.body import (
    Backbone,
    cast_to_float32,
    create_body,
    freeze,
    image_statistics,
    require_multiple,
)
from giantdet.layers.cgbn import Float32Buffers
from giantdet.layers.relative_attention import RelativeAttention, zero_padding

_PREFIX_TOKENS = ("cls_token", "reg_token", "dist_token")


class PlainViT(Float32Buffers, Backbone):
    """A backbone that returns one `[B, C, H, W]` map: the last block's output, after the final norm if any.

    It is fastest where the canvas is a multiple of patch * window pixels: otherwise the blocks also compute
    padded tokens.
    """

    key_mask: Tensor | None
    rope_global: Tensor | None
    rope_window: Tensor | None

    def __init__(self, config: BackboneConfig, image_size: tuple[int, int]) -> None:
        super().__init__()
        require_multiple(config, image_size, config.patch_size)
        own = dict(num_classes=0, img_size=image_size, patch_size=config.patch_size, dynamic_img_size=True)
        if config.position_grid is not None:
            own["img_size"] = tuple(side * config.patch_size for side in config.position_grid)
        self.timm_args = config.timm_args | own
        body = create_body(config, self.timm_args)
        keys = set(body.state_dict())
        depth = len(body.blocks)
        body.prune_intermediate_layers([depth - 1], prune_norm=False, prune_head=True)
        self.body = body
        self.mean, self.std = image_statistics(body)
        self.channels, self.strides, self.is_plain = (body.embed_dim,), (config.patch_size,), True
        self.window = config.window
        self.global_blocks = global_block_indices(depth, config.global_blocks if config.window else depth)
        if not self.global_blocks <= set(range(depth)):
            wrong = sorted(self.global_blocks - set(range(depth)))
            raise InputError(
                f"backbone.global_blocks names {wrong}; '{config.name}' has blocks 0 to {depth - 1}"
            )
        height, width = (side // config.patch_size for side in image_size)
        self.grid = self._built_grid = (height, width)
        self._rope: tuple[Any, ...] = ()
        self.num_prefix_tokens = body.num_prefix_tokens
        if self.window:
            self._drop_prefix_tokens()
        self.dropped_keys = frozenset(keys - set(body.state_dict()))
        self._store_rope()
        self.position_grid = self._trained_positions = self._position_grid(config)
        self.position_fit = config.position_fit
        self.register_buffer("key_mask", self._key_mask(), persistent=False)
        self._made_mask: Tensor | None = None
        if config.relative_positions:
            self._add_relative_positions()
        if config.attend_padding and self.key_mask is not None:
            self._attend_padding(self.key_mask[:, 0, 0])
        if config.relative_positions or config.attend_padding:
            self.one_size = "a plain ViT with relative_positions or attend_padding"
        self._tell_windows()
        if config.frozen_stages:
            # Stages of a plain ViT: the embedding, then quarters of the blocks.
            frozen_blocks = {f"blocks.{i}" for i in range((config.frozen_stages - 1) * depth // 4)}
            freeze(body, lambda name: _block_of(name) in frozen_blocks or _is_embedding(name))

    def set_canvas(self, image_size: tuple[int, int]) -> None:
        """See `Backbone.set_canvas`. Absolute positions are interpolated from the canvas of training."""
        device = next(self.parameters()).device
        height, width = image_size[0] // self.strides[0], image_size[1] // self.strides[0]
        self.grid = (height, width)
        if self.window and self.body.pos_embed is not None and self._trained_positions is None:
            self.position_grid = None if self.grid == self._built_grid else self._built_grid
        self._store_rope()
        self.register_buffer("key_mask", self._key_mask(), persistent=False)
        self._made_mask = None
        self.to(device)

    def _drop_prefix_tokens(self) -> None:
        for name in _PREFIX_TOKENS:
            if getattr(self.body, name, None) is not None:
                setattr(self.body, name, None)
        for block in self.body.blocks:
            for module in block.modules():
                if hasattr(module, "num_prefix_tokens"):
                    module.num_prefix_tokens = 0  # RoPE rotates all tokens except these
        # The body's own count is kept: timm's checkpoint filter needs it to read position embeddings.

    def _tell_windows(self) -> None:
        """Set the number of windows per image: stochastic depth drops images, as in ViTDet, not windows."""
        for index, block in enumerate(self.body.blocks):
            for module in block.modules():
                if isinstance(module, StochasticDepth) and index not in self.global_blocks:
                    module.windows = math.prod(-(-side // self.window) for side in self.grid)

    def _position_grid(self, config: BackboneConfig) -> tuple[int, int] | None:
        """Return the grid of the absolute positions where they are interpolated in every forward pass."""
        if config.position_grid is not None and self.body.pos_embed is None:
            raise InputError(f"backbone '{config.name}' has no absolute positions: leave out position_grid")
        return config.position_grid

    def _add_relative_positions(self) -> None:
        """Give each block the attention of ViTDet's code."""
        for index, block in enumerate(self.body.blocks):
            grid = self.grid if index in self.global_blocks else (self.window, self.window)
            block.attn = RelativeAttention(block.attn, grid)
        tables = ("rel_pos_h", "rel_pos_w")
        self.added_keys = frozenset(key for key in self.body.state_dict() if key.endswith(tables))

    def _attend_padding(self, inside: Tensor) -> None:
        """Let padded tokens enter the attention of windowed blocks as zeros, and leave out their mask."""
        self.key_mask = None
        for index, block in enumerate(self.body.blocks):
            if index not in self.global_blocks:
                zero_padding(block.attn, inside)

    def _store_rope(self) -> None:
        """Store the part of the rotary embeddings that depends only on the grid.

        These are the whole tables, or, for learnt frequencies (`rope_mixed`), the positions that the
        frequencies are multiplied with. The frequencies themselves stay in the body.
        """
        rope = getattr(self.body, "rope", None)
        rope = self._rope[0] if self._rope else rope
        self.learnt_rope = rope is not None and getattr(self.body, "rope_mixed", False)
        window = (self.window, self.window) if self.window else self.grid
        tables: list[Tensor | None] = [None, None]
        if rope is not None and self.learnt_rope:
            grids = (get_mixed_grid(shape, grid_indexing=rope.grid_indexing) for shape in (self.grid, window))
            tables = [torch.stack(positions).float() for positions in grids]
        elif rope is not None:
            rope.eval()  # in training mode DINOv3's augments its coordinates
            tables = [cast_to_float32(rope.get_embed(shape=shape)) for shape in (self.grid, window)]
            self.body.rope = None
            self._rope = (rope,)  # not a submodule: its tables are stored here, in float32
        self.register_buffer("rope_global", tables[0], persistent=False)
        self.register_buffer("rope_window", tables[1], persistent=False)

    def _key_mask(self) -> Tensor | None:
        """Return bool `[windows, 1, 1, N]`, False at padded keys; None where the window divides the map."""
        if not self.window or not (self.grid[0] % self.window or self.grid[1] % self.window):
            return None
        ones = torch.ones(1, *self.grid, 1)
        return to_windows(ones, self.window)[:, None, None, :, 0] > 0

    def maps(self, images_B3HW: Tensor) -> list[Tensor]:
        """See `Backbone.maps`."""
        body = self.body
        x = body.patch_embed(images_B3HW)  # [B, H, W, C]
        batch, height, width, _ = x.shape
        x = body.norm_pre(self._add_positions(x))
        (rope_global, rope_window), mask = self._rotations(), self._attention_mask(x)
        windowed = False
        for index, block in enumerate(body.blocks):
            is_global = index in self.global_blocks
            if is_global == windowed:  # consecutive windowed blocks share one partition into windows
                if is_global:
                    x = from_windows(x, self.window, batch, height, width).flatten(1, 2)
                else:
                    x = to_windows(rearrange(x, "b (h w) c -> b h w c", h=height), self.window)
                windowed = not is_global
            extra: dict[str, Any] = {}
            if (rope := rope_window if windowed else rope_global) is not None:
                extra["rope"] = rope[index] if self.learnt_rope else rope
            if windowed and mask is not None:
                extra["attn_mask"] = mask
            x = block(x, **extra)
        if windowed:
            x = from_windows(x, self.window, batch, height, width).flatten(1, 2)
        x = body.norm(x)
        if not self.window:
            x = x[:, self.num_prefix_tokens :]
        return [rearrange(x, "b (h w) c -> b c h w", h=height).contiguous()]

    def _add_positions(self, x_BHWC: Tensor) -> Tensor:
        """Return the tokens `[B, (prefix +) H * W, C]`, with absolute positions where the model has them."""
        body = self.body
        if not self.window:
            made = body._pos_embed(x_BHWC)
            placed: Tensor = made[0] if isinstance(made, tuple) else made
            return placed
        tokens = x_BHWC.flatten(1, 2)
        if body.pos_embed is not None:
            first = 0 if body.no_embed_class else self.num_prefix_tokens
            tokens = tokens + self._on_canvas(body.pos_embed[:, first:])
        dropped: Tensor = body.pos_drop(tokens)
        return dropped

    def _on_canvas(self, positions_1NC: Tensor) -> Tensor:
        """Return absolute positions for each patch of the canvas, `[1, H * W, C]`."""
        if self.position_grid is None:
            return positions_1NC
        grid_hwc = rearrange(positions_1NC.float(), "1 (h w) c -> h w c", h=self.position_grid[0])
        if self.position_fit == "tile":
            tiles = [-(-new // old) for old, new in zip(self.position_grid, self.grid, strict=True)]
            tiled = repeat(grid_hwc, "h w c -> (a h) (b w) c", a=tiles[0], b=tiles[1])
            fitted = tiled[: self.grid[0], : self.grid[1]]
        else:
            # Two small matrices, because PyTorch's kernel runs over all channels in sequence, and its
            # backward pass by atomic additions: together 8 ms of a ViT-L's micro-step on an H200.
            rows_hH, columns_wW = (
                bicubic(a, b, grid_hwc.device) for a, b in zip(self.position_grid, self.grid, strict=True)
            )
            fitted = einsum(grid_hwc, rows_hH, columns_wW, "h w c, h H, w W -> H W c")
        return fitted.to(positions_1NC.dtype).flatten(0, 1)[None]

    def _rotations(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the rotary embeddings of global and of windowed blocks.

        Each is `[N, D]`, or `[depth, heads, N, D]` where they are learnt; None in a model without any.
        """
        if not self.learnt_rope:
            return self.rope_global, self.rope_window
        assert self.rope_global is not None and self.rope_window is not None
        learnt = self.body.rope.freqs
        return get_mixed_freqs(learnt, *self.rope_global), get_mixed_freqs(learnt, *self.rope_window)

    def _attention_mask(self, x: Tensor) -> Tensor | None:
        """Return the additive mask `[B * windows, 1, 1, N]` of 0 and -inf for a batch like `x`, cached."""
        if self.key_mask is None:
            return None
        made = self._made_mask
        shape = (len(x) * len(self.key_mask), *self.key_mask.shape[1:])
        if made is None or made.shape != shape or made.dtype != x.dtype or made.device != x.device:
            made = torch.zeros_like(self.key_mask, dtype=x.dtype).masked_fill(~self.key_mask, float("-inf"))
            made = self._made_mask = made.repeat(len(x), 1, 1, 1)
        return made


def global_block_indices(depth: int, chosen: int | tuple[int, ...]) -> frozenset[int]:
    """Return the chosen indices, or those of so many evenly spaced blocks: 5, 11, 17, 23 for 4 of 24."""
    if isinstance(chosen, tuple):
        return frozenset(chosen)
    count = min(chosen, depth)
    return frozenset((i + 1) * depth // count - 1 for i in range(count))


def to_windows(x_BHWC: Tensor, window: int) -> Tensor:
    """Return windows `[B * windows, window * window, C]`, image by image and row by row.

    The map is padded with zeros at the right and at the bottom.
    """
    height, width = x_BHWC.shape[1:3]
    x = F.pad(x_BHWC, (0, 0, 0, -width % window, 0, -height % window))
    return rearrange(x, "b (rows y) (columns x) c -> (b rows columns) (y x) c", y=window, x=window)


def from_windows(x_WNC: Tensor, window: int, batch: int, height: int, width: int) -> Tensor:
    """Return the map `[B, H, W, C]` of windows; the inverse of `to_windows`, without its padding."""
    rows, columns = -(-height // window), -(-width // window)
    x = rearrange(
        x_WNC,
        "(b rows columns) (y x) c -> b (rows y) (columns x) c",
        b=batch,
        rows=rows,
        columns=columns,
        y=window,
    )
    return x[:, :height, :width]


def _block_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _is_embedding(name: str) -> bool:
    return name.split(".")[0] in ("patch_embed", "pos_embed", "norm_pre", "rope", *_PREFIX_TOKENS)


def bicubic(cells: int, new: int, device: torch.device) -> Tensor:
    """Return the matrix `[cells, new]`, float32, that resamples one axis bicubically (half-pixel centres)."""
    unit_vectors = torch.eye(cells, device=device)[None, :, :, None]
    resampled = F.interpolate(unit_vectors, (new, 1), mode="bicubic", align_corners=False)
    return resampled[0, :, :, 0]
