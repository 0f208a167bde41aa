"""Blocks of transformers on feature maps of any size, each a few lines that every runtime takes.

Maps are channels last here, (B, I, J, K, C), and each voxel of a map is a token.
Sources: Vaswani et al., "Attention is all you need", NeurIPS 2017; Xie et al., "SegFormer", NeurIPS 2021 (fewer keys,
and a convolution within the MLP).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from medseg.networks.kinds import Triple
from medseg.networks.layers import ONE, ZeroLinear


class ChannelNorm(nn.LayerNorm):
    """Layer normalization of each voxel of features (B, C, I, J, K)."""

    def forward(self, image: Tensor) -> Tensor:
        """Return features of the same shape."""
        return _channels_first(super().forward(_channels_last(image)))


class Attention(nn.Module):
    """Self-attention of all voxels of a map, with keys and values of blocks of `reduction` voxels.

    Query, key and value are layers of their own: each is one matrix, as Muon wants it.
    """

    def __init__(self, width: int, heads: int, reduction: Triple = ONE):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project = ZeroLinear(width, width)
        strided = (nn.Conv3d(width, width, reduction, reduction), ChannelNorm(width))
        self.reduce = nn.Sequential(*strided) if reduction != ONE else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return for each voxel of a map a mean of the values, weighed by how well their keys fit its query."""
        kept = _channels_last(self.reduce(_channels_first(tokens)))
        query, key, value = self._split(self.query(tokens)), self._split(self.key(kept)), self._split(self.value(kept))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.project(mixed.transpose(1, 2).reshape(tokens.shape))  # type: ignore[no-any-return]

    def _split(self, tokens: Tensor) -> Tensor:
        """Return tokens (B, I, J, K, C) as (B, heads, I J K, C / heads)."""
        batch, width = tokens.shape[0], tokens.shape[-1]
        return tokens.reshape(batch, -1, self.heads, width // self.heads).transpose(1, 2)


class MixFFN(nn.Module):
    """An MLP with a depth-wise convolution in the middle, which tells voxels where they are.

    It sees the neighbors, and zeros behind the edge of the map. So there is no table of positions, which would hold for
    one size of patches alone, and would have to be stretched for another.
    """

    def __init__(self, width: int, hidden: int, kernel: Triple):
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.conv = nn.Conv3d(hidden, hidden, kernel, padding=_same(kernel), groups=hidden)
        self.contract = ZeroLinear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the same width."""
        hidden = _channels_last(self.conv(_channels_first(self.expand(tokens))))
        return self.contract(functional.gelu(hidden))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Attention and an MLP, each behind a layer normalization and beside a skip; a new block is its skips alone."""

    def __init__(self, width: int, heads: int, hidden: int, kernel: Triple, reduction: Triple = ONE):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, reduction)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MixFFN(width, hidden, kernel)

    def forward(self, image: Tensor) -> Tensor:
        """Return features (B, C, I, J, K) of the same shape."""
        tokens = _channels_last(image)
        tokens = tokens + self.attention(self.norm1(tokens))
        return _channels_first(tokens + self.mlp(self.norm2(tokens)))


def _channels_last(image: Tensor) -> Tensor:
    return image.movedim(1, -1)


def _channels_first(tokens: Tensor) -> Tensor:
    return tokens.movedim(-1, 1)


def _same(kernel: Triple) -> Triple:
    """Return the zeros on either side with which a convolution of odd kernel keeps the size."""
    return kernel[0] // 2, kernel[1] // 2, kernel[2] // 2
