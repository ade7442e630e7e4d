"""The networks: a ViT encoder, and the encoder-decoder that recovers an image from it.

Parameters carry the names the field uses, so weights travel with no converter: the ViT has timm's
(`vit_*_patch16_224`), the encoder-decoder the official MAE repository's. No loss is computed here.

    python models.py                                    parameters, FLOPs and the shape trail of each model
    python models.py --export RUN/checkpoint.pt vit.pth the encoder alone, under timm's names

B batch, C channels, H x W pixels, p patch size, N = (H/p)(W/p) patches, D width, L depth.
hidden (B, N) bool: True = the encoder does not see this patch.
"""
import argparse
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

#                width depth heads  decoder: depth width heads (A.1: the decoder has 4 blocks of width 384)
MODELS = {
    "vit_micro": ((128,  6,  4), (2,  64, 2)),     # for a CPU: small images, small patches
    "vit_tiny":  ((192, 12,  3), (4, 384, 6)),
    "vit_small": ((384, 12,  6), (4, 384, 6)),
    "vit_base":  ((768, 12, 12), (4, 384, 6)),     # BM section 4.1
    "vit_large": ((1024, 24, 16), (4, 384, 6)),
}
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


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v for (B, heads, N, d), by the kernel that is fastest on the device."""
    if fused_attention(q.device):
        return F.scaled_dot_product_attention(q, k, v)
    return (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(dim=3) @ v


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        x = attend(q, k, v)                                                            # (B, heads, N, d)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Holds the projection of a patch, under timm's name; ViT.encode applies it to the patches it keeps."""

    def __init__(self, patch_size, channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size)


class ViT(nn.Module):
    """A plain vision transformer with timm's parameter names.

    img_size: int or (H, W), divisible by patch_size, else ValueError. num_classes 0: no head.
    Images come in as RGB (or N channels) in [0, 1]; the model normalises them itself.
    """

    def __init__(self, img_size=224, patch_size=16, dim=768, depth=12, heads=12, channels=3, num_classes=0):
        super().__init__()
        self.img_size, self.patch_size, self.channels = pair(img_size), patch_size, channels
        if any(side < patch_size or side % patch_size for side in self.img_size):
            raise ValueError(f"image size {self.img_size[0]}x{self.img_size[1]} is not divisible by the patch "
                             f"size {patch_size}: choose multiples of {patch_size}")
        self.grid = tuple(side // patch_size for side in self.img_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, self.grid), requires_grad=False)
        self.patch_embed = PatchEmbed(patch_size, channels, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        rgb = channels == 3
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN if rgb else [0.45] * channels).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD if rgb else [0.225] * channels).view(-1, 1, 1), persistent=False)
        self.apply(self._init)
        nn.init.normal_(self.cls_token, std=0.02)

    @staticmethod
    def _init(m):
        """MAE's: Xavier uniform for every projection (the patch's too, as the matrix it is), biases zero."""
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(m.weight.data.flatten(1))
            nn.init.zeros_(m.bias)

    def normalize(self, images):
        """[0, 1] -> zero mean and unit deviation per channel over ImageNet."""
        return (images - self.mean) / self.std

    def denormalize(self, images):
        return images * self.std + self.mean

    def encode(self, images, hidden=None):
        """images (B, C, H, W) in [0, 1], hidden (B, N) bool, the same count in every row -> (B, 1 + visible, D).

        Hidden patches are dropped before the projection: nothing of them reaches the encoder.
        """
        B, C, p, (gh, gw) = images.shape[0], self.channels, self.patch_size, self.grid
        x = self.normalize(images).view(B, C, gh, p, gw, p).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(B, gh * gw, C * p * p)                                           # (B, N, C p p)
        position = self.pos_embed[:, 1:]                                               # (1, N, D)
        if hidden is not None:
            row, patch = (~hidden).nonzero(as_tuple=True)
            x, position = x[row, patch].view(B, -1, C * p * p), position[0, patch].view(B, -1, position.shape[2])
        x = F.linear(x, self.patch_embed.proj.weight.flatten(1), self.patch_embed.proj.bias) + position
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1).to(x.dtype), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)                                                            # (B, 1 + visible, D)

    def forward(self, images):
        """Class scores (B, num_classes) from the cls token; its features (B, D) when there is no head."""
        return self.head(self.encode(images)[:, 0])


# ---------------------------------------------------------------------------------------------------
# Encoder-decoder
# ---------------------------------------------------------------------------------------------------

class EncoderDecoder(ViT):
    """MAE's asymmetric pair (BM section 3.2): the encoder sees visible tokens only; mask tokens are appended
    before the decoder, which predicts every patch. Parameter names are the official MAE repository's.
    """

    def __init__(self, img_size=224, patch_size=16, dim=768, depth=12, heads=12, channels=3,
                 decoder_depth=4, decoder_dim=384, decoder_heads=6):
        super().__init__(img_size, patch_size, dim, depth, heads, channels)
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
# By name; weights in and out
# ---------------------------------------------------------------------------------------------------

def encoder_decoder(name, img_size=224, patch_size=16, channels=3, decoder=None):
    """A model of MODELS with its decoder, or another: "DEPTHxWIDTHxHEADS" (MAE's is 8x512x16)."""
    (dim, depth, heads), default = MODELS[name]
    try:
        decoder_depth, decoder_dim, decoder_heads = map(int, decoder.split("x")) if decoder else default
        if decoder_depth < 0 or min(decoder_heads, decoder_dim) < 1 or decoder_dim % (4 * decoder_heads):
            raise ValueError
    except ValueError:
        raise ValueError(f"decoder '{decoder}' is not DEPTHxWIDTHxHEADS with a width divisible by 4 x heads: try 4x384x6")
    return EncoderDecoder(img_size, patch_size, dim, depth, heads, channels, decoder_depth, decoder_dim, decoder_heads)


def encoder(name, img_size=224, patch_size=16, channels=3, num_classes=0):
    """The ViT alone of a model of MODELS."""
    (dim, depth, heads), _ = MODELS[name]
    return ViT(img_size, patch_size, dim, depth, heads, channels, num_classes)


def read_weights(path):
    """A file of tensors and plain values, as a dict. ValueError if it is missing, damaged, or holds code."""
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


class Loaded(NamedTuple):
    """What load_weights did, by parameter name."""
    loaded: list
    missing: list                       # in the model, not in the file
    unexpected: list                    # in the file, not in the model
    resized: list                       # position embeddings brought to this image size

    def __str__(self):
        def few(names):
            return f"{len(names)}" + (f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else "")
        return f"weights: {len(self.loaded)} loaded, {few(self.resized)} resized, {few(self.missing)} missing, {few(self.unexpected)} not used"


def resize_positions(table, grid, cls=1):
    """Position embedding (1, cls + n^2, D) of a square grid -> (1, cls + N, D) for grid = (rows, columns), bicubic."""
    side = round((table.shape[1] - cls) ** 0.5)
    if side * side != table.shape[1] - cls:
        raise ValueError(f"a position embedding of {table.shape[1] - cls} patches is not of a square image: it cannot be resized")
    patches = table[:, cls:].float().view(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([table[:, :cls].float(), patches], dim=1)


def load_weights(model, source):
    """Load a path or a state dict (ours, the MAE repository's or timm's names) into `model` -> Loaded.

    Position embeddings of another image size are resized; a head of another shape is left out. ValueError when a
    backbone parameter has another shape, or when none of the backbone was found.
    """
    state = read_weights(source) if isinstance(source, (str, os.PathLike)) else source
    for key in ("model", "state_dict"):
        state = state[key] if isinstance(state.get(key), dict) else state
    state = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    own, resized = model.state_dict(), []
    for name in [n for n in state if n in own and state[n].shape != own[n].shape]:
        if name.endswith("pos_embed") and state[name].shape[2] == own[name].shape[2]:
            state[name] = resize_positions(state[name], model.grid)
            resized.append(name)
        elif name.startswith("head"):
            del state[name]
        else:
            options = "--decoder (MAE's is 8x512x16)" if name.startswith(("decoder", "mask_token")) else "--model and --patch_size"
            raise ValueError(f"{name} is {tuple(state[name].shape)} in the weights and {tuple(own[name].shape)} in the model: "
                             f"choose the {options} the weights were made with")
    loaded = [n for n in state if n in own]
    if not any(n.startswith("blocks.") for n in loaded):
        raise ValueError(f"none of the backbone is in these weights: they have {', '.join(list(state)[:4]) or 'no tensors'} ..., "
                         f"the model {', '.join(list(own)[:4])} ...")
    model.load_state_dict(state, strict=False)
    return Loaded(loaded, [n for n in own if n not in state], [n for n in state if n not in own], resized)


def export(state):
    """The plain backbone of a model's state dict, under timm's (`vit_*_patch16_224`) names: no decoder, no mask token."""
    return {k: v for k, v in state.items() if not k.startswith(("decoder", "mask_token"))}


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
    p.add_argument("--export", nargs=2, metavar=("CHECKPOINT", "OUT"), help="write the encoder alone, under timm's names")
    args = p.parse_args(argv)
    if args.export:
        try:
            state = read_weights(args.export[0])
            torch.save(export(state.get("model", state)), args.export[1])
        except (ValueError, OSError, RuntimeError) as error:
            p.exit(2, f"models.py: {str(error).splitlines()[0]}\n")
        return print(f"wrote {args.export[1]}")
    for name in MODELS:
        size, patch = (32, 4) if name == "vit_micro" else (224, 16)
        with torch.device("meta"):                              # shapes only: no time for initialising
            model, alone = encoder_decoder(name, size, patch), encoder(name, size, patch)
        model, alone = model.to_empty(device="cpu"), alone.to_empty(device="cpu")
        N = (size // patch) ** 2
        hidden = torch.arange(N)[None] >= N // 4
        trail = []
        for part in ("blocks.0", "norm", "decoder_embed", "decoder_norm", "decoder_pred"):
            model.get_submodule(part).register_forward_hook(
                lambda module, inputs, out, part=part: trail.append(f"{part} {tuple(out.shape)}"))
        masked, whole = flops(model, torch.zeros(1, 3, size, size), hidden), flops(alone, torch.zeros(1, 3, size, size))
        count = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(("decoder", "mask")))
        decoder = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("decoder", "mask")))
        print(f"{name}: {size} px, patch {patch}: encoder {count / 1e6:.2f} M parameters, {whole / 1e9:.3f} GFLOPs an image; "
              f"decoder {decoder / 1e6:.2f} M; with 75% hidden {masked / 1e9:.3f} GFLOPs")
        print(f"    images (1, 3, {size}, {size}) -> " + " -> ".join(trail))


if __name__ == "__main__":
    main()
