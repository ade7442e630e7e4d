"""The networks: ViT and ResNet encoders, what recovers an image from them, and where the mask token
enters.

An image is recovered in one of two ways. *Beyond Masking* (BM) follows MAE: the encoder drops
hidden patches, and a decoder is given mask tokens in their places. *Architecture-Agnostic Masked
Image Modeling* (A2) keeps them, filled: a mask token enters the feature map after some layer or
stage, and one linear layer predicts the pixels.

Parameters carry the names the field uses, so weights travel with no converter: the ViT has timm's
(`vit_*_patch16_224`), its decoder the official MAE repository's, the ResNet torchvision's.

    python models.py --export RUN OUT.pth               the encoder alone, under those names

B batch, C channels, H x W pixels, p patch size, N = (H/p)(W/p) patches, D width, L depth.
hidden (B, N) bool: True = the encoder does not see this patch.
"""
import argparse
import functools
import math
import os
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision import ops
from torchvision.models import detection

TOKEN_HOWS = ("add", "replace", "scaled")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# --- What every family of encoders has ---

class Encoder(nn.Module):
    """A family of encoders. Images come in as RGB (or C channels) in [0, 1].

    A family defines encode(images, after, drop) -> features z, where after(l, z) -> z follows
    layer or stage l = 0 .. L; `stages`, lists of blocks; `dim`, the width of the features;
    `branches`, the number of residual branches; if z is a map, `widths`, those at l = 0 .. L, and
    else `pos_embed`, `heads` and `blocks`, each of two branches; a classifier under its `head_name`
    (of tokens it is "head"); the constants below; and __init__(img_size, patch_size, channels=,
    num_classes=, the sizes in its row of MODELS; of tokens also relative_positions=, pool=).
    """
    tokens = False  # features are a map (B, D, h, w); True: tokens (B, 1 + N, D)
    stride = 1  # pixels per position of the last map
    first = "conv1"  # name of the first layer
    head_name = "fc"  # name of the classifier
    strict = False  # True: only images in [0, 1] are taken

    def __init__(self, img_size, patch_size, channels):
        """img_size: int or (H, W)."""
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.patch_size = patch_size
        self.channels = channels
        for n, what in ((patch_size, "patch size"), (self.stride, "stride of the last stage")):
            if any(side < n or side % n for side in self.img_size):
                raise ValueError(f"image size {self.img_size[0]}x{self.img_size[1]} is not "
                                 f"divisible by the {what} {n}: choose multiples of {n}")
        self.grid = tuple(side // patch_size for side in self.img_size)
        mean = torch.tensor(IMAGENET_MEAN if channels == 3 else [0.45] * channels)
        std = torch.tensor(IMAGENET_STD if channels == 3 else [0.225] * channels)
        self.register_buffer("mean", mean.view(-1, 1, 1), persistent=False)
        self.register_buffer("std", std.view(-1, 1, 1), persistent=False)

    def normalize(self, images):
        """[0, 1] -> zero mean and unit deviation per channel over ImageNet."""
        low, high = images.aminmax() if self.strict else (0, 1)
        if low < 0 or high > 1 or not images.is_floating_point():
            raise ValueError(f"images are floats in [0, 1], and these are {images.dtype} in "
                             f"[{low:.3g}, {high:.3g}]")
        return (images - self.mean) / self.std

    def denormalize(self, images):
        return images * self.std + self.mean

    @property
    def watched(self):
        """For analyze.py: modules whose input is a feature map, modules whose output is one."""
        return [], [block for stage in self.stages for block in stage]

    def maps(self, images, drop=None):
        """Four feature maps (B, D, h, w): of a ViT after a third, a half and two thirds of its
        blocks, and its last; of a ResNet after its stages. Images are of any size, of a ViT a
        multiple of its patch.
        """
        found = []

        def after(layer, z):
            found.append(z)
            return z
        last = self.encode(images, after=after, drop=drop)
        if not self.tokens:
            return found[1:]  # without the stem's
        L = len(self.blocks)
        grid = [side // self.patch_size for side in images.shape[2:]]
        return [z[:, 1:].transpose(1, 2).unflatten(2, grid)
                for z in (found[L // 3], found[L // 2], found[2 * L // 3], last)]

    def pooled(self, z):
        """The features of an image: the mean over the last map, (B, D, h, w) -> (B, D), float32."""
        return z.float().mean((2, 3))

    def forward(self, images, drop=None):
        """Class scores (B, num_classes); features (B, D) when there is no head."""
        return getattr(self, self.head_name)(self.pooled(self.encode(images, drop=drop)))


def classifier(dim, num_classes):
    return nn.Linear(dim, num_classes) if num_classes else nn.Identity()


def drop_path(batch, depth, rate, generator, within=None):
    """Stochastic depth: factors of the residual branches, (batch, depth), 0 or 1 / (1 - r).

    r rises linearly from 0 at the first branch to `rate` at the last. The mean of a factor is 1.
    within = (first, total): the batch is rows first .. first + batch of one of `total`.
    # differs from timm's: there the two branches of a ViT's block share one rate.
    """
    first, total = within or (0, batch)
    stay = 1 - torch.linspace(0, rate, depth)
    return (torch.rand(total, depth, generator=generator)[first:first + batch] < stay) / stay


def branch(y, drop, i):
    """The output y of residual branch i times its factors in drop (B, branches), or as it is."""
    return y if drop is None else y * drop[:, i].to(y.dtype).view(-1, *[1] * (y.ndim - 1))


# --- ViT ---

def sincos_positions(dim, grid):
    """MAE's fixed position embedding, (1, 1 + N, dim): sines and cosines of the column in the first
    half of the channels, of the row in the second. The cls token's is zero.
    """
    def along(positions):  # (N,) -> (N, dim / 2)
        omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        angle = positions[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid)).T
    table = torch.cat([along(columns), along(rows)], dim=1)  # (N, dim)
    return torch.cat([torch.zeros(1, dim), table.float()]).unsqueeze(0)


def attend(q, k, v, bias=None):
    """softmax(q k^T / sqrt(d) + bias) v for (B, heads, N, d). On a CPU the product written out is 3
    to 8 times as fast as torch's fused kernel (python tests/bench.py attention), and bfloat16's
    softmax is slow for rows shorter than a SIMD vector.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scores = q * q.shape[3] ** -0.5 @ k.transpose(2, 3)
    scores = scores if bias is None else scores + bias
    return scores.softmax(dim=3, dtype=torch.float32 if k.shape[2] < 32 else None).to(v.dtype) @ v


def relative_index(grid, device=None):
    """Each pair of tokens' row in a relative position table, BEiT's layout: (1 + N, 1 + N) int64.
    First (2 gh - 1)(2 gw - 1) offsets of patches, then cls to patch, patch to cls, cls to cls.
    """
    gh, gw = grid
    places = torch.cartesian_prod(*(torch.arange(n, device=device) for n in grid))  # (N, 2)
    dy, dx = (places[:, None] - places).unbind(2)  # (N, N)
    offsets = (2 * gh - 1) * (2 * gw - 1)
    index = torch.empty(1 + gh * gw, 1 + gh * gw, dtype=torch.long, device=device)
    index[1:, 1:] = (dy + gh - 1) * (2 * gw - 1) + dx + gw - 1
    index[0, 1:] = offsets
    index[1:, 0] = offsets + 1
    index[0, 0] = offsets + 2
    return index


class Attention(nn.Module):
    """offsets: rows of a relative position bias table, zero at first (A2 A.2, A.3); 0: none."""

    def __init__(self, dim, heads, offsets=0):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        table = nn.Parameter(torch.zeros(offsets, heads)) if offsets else None
        self.relative_position_bias_table = table

    def forward(self, x, index=None, grids=None):
        """x (B, N, D), index (B or 1, N, N): each pair's row of the table. grids: the table's and
        the image's grid of patches, where they differ.
        """
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        bias = None
        if index is not None:
            table = self.relative_position_bias_table
            table = table if grids is None else resize_relative(table, *grids)
            bias = F.embedding(index, table)  # in float32: a row's gradient has thousands of terms
            bias = bias.to(q.dtype).permute(0, 3, 1, 2).contiguous()  # (B or 1, heads, N, N)
        x = attend(q, k, v, bias)  # (B, heads, N, d)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block, (B, N, D) -> (B, N, D). drop: (B, 2) from drop_path, or None."""

    def __init__(self, dim, heads, offsets=0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, offsets)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def forward(self, x, index=None, drop=None, grids=None):
        x = x + branch(self.attn(self.norm1(x), index, grids), drop, 0)
        return x + branch(self.mlp(self.norm2(x)), drop, 1)


@torch.compiler.disable  # a CUDA graph takes nothing from the CPU
def moved(x, device):
    """degrade.moved: x on the device. A CUDA GPU is not waited for."""
    cuda = device.type == "cuda" and not x.is_cuda
    return (x.pin_memory() if cuda else x).to(device, non_blocking=cuda)


@torch.compiler.disable
def visible_index(hidden, device):
    """The patches that are not hidden (B, N), as many in every image, as an index on the device:
    rows (B, 1), patches (B, visible). A mask on the CPU is counted there: no GPU is waited for.
    """
    patches = (~hidden).nonzero(as_tuple=True)[1].view(len(hidden), -1)
    rows = torch.arange(len(hidden), device=device)[:, None]
    return rows, moved(patches, device)


def xavier(m):
    """MAE's initialisation: Xavier uniform for every projection (also of a patch), biases zero."""
    if isinstance(m, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(m.weight.data.flatten(1))
        nn.init.zeros_(m.bias)


class ViT(Encoder):
    """A plain vision transformer with timm's parameter names. num_classes 0: no head.

    relative_positions: a bias on every pair of tokens, learned from zero (A2 A.2), under BEiT's
    names. pool: what the head is given, the cls token (BM 4.2) or the mean of the patch tokens.
    """
    tokens = True
    first = "patch_embed.proj"
    head_name = "head"

    def __init__(self, img_size, patch_size, dim, depth, heads, channels=3, num_classes=0,
                 relative_positions=False, pool="cls"):
        super().__init__(img_size, patch_size, channels)
        self.dim = dim
        self.heads = heads
        self.branches = 2 * depth
        self.pool = pool
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, self.grid), requires_grad=False)
        projection = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.patch_embed = nn.ModuleDict(dict(proj=projection))  # timm's name
        index = relative_index(self.grid) if relative_positions else None
        offsets = 0 if index is None else int(index.max()) + 1
        self.register_buffer("relative_index", index, persistent=False)
        self.blocks = nn.ModuleList(Block(dim, heads, offsets) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = classifier(dim, num_classes)
        self.apply(xavier)
        nn.init.normal_(self.cls_token, std=0.02)

    @property
    def stages(self):
        return [self.blocks]

    @property
    def watched(self):
        return [block.norm2 for block in self.blocks], self.blocks  # each attention; each MLP

    def encode(self, images, hidden=None, after=lambda l, z: z, drop=None):
        """images (B, C, H, W) in [0, 1] -> (B, 1 + visible, D).

        hidden (B, N) bool, the same count in every image: dropped before the projection, so nothing
        of them reaches the encoder. after(l, z) -> z follows the projection (l = 0, before
        positions are added) and each block. drop: (B, 2 L) from drop_path, or None. Positions are
        resized to images of another size than the model's.
        """
        B, C = images.shape[:2]
        p = self.patch_size
        gh, gw = grid = tuple(side // p for side in images.shape[2:])
        x = self.normalize(images).view(B, C, gh, p, gw, p).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(B, gh * gw, C * p * p)  # (B, N, C p p)
        position = self.pos_embed  # (1, 1 + N, D)
        index = self.relative_index
        grids = None
        if grid != self.grid:
            grids = self.grid, grid
            position = resize_positions(position, *grids)
            index = None if index is None else relative_index(grid, index.device)
        index = None if index is None else index[None]  # (1, 1 + N, 1 + N)
        if hidden is not None:
            row, patch = visible_index(hidden, x.device)
            x = x[row, patch]  # (B, visible, C p p)
            seen = F.pad(patch + 1, (1, 0))  # (B, 1 + visible)
            position = position[0, seen]
            if index is not None:
                index = index[0, seen[:, :, None], seen[:, None, :]]
        x = F.linear(x, self.patch_embed.proj.weight.flatten(1), self.patch_embed.proj.bias)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x.to(self.cls_token.dtype)], dim=1)
        x = after(0, x) + position  # (B, 1 + visible, D)
        for l, block in enumerate(self.blocks, 1):
            factors = None if drop is None else drop[:, 2 * l - 2:2 * l]
            x = after(l, block(x, index, factors, grids))
        return self.norm(x)

    def pooled(self, z):
        """(B, 1 + N, D) -> (B, D). # differs from MAE's mean pooling, which norms the mean: this
        is the mean of normed tokens, and needs no parameters of its own.
        """
        return z[:, 0] if self.pool == "cls" else z[:, 1:].mean(1)


# --- ResNet ---

class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes, and of its gradient."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, on a CPU too. torch's own is for GPUs."""

    def forward(self, x):
        n = dist.get_world_size() if dist.is_initialized() else 1
        if n == 1 or not self.training:
            return super().forward(x)
        z = x.float()
        own = z.new_tensor([x.numel() / x.shape[1]])  # detection's maps differ in size
        total, count = SumOverProcesses.apply(torch.cat([z.sum((0, 2, 3)), own])).split(x.shape[1])
        mean = total / count  # (C,)
        z = z - mean[:, None, None]
        variance = SumOverProcesses.apply(z.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (z * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class Convolution(nn.Conv2d):
    """A convolution, on a CPU one matrix product where the result has fewer than 64 positions. With
    AMX torch's takes 1.2 to 7 times as long there (python tests/bench.py memory). With a 3x3 kernel
    of stride 2, on a map 2 wide and 3 or more high, torch's (up to 2.15) returns uninitialised
    memory.
    """

    def __init__(self, channels, out, kernel, stride=1, bias=False):
        super().__init__(channels, out, kernel, stride, padding=kernel // 2, bias=bias)

    def forward(self, x):
        (k, _), (s, _), (p, _) = self.kernel_size, self.stride, self.padding
        h, w = ((side + 2 * p - k) // s + 1 for side in x.shape[2:])
        if x.device.type != "cpu" or h * w >= 64:
            return super().forward(x)
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, p, p, p, p))  # (B, H, W, C)
        shifted = [x[:, i:i + s * h:s, j:j + s * w:s] for i in range(k) for j in range(k)]
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(torch.cat(shifted, 3), weight, self.bias).permute(0, 3, 1, 2)


class Residual(nn.Module):
    """Convolutions beside a shortcut, (B, C, h, w) -> (B, out, h / stride, w / stride).

    Basic: 3x3, 3x3. Bottleneck: 1x1, 3x3 (with the stride, as torchvision), 1x1 to 4 times `width`.
    drop: (B, 1) from drop_path, or None.
    """

    def __init__(self, channels, width, stride, bottleneck):
        super().__init__()
        layers = [(3, width, stride), (3, width, 1)]  # kernel, channels, stride
        if bottleneck:
            layers = [(1, width, 1), (3, width, stride), (1, 4 * width, 1)]
        self.depth = len(layers)
        before = channels
        for i, (kernel, out, step) in enumerate(layers, 1):
            self.add_module(f"conv{i}", Convolution(before, out, kernel, step))
            self.add_module(f"bn{i}", BatchNorm(out))
            before = out
        self.downsample = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(Convolution(channels, out, 1, stride), BatchNorm(out))

    def forward(self, x, drop=None):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if self.depth == 3:
            y = self.bn3(self.conv3(F.relu(y, inplace=True)))
        y = branch(y, drop, 0)
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet(Encoder):
    """A ResNet with torchvision's parameter names: four stages of strides 4, 8, 16, 32.

    depths: blocks of each stage. patch_size only says how large the patches of `hidden` are.
    """
    stride = 32

    def __init__(self, img_size, patch_size, depths, bottleneck, channels=3, num_classes=0):
        super().__init__(img_size, patch_size, channels)
        self.conv1 = Convolution(channels, 64, 7, 2)
        self.bn1 = BatchNorm(64)
        self.relu = nn.ReLU(inplace=True)
        width = 64
        self.widths = [width]  # after the stem and each stage
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                blocks.append(Residual(width, 64 << stage, 2 if stage and not i else 1, bottleneck))
                width = (256 if bottleneck else 64) << stage
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            self.widths.append(width)
        self.dim = width
        self.branches = sum(depths)
        self.fc = classifier(self.dim, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    @property
    def stages(self):
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    @property
    def watched(self):
        return [self.layer1[0]], [self.relu, *super().watched[1]]  # pooling; stem and blocks

    def encode(self, images, after=lambda l, z: z, drop=None, last=4):
        """images (B, C, H, W) in [0, 1] -> the last feature map (B, D, H / 32, W / 32).

        after(l, z) -> z follows the stem (l = 0) and each stage, of which `last` is the last.
        drop: (B, blocks) or None.
        """
        z = self.relu(self.bn1(self.conv1(self.normalize(images))))
        z = after(0, F.max_pool2d(z, 3, 2, padding=1))  # (B, 64, H / 4, W / 4)
        first = 0
        for l, stage in enumerate(self.stages[:last], 1):
            for i, block in enumerate(stage, first):
                z = block(z, None if drop is None else drop[:, i:i + 1])
            z = after(l, z)
            first += len(stage)
        return z


# --- BM: an encoder-decoder ---

class EncoderDecoder(ViT):
    """MAE's asymmetric pair (BM section 3.2), under the official MAE repository's names.

    The encoder sees visible tokens only. The decoder is given mask tokens for the others.
    # differs from the authors' code: BM's has no cls token, and 1-D positions.
    """

    def __init__(self, *args, decoder, **more):
        """decoder: its depth, width and heads. The rest are a ViT's."""
        super().__init__(*args, **more)
        depth, width, heads = decoder
        positions = sincos_positions(width, self.grid)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_embed = nn.Linear(self.dim, width)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, self.patch_size ** 2 * self.channels)
        self.apply(xavier)
        nn.init.normal_(self.mask_token, std=0.02)

    def decode(self, z, hidden=None):
        """Encoded tokens (B, 1 + visible, D) -> predicted patches (B, N, p p C), all of them."""
        x = self.decoder_embed(z)  # (B, 1 + visible, d)
        if hidden is not None:
            full = self.mask_token.to(x.dtype).expand(*hidden.shape, -1)
            index = visible_index(hidden, x.device)
            full = full.index_put(index, x[:, 1:])  # masked_scatter is slower
            x = torch.cat([x[:, :1], full], dim=1)
        x = x + self.decoder_pos_embed  # (B, 1 + N, d)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward(self, images, hidden=None):
        """images (B, C, H, W) in [0, 1], hidden (B, N) or None -> patches (B, N, p p C)."""
        return self.decode(self.encode(images, hidden), hidden)


# --- A2: a mask token in the feature maps, a linear head ---

class MaskToken:
    """A2 section 4 for any family: after layer `token_at`, z <- z + T * D(M), then one linear layer
    to pixels. For a map that is a 1x1 convolution, shuffled into the pixels of a position.

    T: the mask token, one vector. D(M) in [0, 1]: the hidden patches at the size of z.
    token_at: 0 (after the projection or stem), 1 .. L, None: no token. token_how "add": the
    paper's. "replace": z <- z (1 - D(M)) + T D(M), SimMIM's.
    # differs from the authors' code: theirs scales the hidden features of some CNNs by a learned
    # factor that starts at 1e-6 before it adds T ("scaled"); a ViT's layer l is its l + 1, and its
    # ImageNet ViTs have T after the projection.
    """

    def __init__(self, *args, token_at, token_how, **more):
        super().__init__(*args, **more)
        self.token_at = token_at
        self.token_how = token_how
        if self.tokens:
            self.decoder_pred = nn.Linear(self.dim, self.patch_size ** 2 * self.channels)
            xavier(self.decoder_pred)
            shape = (1, 1, self.dim)
        else:
            pixels = self.stride ** 2 * self.channels
            self.decoder_pred = Convolution(self.dim, pixels, 1, bias=True)
            shape = (self.widths[token_at or 0], 1, 1)
        self.mask_token = self.mask_token_scale = None
        if token_at is not None:
            self.mask_token = nn.Parameter(0.02 * torch.randn(shape))
            if token_how == "scaled":
                self.mask_token_scale = nn.Parameter(torch.full(shape, 1e-6))

    def downsample(self, z, hidden):
        """D: each position's hidden share in [0, 1], (B, 1 + N, 1) or (B, 1, h, w) as z is."""
        if self.tokens:
            return F.pad(hidden, (1, 0))[:, :, None].to(z.dtype)  # never the cls token
        mask = hidden.view(-1, 1, *self.grid).float()
        pixels = F.interpolate(mask, scale_factor=self.patch_size)  # (B, 1, H, W)
        return F.avg_pool2d(pixels, pixels.shape[2] // z.shape[2]).to(z.dtype)

    def inject(self, z, mask):
        """The token into features z where `mask`, D(M), says."""
        if self.token_how == "replace":
            z = z * (1 - mask)
        elif self.token_how == "scaled":
            z = z * (1 - mask) + z * self.mask_token_scale.to(z.dtype) * mask
        return z + self.mask_token.to(z.dtype) * mask

    def predict(self, z):
        """Features -> predicted patches (B, N, p p C)."""
        if self.tokens:
            return self.decoder_pred(z[:, 1:])
        p = self.patch_size
        picture = F.pixel_shuffle(self.decoder_pred(z), self.stride)  # (B, C, H, W)
        B, C = picture.shape[:2]
        patches = F.pixel_unshuffle(picture, p).view(B, C, p * p, -1)  # (B, C, p p, N)
        return patches.permute(0, 3, 2, 1).reshape(B, -1, p * p * C)

    def forward(self, images, hidden=None, token=True):
        """images (B, C, H, W) in [0, 1], their hidden patches (B, N) filled -> (B, N, p p C).

        token False: without the mask token, to see what it is for (A2 Fig. A3).
        """
        used = token and hidden is not None and self.token_at is not None
        hidden = moved(hidden, images.device) if used else None

        def after(layer, z):
            here = used and layer == self.token_at
            return self.inject(z, self.downsample(z, hidden)) if here else z
        return self.predict(self.encode(images, after=after))


# --- Heads for dense predictions (BM 4.4, A2 5.3) ---

# A convolution, batch norm, ReLU.
conv_norm = functools.partial(ops.Conv2dNormActivation, norm_layer=BatchNorm)


class Pyramid(nn.Module):
    """An encoder's four maps at four strides. A ResNet's have them: 4, 8, 16, 32. A ViT's are
    brought to 1/4, 1/2, 1 and 2 patches by two, one and no transposed convolution, and max-pooling.
    widths: of the maps.
    """

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.widths = encoder.widths[1:] if not encoder.tokens else [encoder.dim] * 4
        self.multiple = encoder.stride  # pixels of a position of the coarsest map
        self.scales = nn.ModuleList(nn.Identity() for _ in range(4))
        if encoder.tokens:
            self.multiple = 2 * encoder.patch_size

            def twice():
                return nn.ConvTranspose2d(encoder.dim, encoder.dim, 2, 2)
            first = nn.Sequential(twice(), BatchNorm(encoder.dim), nn.GELU(), twice())
            self.scales = nn.ModuleList([first, twice(), nn.Identity(), nn.MaxPool2d(2)])

    def forward(self, images, drop=None):
        """Images (B, C, H, W) in [0, 1], of multiples of `multiple` -> four maps (B, D, h, w)."""
        return [scale(z) for scale, z in zip(self.scales, self.encoder.maps(images, drop))]


class UperNet(nn.Module):
    """A class for every pixel, by UperNet (arXiv 1807.10221) on a pyramid: its last map pooled to
    1, 2, 3 and 6 cells a side; lateral convolutions and sums from the top down; all levels, each
    smoothed, joined.
    # differs from the authors' code: theirs drops a tenth of the channels before the classifier.
    """
    tokens = False

    def __init__(self, encoder, classes, width):
        super().__init__()
        self.pyramid = Pyramid(encoder)
        self.branches = encoder.branches
        *lower, top = self.pyramid.widths
        self.pools = nn.ModuleList(conv_norm(top, width, 1) for _ in (1, 2, 3, 6))
        self.top = conv_norm(top + 4 * width, width, 3)
        self.lateral = nn.ModuleList(conv_norm(n, width, 1) for n in lower)
        self.smooth = nn.ModuleList(conv_norm(width, width, 3) for _ in lower)
        self.join = conv_norm(4 * width, width, 3)
        self.classify = nn.Conv2d(width, classes, 1)
        half = min(256, max(1, width // 2))
        self.auxiliary = nn.Sequential(conv_norm(lower[-1], half, 3),
                                       nn.Conv2d(half, classes, 1))  # of A2's code, in training

    def forward(self, images, drop=None):
        """images (B, C, H, W) in [0, 1] -> scores (B, classes, H, W); in training also those of
        the third map alone.
        """
        def to(z, size):
            return F.interpolate(z, size, mode="bilinear")

        H, W = images.shape[2:]
        n = self.pyramid.multiple
        mean = self.pyramid.encoder.mean  # to pad with
        images = F.pad(images - mean, [0, -W % n, 0, -H % n]) + mean
        maps = self.pyramid(images, drop)
        top = maps[-1]
        pooled = [to(pool(F.adaptive_avg_pool2d(top, n)), top.shape[2:])
                  for n, pool in zip((1, 2, 3, 6), self.pools)]
        z = self.top(torch.cat([top, *pooled], dim=1))
        levels = [z]
        for lateral, smooth, level in zip(self.lateral[::-1], self.smooth[::-1], maps[-2::-1]):
            z = lateral(level) + to(z, level.shape[2:])
            levels.append(smooth(z))
        finest = z.shape[2:]
        z = self.join(torch.cat([to(z, finest) for z in levels], dim=1))
        scores = [self.classify(z)]
        if self.training:
            scores.append(self.auxiliary(maps[2]))
        scores = [to(x.float(), images.shape[2:])[:, :, :H, :W] for x in scores]
        return scores if self.training else scores[0]


class Neck(nn.Module):
    """What Mask R-CNN is given: {name: map (B, width, h, w)}, in float32, of a pyramid with FPN; or
    ("c4") a ResNet's third stage alone.
    """

    def __init__(self, encoder, kind, width):
        super().__init__()
        self.pyramid = Pyramid(encoder)
        self.fpn = None
        self.drop = None
        self.out_channels = encoder.widths[3] if kind == "c4" else width
        if kind == "fpn":
            self.fpn = ops.FeaturePyramidNetwork(self.pyramid.widths, width,
                                                 ops.feature_pyramid_network.LastLevelMaxPool())

    def forward(self, images):
        images = images + self.pyramid.encoder.mean  # which Shown took off, to pad with it
        if self.fpn is None:
            maps = {"0": self.pyramid.encoder.encode(images, drop=self.drop, last=3)}
        else:
            maps = self.pyramid(images, self.drop)
            maps = self.fpn({str(i): z for i, z in enumerate(maps)})
        if not self.training and not all(z.isfinite().all() for z in maps.values()):
            raise FloatingPointError("features are not finite: try --amp off, other --weights")
        return {name: z.float() for name, z in maps.items()}


def to_short_side(images, short, longest=None):
    """(B, C, H, W) with their short side as given, or their long side, where that is reached. It is
    four times the short one by default, as 2048 and 512 in the codes for ADE20K.
    """
    H, W = images.shape[2:]
    by = min(short / min(H, W), (longest or 4 * short) / max(H, W))
    size = [max(1, round(side * by)) for side in (H, W)]
    return F.interpolate(images, size, mode="bilinear", antialias=True)


class Shown(detection.transform.GeneralizedRCNNTransform):
    """Images as Mask R-CNN is given them: in training as they are, in measuring resized as training
    images are, antialiased. (torchvision's own are not.) Masks are moved for its RoIAlign, which
    takes pixels for points at their corners, and pasted by `paste`, not over whole pixels.
    """

    def resize(self, image, target=None):
        if not self.training:
            return to_short_side(image[None], self.min_size[0], self.max_size)[0], target
        masks = F.pad(target["masks"][:, None].float(), (1, 0, 1, 0))  # half a pixel right and down
        return image, dict(target, masks=F.avg_pool2d(masks, 2, 1)[:, 0])

    def postprocess(self, result, shown, sizes):
        masks = [found.pop("masks") for found in result]
        for found, mask, size in zip(super().postprocess(result, shown, sizes), masks, sizes):
            found["masks"] = paste(mask, found["boxes"], size)
        return result


def paste(masks, boxes, size):
    """Masks (n, 1, m, m), each stretched over its box of (n, 4), at the middle of every pixel of an
    image of `size` = (H, W): (n, 1, H, W).
    """
    m = masks.shape[2]
    cells = torch.arange(m, device=masks.device)

    def weights(low, high, side):  # bilinear: (n, 1), (n, 1) -> (n, 1, side, m)
        x = torch.arange(side, device=masks.device) + 0.5
        x = (x - low) / (high - low) * m - 0.5  # in cells: (n, side)
        return (1 - (x[:, None, :, None] - cells).abs()).clamp(min=0)
    left, top, right, bottom = boxes.T[:, :, None]
    with torch.autocast(masks.device.type, enabled=False):
        return weights(top, bottom, size[0]) @ masks @ weights(left, right, size[1]).mT


class Again(nn.Module):
    """Layers used a second time in a step, whose running statistics are those of the first."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        norms = [m for m in self.layers.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        before = [m.momentum for m in norms]
        for m in norms:
            m.momentum = 0.0
        x = self.layers(x)
        for m, momentum in zip(norms, before):
            m.momentum = momentum
        return x


class Float32(nn.Module):
    """A module whose outputs are in float32. Half precision is too coarse for boxes."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return torch.utils._pytree.tree_map(torch.Tensor.float, self.module(*args))


class Detector(nn.Module):
    """Boxes and masks of objects, by torchvision's Mask R-CNN on a Neck (BM 4.4, A2 A.2). In "c4"
    a ResNet's fourth stage and a norm are the head of boxes and masks, as in MoCo.
    # differs from MoCo's code: there the masks' part is taken from the boxes', here computed again.

    classes: without the background. short, longest: an image's sides as it is measured. sampled:
    boxes of an image that the box and mask losses are of, out of four times as many. Anchors are 8
    positions of their map wide ("c4": 2 to 32). ValueError: the patch size is no power of two.
    """
    tokens = False

    def __init__(self, encoder, classes, short, longest, kind="fpn", width=256, sampled=512):
        super().__init__()
        self.branches = encoder.branches
        neck = Neck(encoder, kind, width)
        n = neck.pyramid.multiple
        if n & n - 1:
            raise ValueError(f"patch size {encoder.patch_size}: a detector's is a power of two")
        anchors = [[n * 2 ** i] for i in range(5)]
        if kind == "c4":
            anchors = [sum(anchors, [])]
            width = 256
            stage = nn.Sequential(encoder.layer4, BatchNorm(encoder.dim))
            boxes = nn.Sequential(stage, nn.AdaptiveAvgPool2d(1), nn.Flatten())
            pool = ops.MultiScaleRoIAlign(["0"], 14, 2)
            heads = dict(box_head=boxes, mask_head=Again(stage), box_roi_pool=pool,
                         mask_roi_pool=pool)
            top = in_mask = encoder.dim
        else:
            top = 4 * width
            in_mask = width
            heads = dict(box_head=detection.faster_rcnn.TwoMLPHead(width * 49, top),
                         mask_head=detection.mask_rcnn.MaskRCNNHeads(width, [width] * 4, 1))
        anchors = detection.rpn.AnchorGenerator(anchors, [[0.5, 1.0, 2.0]] * len(anchors))
        rpn = detection.rpn.RPNHead(neck.out_channels, anchors.num_anchors_per_location()[0])
        boxes = detection.faster_rcnn.FastRCNNPredictor(top, classes + 1)
        masks = detection.mask_rcnn.MaskRCNNPredictor(in_mask, width, classes + 1)
        many = 6 if kind == "c4" else 1  # of one map, as detectron2's
        self.rcnn = detection.MaskRCNN(
            neck, rpn_anchor_generator=anchors, rpn_head=Float32(rpn), **heads,
            box_predictor=Float32(boxes), mask_predictor=Float32(masks),
            box_batch_size_per_image=sampled,
            rpn_pre_nms_top_n_train=many * 4 * sampled, rpn_post_nms_top_n_train=4 * sampled,
            rpn_pre_nms_top_n_test=many * 2 * sampled, rpn_post_nms_top_n_test=2 * sampled)
        self.rcnn.transform = Shown(short, longest, encoder.mean.flatten().tolist(),
                                    [1.0] * encoder.channels, n if kind == "c4" else 2 * n)
        # its pools keep the strides of what they see first, which padding must not bend
        maps = {str(i): torch.empty(1, 1, k, k) for i, k in enumerate(
            [n // 16] if kind == "c4" else [8, 4, 2, 1])}
        for pool in (self.rcnn.roi_heads.box_roi_pool, self.rcnn.roi_heads.mask_roi_pool):
            pool(maps, [torch.zeros(1, 4)], [(n, n)])

    def forward(self, images, drop=None, targets=None):
        """images: a list of (C, H, W) in [0, 1]. In training: losses by name, of targets, dicts of
        boxes (n, 4) as left, top, right, bottom, labels (n,) from 1 on, masks (n, H, W) uint8. In
        measuring: such dicts, with scores (n,) and masks (n, 1, H, W) in [0, 1].
        """
        self.rcnn.backbone.drop = drop
        return self.rcnn(images, targets)


# --- By name ---

class Network(NamedTuple):
    """A row of MODELS."""
    family: type  # an Encoder
    sizes: dict  # its arguments
    layers: int  # L, the last layer or stage a mask token may follow
    middle: int  # the one it follows "in the middle" (A2 5.1)
    decoder: str | None = None  # of an EncoderDecoder, DEPTHxWIDTHxHEADS. None: it has none


def vit(dim, depth, heads, middle, decoder="4x384x6"):
    return Network(ViT, dict(dim=dim, depth=depth, heads=heads), depth, middle, decoder)


def resnet(*depths, bottleneck=True):
    return Network(ResNet, dict(depths=depths, bottleneck=bottleneck), len(depths), 3)


# BM A.1: 4 decoder blocks of width 384. A2 5.1: the middle of small and base, the others are ours.
MODELS = {
    "vit_micro": vit(128, 6, 4, 3, "2x64x2"),  # for a CPU: small images, small patches
    "vit_tiny": vit(192, 12, 3, 5),
    "vit_small": vit(384, 12, 6, 5),
    "vit_base": vit(768, 12, 12, 8),  # BM section 4.1
    "vit_large": vit(1024, 24, 16, 16),
    "vit_huge": vit(1280, 32, 16, 21),  # MAE's, of patches of 14
    "resnet18": resnet(2, 2, 2, 2, bottleneck=False),
    "resnet34": resnet(3, 4, 6, 3, bottleneck=False),
    "resnet50": resnet(3, 4, 6, 3),
    "resnet101": resnet(3, 4, 23, 3),
    "resnet152": resnet(3, 8, 36, 3),
}


def token_layer(name, token_at):
    """Where a model's mask token enters: "decoder", None (nowhere), or the layer it follows.

    token_at: "decoder", "none", "input" (layer 0), "middle" (the paper's) or a number.
    """
    row = MODELS[name]
    words = {"none": None, "input": 0, "middle": row.middle}
    if row.decoder:
        words["decoder"] = "decoder"
    if token_at in words:
        return words[token_at]
    if str(token_at).isdecimal() and int(token_at) <= row.layers:
        return int(token_at)
    raise ValueError(f"--token_at {token_at}: {name} takes {', '.join(words)} or 0 .. {row.layers}")


def encoder(name, img_size=224, patch_size=16, channels=3, num_classes=0, relative_positions=False,
            pool="cls"):
    """The encoder alone of a model of MODELS."""
    family, sizes = MODELS[name][:2]
    more = dict(relative_positions=relative_positions, pool=pool) if family.tokens else {}
    return family(img_size, patch_size, channels=channels, num_classes=num_classes, **sizes, **more)


def recovery_model(name, img_size=224, patch_size=16, channels=3, token_at=None, token_how="add",
                   decoder=None, relative_positions=False):
    """A model that recovers an image: images (B, C, H, W), hidden (B, N) -> patches (B, N, p p C).

    token_at: token_layer's; None: "decoder" where there is one, else "middle". decoder:
    "DEPTHxWIDTHxHEADS" (MAE's is 8x512x16); None: that of MODELS.
    """
    row = MODELS[name]
    if token_at is None:
        token_at = "decoder" if row.decoder else "middle"
    layer = token_layer(name, token_at)
    more = dict(row.sizes, channels=channels)
    if relative_positions:
        if not row.family.tokens:
            raise ValueError(f"no relative positions: {name} has no attention")
        more.update(relative_positions=True)
    if layer != "decoder":
        if decoder:
            raise ValueError(f"decoder {decoder}: with the token at {token_at} there is no decoder")
        Token = type(f"Token{row.family.__name__}", (MaskToken, row.family), {})
        return Token(img_size, patch_size, token_at=layer, token_how=token_how, **more)
    try:
        depth, dim, heads = map(int, (decoder or row.decoder).split("x"))
        right = depth >= 0 and heads > 0 and dim > 0 and dim % (4 * heads) == 0
    except ValueError:
        right = False
    if not right:
        raise ValueError(f"decoder '{decoder}' is not DEPTHxWIDTHxHEADS with a width divisible by "
                         "4 x heads: try 4x384x6")
    return EncoderDecoder(img_size, patch_size, decoder=(depth, dim, heads), **more)


def to_device(model, device):
    """The model on its device. Maps are in channels-last memory there (on a CPU 1.2 to 1.5 times as
    fast: python tests/bench.py memory). Where GPUs share a batch, batch norms are torch's.
    """
    if model.tokens:
        return model.to(device)
    if device.type == "cuda" and dist.is_initialized():
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(device, memory_format=torch.channels_last)


# --- Weights in and out ---

RECOVERY = ("decoder", "mask_token")  # names of what only recovers the image: no backbone


def read_weights(path):
    """A file of tensors and plain values, or that of a run's folder, as a dict."""
    path = os.path.join(path, "checkpoint.pt") if os.path.isdir(path) else os.fspath(path)
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE's files hold options
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError(f"{path}: pip install safetensors, to read it")
    except (FileNotFoundError, PermissionError) as error:
        raise ValueError(f"no weights at {path}: {error.strerror or error}")
    except Exception as error:  # unpickling fails in as many ways as there are files
        code = "GLOBAL" in str(error)
        why = "holds objects, which could run code" if code else "is damaged or of another kind"
        raise ValueError(f"{path} {why}: give a file of tensors that torch.save wrote; where you "
                         "trust it, load it and save its state dict")
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a dict of weights")
    return state


def run_config(state):
    """The configuration in a run's file, or {}. Other files may have another kind of `config`."""
    config = state.get("config")
    ours = isinstance(config, dict) and {"model", "img_size", "patch_size"} <= {*config}
    return config if ours else {}


def tensors(state):
    """What a file holds -> its weights {name: tensor}, the prefix taken off their names, and the
    names that are left.

    Of several networks under prefixes it is the one of most names. Of several dicts of weights it
    is "model" or "state_dict".
    """
    def of(held):
        return {k: x for k, x in held.items() if isinstance(x, torch.Tensor)}

    found = of(state)
    nested = {k: of(v) for k, v in state.items() if isinstance(v, dict) and of(v)}
    if nested and not found:
        key = next(k for k in ("model", "state_dict", *nested) if k in nested)
        if key not in ("model", "state_dict") and len(nested) > 1:
            raise ValueError(f"several dicts of weights, {', '.join(map(repr, nested))}: load the "
                             "file, and save the one you want alone")
        found = nested.pop(key)
    if not found or not all(isinstance(name, str) for name in found):
        raise ValueError(f"no named tensors in a dict of {', '.join(map(repr, list(state)[:8]))}: "
                         "give a state dict, or a dict with it as 'model' or 'state_dict'")
    found = {name.replace("_orig_mod.", ""): x for name, x in found.items()}
    firsts = {f"{row.family.first}.weight" for row in MODELS.values()}
    ends = [name.removesuffix(first) for name in found for first in firsts
            if f".{name}".endswith(f".{first}")]
    prefix = max(ends, key=lambda end: sum(n.startswith(end) for n in found), default="")
    taken = {n.removeprefix(prefix): x for n, x in found.items() if n.startswith(prefix)}
    return taken, prefix, [*nested, *(n for n in found if not n.startswith(prefix))]


# Names that tell what a file is of, where there is no such model here.
OTHERS = {
    "dist_token": "a distilled ViT", "reg_token": "a ViT with registers",
    "register_tokens": "a ViT with registers", "blocks.0.gamma_1": "BEiT",
    "blocks.0.ls1.gamma": "a ViT with layer scale, such as DINOv2", "norm_pre.weight": "CLIP",
    "class_token": "torchvision's ViT: timm has one under our names",
    "embeddings.cls_token": "Hugging Face's ViT: timm has them under our names, ViTMAE as "
                            "vit_base_patch16_224.mae",
    "fc_norm.weight": "a ViT with a norm after pooling",
    "patch_embed.proj.0.weight": "a ViT with a stem of convolutions",
    "conv1.0.weight": "a ResNet with a deep stem",
}


def refuse_others(names, own=()):
    """ValueError where a file's names tell of a network that is not here. own: the model's."""
    for sign, kind in OTHERS.items():
        if sign not in own and any(f".{name}".endswith(f".{sign}") for name in names):
            raise ValueError(f"these weights are of {kind}. There is no such model here")


class Loaded(NamedTuple):
    """What load_weights did, by parameter name."""
    loaded: list
    missing: list  # in the model, not loaded
    unexpected: list  # in the file, not in the model
    resized: list  # positions brought to this image size
    prefix: str  # taken off the names

    def __str__(self):
        def few(names):
            return f"{len(names)} ({', '.join(names[:4])}{', ...' * (len(names) > 4)})"
        return (f"weights: {len(self.loaded)} loaded, {few(self.resized)} resized, "
                f"{few(self.missing)} missing, {few(self.unexpected)} not used"
                + f", '{self.prefix}' taken off the names" * bool(self.prefix))


def resize_grid(rows, old, new):
    """A row for each cell of a grid `old` = (h, w), (h w, D) -> for each cell of `new`, bicubic."""
    maps = rows.float().T.reshape(1, -1, *old)
    return F.interpolate(maps, new, mode="bicubic")[0].flatten(1).T


def resize_positions(table, old, new):
    """Position embedding (1, 1 + N, D) of a grid of patches `old` -> of `new`."""
    return torch.cat([table[:, :1], resize_grid(table[0, 1:], old, new)[None].to(table)], dim=1)


def resize_relative(table, old, new):
    """Relative position table (offsets + 3, heads) of a grid of patches `old` -> of `new`."""
    old, new = ([2 * n - 1 for n in grid] for grid in (old, new))
    return torch.cat([resize_grid(table[:-3], old, new).to(table), table[-3:]])


def grid_of(state, weights, grid):
    """The weights' patches: by the run's configuration, else those whose fixed positions they are
    near, else a square, else the model's `grid`.
    """
    config = run_config(state)
    if config:
        return tuple(side // config["patch_size"] for side in config["img_size"])
    table = weights["pos_embed"]
    if table.ndim != 3:
        raise ValueError(f"pos_embed is {tuple(table.shape)}, not (1, 1 + N, D)")
    count = table.shape[1] - 1
    width = table.shape[2]
    grids = [(h, count // h) for h in range(1, count + 1) if count % h == 0 and width % 4 == 0]
    away = [(table.float() - sincos_positions(width, fixed)).square().mean() for fixed in grids]
    if grids and min(away) < 0.05:  # those learned from random ones are .5 away
        return grids[away.index(min(away))]
    side = math.isqrt(count)
    if side * side == count:
        return side, side
    if count != math.prod(grid):
        raise ValueError(f"{count} positions are not of a square image: they cannot be resized")
    return grid


def load_weights(model, source, head=True):
    """Load a path or a dict (ours, MAE's, timm's or torchvision's names) into `model` -> Loaded.

    The backbone must fit by names and shapes. Positions of another grid are resized, and a relative
    position bias may be missing: it is learned from zero. A classifier is left out if its shape
    differs, or head is False. What recovers the image is left out if the weights do it in another
    way.
    """
    state = read_weights(source) if isinstance(source, (str, os.PathLike)) else source
    weights, prefix, left = tensors(state)
    own = model.state_dict()
    names = list(weights)
    resized = []
    refuse_others(names + left, own)

    if "base_encoder" in prefix and model.tokens and model.dim == 384:
        raise ValueError("MoCo-v3's ViT-S has 12 heads, vit_small 6: the ViT-B is the same in both")

    # the head, if asked for, and what recovers images, if neither side has a decoder, are taken
    # where they fit; two decoders must be the same
    decoders = ["decoder_embed.weight" in x for x in (weights, own)]
    free = (f"{model.head_name}.", *(() if all(decoders) else RECOVERY))
    for name in [n for n in names if n.startswith(free)]:
        wanted = head if name.startswith(free[0]) else not any(decoders)
        if not wanted or name not in own or own[name].shape != weights[name].shape:
            del weights[name]

    # positions of another grid
    old = grid_of(state, weights, model.grid) if "pos_embed" in weights else model.grid
    for name in [n for n in weights if n in own and old != model.grid]:
        for end, resize in (("pos_embed", resize_positions), ("bias_table", resize_relative)):
            if name.endswith(end) and own[name].shape[-1] == weights[name].shape[-1]:
                weights[name] = resize(weights[name], old, model.grid)
                resized.append(name)

    # the rest must be the same
    for name in [n for n in weights if n in own and own[n].shape != weights[n].shape]:
        raise ValueError(f"{name} is {tuple(weights[name].shape)} in the weights and "
                         f"{tuple(own[name].shape)} in the model: choose their --model, --decoder, "
                         "--patch_size and kind of --data (grey or colour)")
    absent = [n for n in own if n not in weights and not n.endswith("num_batches_tracked")]
    missing = [n for n in absent if not n.startswith(free) and "relative_position" not in n]
    over = [n for n in weights if n not in own]
    if missing or over:
        text = (f"{len(x)} {what} ({', '.join(x[:2])})" for x, what in
                ((missing, "missing"), (over, "left over")))
        raise ValueError(f"the weights are not the model's: {', '.join(text)}: choose the --model, "
                         "--decoder and --relative_positions they were made with")
    model.load_state_dict(weights, strict=False)
    left += [n for n in names if n not in weights]
    return Loaded(list(weights), absent, left, resized, prefix)


def load_encoder(run, model=None, img_size=None, patch_size=None, pool=None):
    """The encoder of a run (its folder or file), in eval(): images in [0, 1] -> features (B, D).
    The other arguments are taken in place of what the file says.
    """
    state = read_weights(run)
    given = dict(model=model, img_size=img_size, patch_size=patch_size, pool=pool)
    c = {"pool": "cls", **run_config(state), **{k: x for k, x in given.items() if x is not None}}
    weights = tensors(state)[0]
    if not {"model", "img_size", "patch_size"} <= {*c}:
        raise ValueError(f"{run} is of no run: give model=, img_size= and patch_size=")
    first = weights.get(f"{MODELS[c['model']].family.first}.weight")
    channels = 3 if first is None else first.shape[1]
    relative = any("relative_position" in name for name in weights)
    model = encoder(c["model"], c["img_size"], c["patch_size"], channels, 0, relative, c["pool"])
    load_weights(model, state)
    model.strict = True
    return model.eval()


def export(state):
    """The backbone in a state dict: no decoder, no mask token, nothing of its memory format."""
    if not any(f"{row.family.first}.weight" in state for row in MODELS.values()):
        raise ValueError(f"there is no backbone in {', '.join(list(state)[:4])} ...")
    return {n: x.contiguous() for n, x in state.items() if not n.startswith(RECOVERY)}


def main(argv=None):
    p = argparse.ArgumentParser(description="Write an encoder alone.", allow_abbrev=False)
    p.add_argument("--export", nargs=2, metavar=("RUN", "OUT"), required=True)
    run, out = p.parse_args(argv).export
    try:
        if out.endswith(".safetensors"):
            raise ValueError(f"{out}: what is written is torch's own kind, call it .pth")
        state = read_weights(run)
        weights, _, left = tensors(state)
        if not run_config(state):  # a run may be of a family of one's own
            refuse_others([*weights, *left])
        torch.save(export(weights), f"{out}.part")
        os.replace(f"{out}.part", out)  # whole or not at all
    except (ValueError, OSError, RuntimeError) as error:
        p.exit(2, f"models.py: {str(error).splitlines()[0]}\n")
    print("wrote", ascii(out))


if __name__ == "__main__":
    main()
