"""The networks: ViT and ResNet encoders, what recovers an image from them, and where the mask token enters.

An image is recovered in one of two ways. *Beyond Masking* (BM) follows MAE: the encoder drops hidden patches, and a
decoder is given mask tokens in their places. *Architecture-Agnostic Masked Image Modeling* (A2) keeps them, filled: a
mask token enters the feature map after some layer or stage, and one linear layer predicts the pixels.

Parameters carry the names the field uses, so weights travel with no converter: the ViT has timm's
(`vit_*_patch16_224`), its decoder the official MAE repository's, the ResNet torchvision's. No loss is computed here.

    python models.py                                    parameters, FLOPs and the shape trail of each model
    python models.py --export RUN/checkpoint.pt OUT.pth the encoder alone, under timm's or torchvision's names

B batch, C channels, H x W pixels, p patch size, N = (H/p)(W/p) patches, D width, L depth.
hidden (B, N) bool: True = the encoder does not see this patch.
"""
import argparse
import math
import os
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# (width, depth, heads), the decoder's (depth, width, heads; BM A.1: 4 blocks of width 384), the layer after which the mask
# token enters "in the middle" (A2 5.1: small and base; the others are ours, in proportion)
VITS = {
    "vit_micro": ((128,  6,  4), (2,  64, 2), 3),     # for a CPU: small images, small patches
    "vit_tiny":  ((192, 12,  3), (4, 384, 6), 5),
    "vit_small": ((384, 12,  6), (4, 384, 6), 5),
    "vit_base":  ((768, 12, 12), (4, 384, 6), 8),     # BM section 4.1
    "vit_large": ((1024, 24, 16), (4, 384, 6), 16),
}
# kind of block, how many in each of the four stages
RESNETS = {
    "resnet18":  ("basic", (2, 2, 2, 2)),
    "resnet34":  ("basic", (3, 4, 6, 3)),
    "resnet50":  ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
RESNET_STAGE = 3                                      # the token's, "middle" (A2 5.1)
MODELS = [*VITS, *RESNETS]
TOKEN_HOWS = ("add", "replace", "scaled")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pair(size):
    """An int or (height, width) as (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


# ---------------------------------------------------------------------------------------------------
# ViT
# ---------------------------------------------------------------------------------------------------

def sincos_positions(dim, grid):
    """Fixed 2-D sine-cosine position embedding, as MAE lays it out: (1, 1 + N, dim), zero for the cls token.

    The first half of the channels encodes the column, the second the row.
    """
    def along(positions):                                                              # (N,) -> (N, dim / 2)
        omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        angle = positions[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    table = torch.cat([along(columns.flatten()), along(rows.flatten())], dim=1)        # (N, dim)
    return torch.cat([torch.zeros(1, dim), table.float()]).unsqueeze(0)                # (1, 1 + N, dim)


def fused_attention(device):
    """Whether torch's fused attention is the faster kernel: on a GPU. On a CPU the product written out is, 3 to 8
    times, from 17 to 197 tokens and batches of 8 to 256 (python tests/bench.py attention).
    """
    return device.type != "cpu"


def attend(q, k, v, bias=None):
    """softmax(q k^T / sqrt(d) + bias) v for (B, heads, N, d), by the kernel that is fastest on the device."""
    if fused_attention(q.device):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype).contiguous())
    scores = q * q.shape[3] ** -0.5 @ k.transpose(2, 3)
    return (scores if bias is None else scores + bias.to(q.dtype)).softmax(dim=3) @ v


def relative_index(grid):
    """Which row of a relative position table belongs to each pair of tokens, BEiT's layout: (1 + N, 1 + N) int64.

    (2 gh - 1)(2 gw - 1) rows for the offsets of two patches, then cls to patch, patch to cls, cls to cls.
    """
    gh, gw = grid
    row, column = (x.flatten() for x in torch.meshgrid(torch.arange(gh), torch.arange(gw), indexing="ij"))
    dy, dx = (x[:, None] - x[None, :] for x in (row, column))                          # (N, N)
    offsets = (2 * gh - 1) * (2 * gw - 1)
    index = torch.empty(1 + gh * gw, 1 + gh * gw, dtype=torch.long)
    index[1:, 1:] = (dy + gh - 1) * (2 * gw - 1) + dx + gw - 1
    index[0, 1:], index[1:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index


class Attention(nn.Module):
    """offsets: rows of a relative position bias table, zero at first (A2 A.2, A.3); 0: none."""

    def __init__(self, dim, heads, offsets=0):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, heads)) if offsets else None

    def forward(self, x, index=None):
        """x (B, N, D), index (B or 1, N, N): each pair's row of the table."""
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        bias = None if index is None else F.embedding(index, self.relative_position_bias_table).permute(0, 3, 1, 2)
        x = attend(q, k, v, bias)                                                      # (B, heads, N, d)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def drop_path(batch, depth, rate, generator, part=None):
    """Stochastic depth: what each residual branch of each image is multiplied by, (batch, depth), 0 or 1 / (1 - r).

    r rises linearly from 0 at the first branch to `rate` at the last (# differs from timm's: there the two branches of a
    ViT's block share one rate); the mean of a factor is 1. part = (first, whole) draws for the whole batch, of which these
    are the rows from `first` on. (torchvision's stochastic_depth draws from the global generator, so a run would depend on
    how a batch is split.)
    """
    first, whole = part or (0, batch)
    kept = 1 - torch.linspace(0, rate, depth)
    return (torch.rand(whole, depth, generator=generator)[first:first + batch] < kept) / kept


def branch(kept, i, y):
    """The output y of residual branch i, dropped or made up for (drop_path)."""
    return y if kept is None else y * kept[:, i].to(y.dtype).view(-1, *[1] * (y.ndim - 1))


class Block(nn.Module):
    """Pre-norm transformer block, (B, N, D) -> (B, N, D). kept: (B, 2) from drop_path, or None."""

    def __init__(self, dim, heads, offsets=0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, offsets)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def forward(self, x, index=None, kept=None):
        x = x + branch(kept, 0, self.attn(self.norm1(x), index))
        return x + branch(kept, 1, self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Holds the projection of a patch, under timm's name; ViT.encode applies it to the patches it keeps."""

    def __init__(self, patch_size, channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size)


class Normalized(nn.Module):
    """Images come in as RGB (or N channels) in [0, 1]; the model normalises them itself. The two constants are no weights."""

    def __init__(self, img_size, patch_size, channels, stride=1):
        """img_size: int or (H, W), divisible by patch_size and by stride, else ValueError."""
        super().__init__()
        self.img_size, self.patch_size, self.channels = pair(img_size), patch_size, channels
        for step, what in ((patch_size, "the patch size"), (stride, "the stride of the last stage")):
            if any(side < step or side % step for side in self.img_size):
                raise ValueError(f"image size {self.img_size[0]}x{self.img_size[1]} is not divisible by {what} {step}: "
                                 f"choose multiples of {step}")
        self.grid = tuple(side // patch_size for side in self.img_size)
        rgb = channels == 3
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN if rgb else [0.45] * channels).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD if rgb else [0.225] * channels).view(-1, 1, 1), persistent=False)

    def normalize(self, images):
        """[0, 1] -> zero mean and unit deviation per channel over ImageNet."""
        return (images - self.mean) / self.std

    def denormalize(self, images):
        return images * self.std + self.mean


def unchanged(layer, features):
    return features


class ViT(Normalized):
    """A plain vision transformer with timm's parameter names.

    img_size: int or (H, W), divisible by patch_size, else ValueError. num_classes 0: no head. relative_positions: a
    bias on every pair of tokens, learned from zero (A2 A.2), under BEiT's names. pool: what the head is given, the cls
    token (BM 4.2) or the mean of the patch tokens.
    """

    def __init__(self, img_size=224, patch_size=16, dim=768, depth=12, heads=12, channels=3, num_classes=0,
                 relative_positions=False, pool="cls"):
        super().__init__(img_size, patch_size, channels)
        self.dim, self.branches, self.pool = dim, 2 * depth, pool
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, self.grid), requires_grad=False)
        self.patch_embed = PatchEmbed(patch_size, channels, dim)
        index = relative_index(self.grid) if relative_positions else None
        self.register_buffer("relative_index", index, persistent=False)
        self.blocks = nn.ModuleList(Block(dim, heads, 0 if index is None else int(index.max()) + 1) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(self._init)
        nn.init.normal_(self.cls_token, std=0.02)

    @staticmethod
    def _init(m):
        """MAE's: Xavier uniform for every projection (the patch's too, as the matrix it is), biases zero."""
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(m.weight.data.flatten(1))
            nn.init.zeros_(m.bias)

    def encode(self, images, hidden=None, after=unchanged, kept=None):
        """images (B, C, H, W) in [0, 1], hidden (B, N) bool, the same count in every row -> (B, 1 + visible, D).

        Hidden patches are dropped before the projection: nothing of them reaches the encoder.
        after(l, z) -> z stands behind the projection (l = 0, before positions are added) and each block l = 1 .. L: where
        a mask token enters. kept: (B, 2 L) from drop_path, or None.
        """
        B, C, p, (gh, gw) = images.shape[0], self.channels, self.patch_size, self.grid
        x = self.normalize(images).view(B, C, gh, p, gw, p).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(B, gh * gw, C * p * p)                                           # (B, N, C p p)
        position, index = self.pos_embed, self.relative_index                          # (1, 1 + N, D), (1 + N, 1 + N)
        index = None if index is None else index[None]
        if hidden is not None:
            row, patch = (~hidden).nonzero(as_tuple=True)
            x, tokens = x[row, patch].view(B, -1, C * p * p), F.pad(patch.view(B, -1) + 1, (1, 0))
            position = position[0, tokens]                                             # (B, 1 + visible, D)
            index = None if index is None else index[0, tokens[:, :, None], tokens[:, None, :]]
        x = F.linear(x, self.patch_embed.proj.weight.flatten(1), self.patch_embed.proj.bias)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x.to(self.cls_token.dtype)], dim=1)
        x = after(0, x) + position                                                     # (B, 1 + visible, D)
        for l, block in enumerate(self.blocks, 1):
            x = after(l, block(x, index, None if kept is None else kept[:, 2 * l - 2:2 * l]))
        return self.norm(x)                                                            # (B, 1 + visible, D)

    def pooled(self, tokens):
        """The features of an image, (B, 1 + N, D) -> (B, D). (# differs from MAE's mean pooling, which norms the mean; this
        is the mean of normed tokens, and needs no other parameters than the cls token's.)
        """
        return tokens[:, 0] if self.pool == "cls" else tokens[:, 1:].mean(1)

    def forward(self, images, kept=None):
        """Class scores (B, num_classes); features (B, D) when there is no head."""
        return self.head(self.pooled(self.encode(images, kept=kept)))


# ---------------------------------------------------------------------------------------------------
# ResNet
# ---------------------------------------------------------------------------------------------------

class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes, and of its gradient: torch has it under private names only."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes together, on any device: torch's own does that on GPUs only, where
    `to_device` puts it in. One process: torch's batch norm as it is.
    """

    def forward(self, x):
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        n, values = dist.get_world_size(), x.float()
        variance, mean = torch.var_mean(values, (0, 2, 3), correction=0)
        here = (torch.arange(n, device=x.device) == dist.get_rank()).view(n, 1, 1)
        moments = SumOverProcesses.apply(here * torch.stack([mean, variance]))                 # (processes, 2, C)
        mean = moments[:, 0].mean(0)
        variance = (moments[:, 1] + (moments[:, 0] - mean).square()).mean(0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            count = n * x.numel() / x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (values * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


def convolution(channels, out, kernel, stride=1):
    return nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, (B, channels, h, w) -> (B, width, h / stride, w / stride). kept: (B, 1)
    from drop_path, or None.
    """
    expansion = 1

    def __init__(self, channels, width, stride=1):
        super().__init__()
        self.conv1, self.bn1 = convolution(channels, width, 3, stride), BatchNorm(width)
        self.conv2, self.bn2 = convolution(width, width, 3), BatchNorm(width)
        self.downsample = None
        if stride > 1 or channels != width:
            self.downsample = nn.Sequential(convolution(channels, width, 1, stride), BatchNorm(width))

    def forward(self, x, kept=None):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = branch(kept, 0, self.bn2(self.conv2(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride, as torchvision), 1x1 beside a shortcut: (B, 4 width, h / stride, w / stride). kept: as
    BasicBlock's.
    """
    expansion = 4

    def __init__(self, channels, width, stride=1):
        super().__init__()
        self.conv1, self.bn1 = convolution(channels, width, 1), BatchNorm(width)
        self.conv2, self.bn2 = convolution(width, width, 3, stride), BatchNorm(width)
        self.conv3, self.bn3 = convolution(width, 4 * width, 1), BatchNorm(4 * width)
        self.downsample = None
        if stride > 1 or channels != 4 * width:
            self.downsample = nn.Sequential(convolution(channels, 4 * width, 1, stride), BatchNorm(4 * width))

    def forward(self, x, kept=None):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = branch(kept, 0, self.bn3(self.conv3(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet(Normalized):
    """A ResNet with torchvision's parameter names: four stages of strides 4, 8, 16, 32.

    kind "basic" or "bottleneck", depths: blocks of each stage. img_size: int or (H, W), divisible by 32 and by
    patch_size (which only says how large the patches of `hidden` are), else ValueError. num_classes 0: no head.
    """
    stride = 32

    def __init__(self, kind, depths, img_size=224, patch_size=16, channels=3, num_classes=0):
        super().__init__(img_size, patch_size, channels, self.stride)
        block = {"basic": BasicBlock, "bottleneck": Bottleneck}[kind]
        self.conv1, self.bn1 = nn.Conv2d(channels, 64, 7, 2, padding=3, bias=False), BatchNorm(64)
        width = 64
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                blocks.append(block(width, 64 << stage, stride=2 if stage and i == 0 else 1))
                width = (64 << stage) * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.dim, self.branches = width, sum(depths)
        self.widths = [64, *((64 << stage) * block.expansion for stage in range(4))]   # after the stem and each stage
        self.fc = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def encode(self, images, after=unchanged, kept=None):
        """images (B, C, H, W) in [0, 1] -> the last feature map (B, D, H / 32, W / 32).

        after(l, z) -> z stands behind the stem (l = 0) and each stage l = 1 .. 4, as a ViT's behind its blocks.
        kept: (B, blocks) from drop_path, or None.
        """
        device = images.device.type
        if device == "cpu" and images.shape[2] > images.shape[3] == 32 and torch.is_autocast_enabled(device):
            # Up to torch 2.14, AMX convolutions (3x3, stride 2) of a map 2 wide and 3 or more high return memory that
            # nobody wrote: stage 4 of such an image. In float32 they are right.
            with torch.autocast(device, enabled=False):
                return self.encode(images, after, kept)
        z = F.relu(self.bn1(self.conv1(self.normalize(images))), inplace=True)         # (B, 64, H / 2, W / 2)
        z = after(0, F.max_pool2d(z, 3, 2, padding=1))                                 # (B, 64, H / 4, W / 4)
        first = 0
        for l, stage in enumerate((self.layer1, self.layer2, self.layer3, self.layer4), 1):
            for i, block in enumerate(stage, first):
                z = block(z, None if kept is None else kept[:, i:i + 1])
            z, first = after(l, z), first + len(stage)
        return z

    def pooled(self, z):
        """The features of an image: the mean over the last map, (B, D, h, w) -> (B, D), in float32."""
        return z.float().mean((2, 3))

    def forward(self, images, kept=None):
        """Class scores (B, num_classes); features (B, D) when there is no head."""
        return self.fc(self.pooled(self.encode(images, kept=kept)))


# ---------------------------------------------------------------------------------------------------
# BM: an encoder-decoder
# ---------------------------------------------------------------------------------------------------

class EncoderDecoder(ViT):
    """MAE's asymmetric pair (BM section 3.2): the encoder sees visible tokens only; mask tokens are appended
    before the decoder, which predicts every patch. Parameter names are the official MAE repository's.
    """

    def __init__(self, img_size=224, patch_size=16, dim=768, depth=12, heads=12, channels=3,
                 decoder_depth=4, decoder_dim=384, decoder_heads=6, relative_positions=False):
        super().__init__(img_size, patch_size, dim, depth, heads, channels, relative_positions=relative_positions)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_dim, self.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size * patch_size * channels)
        self.apply(self._init)
        nn.init.normal_(self.mask_token, std=0.02)

    def decode(self, tokens, hidden=None):
        """Encoded tokens (B, 1 + visible, D) -> predicted patches (B, N, p p C), hidden and visible alike."""
        x = self.decoder_embed(tokens)                                                 # (B, 1 + visible, d)
        if hidden is not None:
            B, N = hidden.shape
            full = self.mask_token.to(x.dtype).expand(B, N, -1)
            x = torch.cat([x[:, :1], full.masked_scatter(~hidden[:, :, None], x[:, 1:])], dim=1)
        x = x + self.decoder_pos_embed                                                 # (B, 1 + N, d)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]                          # (B, N, p p C)

    def forward(self, images, hidden=None):
        """images (B, C, H, W) in [0, 1], hidden (B, N) bool or None -> predicted patches (B, N, p p C)."""
        return self.decode(self.encode(images, hidden), hidden)


# ---------------------------------------------------------------------------------------------------
# A2: a mask token in the feature maps, a linear head
# ---------------------------------------------------------------------------------------------------

class MaskTokenMixin:
    """A2 section 4 for any backbone: after layer `token_at`, z <- z + T * D(M); then one linear layer to pixels.

    T: the mask token, one vector. D(M) in [0, 1]: the hidden patches at the size of the feature map.
    token_how "add": the paper's. "replace": z <- z (1 - D(M)) + T D(M), SimMIM's.
    # differs from the authors' code: theirs scales the hidden features by a learned factor that starts at 1e-6 before
    # it adds T, nearly a replacement ("scaled"); and has T after the projection of its ImageNet ViTs (token_at 0).
    """

    def add_mask_token(self, token_at, token_how, *shape):
        """token_at: 0 (after the projection or stem), 1 .. L, or None for no token. shape: T's, broadcast to z."""
        self.token_at, self.token_how = token_at, token_how
        self.mask_token = self.mask_token_scale = None
        if token_at is not None:
            self.mask_token = nn.Parameter(0.02 * torch.randn(shape))
        if token_at is not None and token_how == "scaled":
            self.mask_token_scale = nn.Parameter(torch.full(shape, 1e-6))

    def inject(self, z, mask):
        """The token into features z where `mask`, D(M), says."""
        token, kept = self.mask_token.to(z.dtype) * mask, z
        if self.token_how == "replace":
            kept = z * (1 - mask)
        elif self.token_how == "scaled":
            kept = z * (1 - mask) + z * self.mask_token_scale.to(z.dtype) * mask
        return kept + token

    def forward(self, images, hidden=None, token=True):
        """images (B, C, H, W) in [0, 1], their hidden patches (B, N) filled -> predicted patches (B, N, p p C).

        token False: without the mask token, to see what it is for (A2 Fig. A3).
        """
        def after(layer, z):
            here = token and hidden is not None and layer == self.token_at
            return self.inject(z, self.downsample(z, hidden)) if here else z
        return self.predict(self.encode(images, after=after))


class TokenViT(MaskTokenMixin, ViT):
    """SimMIM's and A2's ViT: all patches go through the encoder."""

    def __init__(self, *args, token_at=5, token_how="add", **more):
        super().__init__(*args, **more)
        self.decoder_pred = nn.Linear(self.dim, self.patch_size ** 2 * self.channels)
        self._init(self.decoder_pred)
        self.add_mask_token(token_at, token_how, 1, 1, self.dim)

    def downsample(self, z, hidden):
        return F.pad(hidden, (1, 0))[:, :, None].to(z.dtype)                           # (B, 1 + N, 1), never the cls token

    def predict(self, z):
        return self.decoder_pred(z[:, 1:])                                             # (B, N, p p C)


class TokenResNet(MaskTokenMixin, ResNet):
    """SimMIM's and A2's ResNet: a 1x1 convolution, its channels shuffled into the 32x32 pixels of a position."""

    def __init__(self, *args, token_at=RESNET_STAGE, token_how="add", **more):
        super().__init__(*args, **more)
        self.decoder_pred = nn.Conv2d(self.dim, self.stride ** 2 * self.channels, 1)
        self.add_mask_token(token_at, token_how, self.widths[token_at or 0], 1, 1)

    def downsample(self, z, hidden):
        """D: each position's hidden share, (B, 1, h, w). 0 or 1 where a position is no larger than a mask cell."""
        mask, shrink = hidden.view(-1, 1, *self.grid), []
        for dim, n in ((2, z.shape[2]), (3, z.shape[3])):                              # up to a common multiple, then averaged
            common = math.lcm(n, mask.shape[dim])
            mask, shrink = mask.repeat_interleave(common // mask.shape[dim], dim), shrink + [common // n]
        return F.avg_pool2d(mask.float(), shrink).to(z.dtype)

    def predict(self, z):
        B, C, p = z.shape[0], self.channels, self.patch_size
        picture = F.pixel_shuffle(self.decoder_pred(z), self.stride)                   # (B, C, H, W)
        patches = F.pixel_unshuffle(picture, p).view(B, C, p * p, -1)                  # (B, C, p p, N)
        return patches.permute(0, 3, 2, 1).reshape(B, -1, p * p * C)                   # (B, N, p p C)


# ---------------------------------------------------------------------------------------------------
# By name; weights in and out
# ---------------------------------------------------------------------------------------------------

def token_layer(name, token_at):
    """Where the mask token of a model of MODELS enters: "decoder", None (nowhere), or the layer or stage it follows.

    token_at: "decoder", "none", "input" (layer 0), "middle" (the paper's) or a number. ValueError for another.
    """
    resnet, deepest = name in RESNETS, 4 if name in RESNETS else VITS[name][0][1]
    if token_at == "decoder" and resnet:
        raise ValueError(f"--token_at decoder: a {name} has to see every pixel, so it has no such decoder: choose input, middle, "
                         "none or a stage 1 .. 4")
    words = {"decoder": "decoder", "none": None, "input": 0, "middle": RESNET_STAGE if resnet else VITS[name][2]}
    if token_at in words:
        return words[token_at]
    if str(token_at).isdecimal() and int(token_at) <= deepest:
        return int(token_at)
    raise ValueError(f"--token_at {token_at}: {name} takes {'' if resnet else 'decoder, '}input, middle, none or a "
                     f"{'stage' if resnet else 'layer'} 0 .. {deepest}")


def recovery_model(name, img_size=224, patch_size=16, channels=3, token_at=None, token_how="add", decoder=None,
                   relative_positions=False):
    """A model of MODELS that recovers an image: images (B, C, H, W), hidden (B, N) -> patches (B, N, p p C).

    token_at: as in token_layer; None is "decoder", for a ResNet "middle". At the decoder the model is an EncoderDecoder,
    else a TokenViT or a TokenResNet. decoder: "DEPTHxWIDTHxHEADS" (MAE's is 8x512x16), only where there is one.
    ValueError for what a model cannot have.
    """
    layer = token_layer(name, token_at if token_at is not None else "middle" if name in RESNETS else "decoder")
    if layer != "decoder" and decoder:
        raise ValueError(f"decoder {decoder}: with the token at {token_at} one linear layer predicts the pixels, there is no "
                         "decoder: leave it out")
    if name in RESNETS:
        if relative_positions:
            raise ValueError(f"relative positions are a ViT's: {name} has no attention")
        return TokenResNet(*RESNETS[name], img_size, patch_size, channels, token_at=layer, token_how=token_how)
    dim, depth, heads = VITS[name][0]
    more = dict(channels=channels, relative_positions=relative_positions)
    if layer != "decoder":
        return TokenViT(img_size, patch_size, dim, depth, heads, token_at=layer, token_how=token_how, **more)
    try:
        decoder_depth, decoder_dim, decoder_heads = map(int, decoder.split("x")) if decoder else VITS[name][1]
        if decoder_depth < 0 or min(decoder_heads, decoder_dim) < 1 or decoder_dim % (4 * decoder_heads):
            raise ValueError
    except ValueError:
        raise ValueError(f"decoder '{decoder}' is not DEPTHxWIDTHxHEADS with a width divisible by 4 x heads: try 4x384x6")
    return EncoderDecoder(img_size, patch_size, dim, depth, heads, decoder_depth=decoder_depth, decoder_dim=decoder_dim,
                          decoder_heads=decoder_heads, **more)


def encoder(name, img_size=224, patch_size=16, channels=3, num_classes=0, relative_positions=False, pool="cls"):
    """The ViT or ResNet alone of a model of MODELS."""
    if name in RESNETS:
        return ResNet(*RESNETS[name], img_size, patch_size, channels, num_classes)
    dim, depth, heads = VITS[name][0]
    return ViT(img_size, patch_size, dim, depth, heads, channels, num_classes, relative_positions, pool)


def to_device(model, device):
    """The model on its device, as the device likes it: a ResNet in channels-last memory (on a CPU 1.1 to 1.5 times as
    fast: python tests/bench.py memory), its batch norms torch's synchronised ones where GPUs share a batch.
    """
    if not isinstance(model, ResNet):
        return model.to(device)
    if device.type == "cuda" and dist.is_initialized():         # torch's are CUDA only
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(device, memory_format=torch.channels_last)


def read_weights(path):
    """A file of tensors and plain values, or that of a run's folder, as a dict. ValueError if it is missing, damaged, or
    holds code.
    """
    path = os.path.join(path, "checkpoint.pt") if os.path.isdir(path) else path
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):            # MAE's files keep their options so
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no weights at {path}")
    except Exception as error:                                  # unpickling fails in as many ways as there are files
        why = "it holds pickled objects, which could run code" if "GLOBAL" in str(error) else \
            f"it is damaged or of another kind ({type(error).__name__})"
        raise ValueError(f"{path} was not read: {why}. Give a file written by torch.save with tensors only")
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a dict of weights")
    return state


RECOVERY = ("decoder", "mask_token")                    # names of what only recovers the image: no part of the backbone


class Loaded(NamedTuple):
    """What load_weights did, by parameter name."""
    loaded: list
    missing: list                       # in the model, not loaded
    unexpected: list                    # in the file, not in the model
    resized: list                       # position embeddings brought to this image size

    def __str__(self):
        def few(names):
            return f"{len(names)}" + (f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else "")
        return (f"weights: {len(self.loaded)} loaded, {few(self.resized)} resized, {few(self.missing)} missing, "
                f"{few(self.unexpected)} not used")


def resize_square(rows, size):
    """(n^2, D) of a square grid -> (h w, D) of one of size = (h, w), bicubic."""
    side = round(len(rows) ** 0.5)
    if side * side != len(rows):
        raise ValueError(f"{len(rows)} positions are not of a square image: they cannot be resized")
    grid = rows.float().T.view(1, -1, side, side)
    return F.interpolate(grid, size, mode="bicubic", align_corners=False)[0].flatten(1).T


def resize_positions(table, grid):
    """Position embedding (1, 1 + n^2, D) of a square grid -> (1, 1 + N, D) for grid = (rows, columns)."""
    return torch.cat([table[:, :1].float(), resize_square(table[0, 1:], grid)[None]], dim=1)


def resize_relative(table, grid):
    """Relative position table ((2n - 1)^2 + 3, heads) of a square grid -> that of grid = (rows, columns)."""
    return torch.cat([resize_square(table[:-3], [2 * n - 1 for n in grid]), table[-3:].float()])


def tensors(state):
    """The weights in what a file holds, by name: {name: tensor}."""
    for key in ("model", "state_dict"):
        state = state[key] if isinstance(state.get(key), dict) else state
    return {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in state.items() if isinstance(v, torch.Tensor)}


def load_weights(model, source):
    """Load a path or a state dict (ours, the MAE repository's, timm's or torchvision's names) into `model` -> Loaded.

    Position embeddings and relative position tables of another number of patches are resized, from a square image's;
    of the same number they are taken as they are, so weights of 4x6 patches do not suit 6x4. A head of another shape is
    left out, and so is what recovers the image when the weights recover it in another way. ValueError when a backbone
    parameter has another shape, or when the blocks are not those of the model, none missing and none left over (a relative
    position bias may be missing: it is learned from zero).
    """
    state = tensors(read_weights(source) if isinstance(source, (str, os.PathLike)) else source)
    own, resized = model.state_dict(), []
    other_way = ("decoder_embed.weight" in state) != ("decoder_embed.weight" in own)       # of recovering: none of it fits
    unused = [n for n in state if other_way and n.startswith(RECOVERY)]
    state = {n: v for n, v in state.items() if n not in unused}
    for name in [n for n in state if n in own and state[n].shape != own[n].shape]:
        if name.endswith("pos_embed") and state[name].shape[2] == own[name].shape[2]:
            state[name] = resize_positions(state[name], model.grid)
            resized.append(name)
        elif name.endswith("relative_position_bias_table") and state[name].shape[1] == own[name].shape[1]:
            state[name] = resize_relative(state[name], model.grid)
            resized.append(name)
        elif name.startswith(("head.", "fc.")) or name.startswith(RECOVERY) and "decoder_embed.weight" not in own:
            del state[name]
        else:
            options = "--model, --patch_size and kind of --data (grey or colour)"
            if name.startswith(RECOVERY):
                options = "--decoder (MAE's is 8x512x16)"
            raise ValueError(f"{name} is {tuple(state[name].shape)} in the weights and {tuple(own[name].shape)} in the model: "
                             f"choose the {options} the weights were made with")
    loaded = [n for n in state if n in own]
    if not any(n.startswith(("blocks.", "layer")) for n in loaded):
        raise ValueError(f"none of the backbone is in these weights: they have {', '.join(list(state)[:4]) or 'no tensors'} ..., "
                         f"the model {', '.join(list(own)[:4])} ...")
    blocks = ("blocks.", "layer", *["decoder_blocks."] * ("decoder_embed.weight" in state))
    absent = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]      # files older than torch 0.4.1
    missing = [n for n in absent if n.startswith(blocks) and "relative_position" not in n]
    over = [n for n in state if n not in own and n.startswith(blocks)]
    if missing or over:
        option = "--model and --relative_positions" if any("relative_position" in n for n in over) else \
            "--decoder" if all(n.startswith("decoder") for n in missing + over) else "--model"
        raise ValueError(f"the blocks of these weights are not the model's: {len(missing)} missing ({', '.join(missing[:2])}), "
                         f"{len(over)} left over ({', '.join(over[:2])}): choose the {option} the weights were made with")
    model.load_state_dict(state, strict=False)
    return Loaded(loaded, absent, [n for n in state if n not in own] + unused, resized)


def export(state):
    """The plain backbone of a model's state dict, under timm's (`vit_*_patch16_224`) or torchvision's names: no decoder,
    no mask token, nothing of its memory format.
    """
    return {k: v.contiguous() for k, v in state.items() if not k.startswith(RECOVERY)}


# ---------------------------------------------------------------------------------------------------
# python models.py
# ---------------------------------------------------------------------------------------------------

def flops(model, images, hidden=None):
    """FLOPs of one forward pass (a multiply-add counts two), by torch's counter: matrix products and convolutions.

    A training step takes three times as many: forward, and backward for inputs and for weights.
    """
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images) if hidden is None else model(images, hidden)
    return counter.get_total_flops()


def main(argv=None):
    p = argparse.ArgumentParser(description="Parameters, FLOPs and shapes of each model; or --export.", allow_abbrev=False)
    p.add_argument("--export", nargs=2, metavar=("CHECKPOINT", "OUT"),
                   help="write the encoder alone, under timm's or torchvision's names")
    args = p.parse_args(argv)
    if args.export:
        try:
            torch.save(export(tensors(read_weights(args.export[0]))), f"{args.export[1]}.part")
            os.replace(f"{args.export[1]}.part", args.export[1])                               # whole or not at all
        except (ValueError, OSError, RuntimeError) as error:
            p.exit(2, f"models.py: {str(error).splitlines()[0]}\n")
        return print(f"wrote {args.export[1]}")
    for name in MODELS:
        size, patch = (32, 4) if name == "vit_micro" else (224, 16)
        ways = ("middle",) if name in RESNETS else ("decoder", "middle")
        with torch.device("meta"):                              # shapes only: no time for initialising
            alone, *ways = encoder(name, size, patch), *((at, recovery_model(name, size, patch, token_at=at)) for at in ways)
        count = sum(p.numel() for p in alone.parameters())
        alone, images = alone.to_empty(device="cpu").eval(), torch.zeros(1, 3, size, size)
        print(f"{name}: {size} px, patch {patch}: encoder {count / 1e6:.2f} M parameters, "
              f"{flops(alone, images) / 1e9:.3f} GFLOPs an image")
        for at, model in ways:
            model, trail = model.to_empty(device="cpu").eval(), []
            hidden = torch.arange((size // patch) ** 2)[None] >= (size // patch) ** 2 // 4
            for part in ("blocks.0", "layer1", "layer2", "layer3", "layer4", "norm", "decoder_embed", "decoder_norm",
                         "decoder_pred"):
                if hasattr(model, part.split(".")[0]):
                    of = model.get_submodule(part)[-1] if part.startswith("layer") else model.get_submodule(part)
                    of.register_forward_hook(lambda module, inputs, out, part=part: trail.append(f"{part} {tuple(out.shape)}"))
            masked = flops(model, images, hidden)
            recover = sum(p.numel() for n, p in model.named_parameters() if n.startswith(RECOVERY))
            where = "in the decoder" if at == "decoder" else f"after {'stage' if name in RESNETS else 'layer'} {model.token_at}"
            print(f"    token {where}: {recover / 1e6:.2f} M more parameters; with 75% hidden {masked / 1e9:.3f} GFLOPs\n"
                  f"    images (1, 3, {size}, {size}) -> " + " -> ".join(trail))


if __name__ == "__main__":
    main()
