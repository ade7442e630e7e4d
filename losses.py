"""One function per equation. Predictions and targets in, one number out; always in float32.

Patches are (B, N, p p C), a row of the picture at a time, channels last inside a patch (MAE's order).
Images are (B, C, H, W). counted (B, N) bool: the patches whose error is averaged; None = all of them.
"""
import torch
import torch.nn.functional as F


def patchify(images, p):
    """(B, C, H, W) -> (B, N, p p C). ValueError when H or W is not a multiple of p."""
    B, C, H, W = images.shape
    if H % p or W % p:
        raise ValueError(f"a {H}x{W} image cannot be cut into {p}x{p} patches: choose multiples of {p}")
    x = images.reshape(B, C, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(patches, p, grid):
    """(B, N, p p C) -> (B, C, H, W), the inverse of patchify. grid: (H / p, W / p)."""
    B, (gh, gw) = patches.shape[0], grid
    x = patches.reshape(B, gh, gw, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, gh * p, gw * p)


def patch_statistics(patches, norm="patch", channels=3):
    """Mean and deviation of each patch of (B, N, p p C), in the same shape.

    norm "patch": over all its p p C values (MAE). "channel": per channel. "off": 0 and 1.
    # differs from the authors' code: BM's is "channel".
    """
    x = patches.unflatten(2, (-1, channels)) if norm == "channel" else patches.unsqueeze(3)
    mean, std = x.mean(2, keepdim=True), (x.var(2, keepdim=True) + 1e-6).sqrt()        # (B, N, 1, C or 1)
    if norm == "off":
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    return mean.expand_as(x).flatten(2), std.expand_as(x).flatten(2)


def normalize_patches(patches, norm="patch", channels=3):
    """The normalised pixel target (MAE): each patch minus its own mean, divided by its own deviation."""
    mean, std = patch_statistics(patches, norm, channels)
    return (patches - mean) / std


def resize_area(images, size):
    """(B, C, H, W) -> (B, C, *size), interpolation mode 'area' (A.2): every output pixel is a box average."""
    return images if images.shape[2:] == tuple(size) else F.interpolate(images, size, mode="area")


def center_crop(images, size):
    """The central size = (h, w) of (B, C, H, W)."""
    (H, W), (h, w) = images.shape[2:], size
    return images[:, :, (H - h) // 2:(H + h) // 2, (W - w) // 2:(W + w) // 2]


def masked_mse(prediction, target, counted=None):
    """L_MSE (BM section 3.1) over patches (B, N, p p C): mean square of each, averaged over those that count."""
    error = (prediction.float() - target).square().mean(2)                             # (B, N)
    return error.mean() if counted is None else (error * counted).sum() / counted.sum()


def band_mse(prediction, target, size):
    """Mean square error over (B, C, V, V) outside the central `size` = (h, w): A.2's outer band."""
    error = (prediction - target).square()
    band = error.sum() - center_crop(error, size).sum()
    return band / (error.numel() - error[..., 0, 0].numel() * size[0] * size[1])


def recovery_loss(prediction, target, size, p, counted=None, norm="patch", band_weight=0.2):
    """The loss of every pre-training task of BM: a scalar.

    prediction (B, N, p p C): patches of a picture of `size` = (H, W). target (B, C, V, V): the picture to be
    recovered, normalised as the model's input is. When it is larger than `size` the prediction means the
    whole of it at the input's resolution (A.2), and the loss has two terms, weighed 1 - band_weight and
    band_weight: the paper gives no weights, .8 and .2 are the authors' code's.
    """
    prediction, C, grid = prediction.float(), target.shape[1], [side // p for side in size]
    if tuple(target.shape[2:]) == tuple(size):
        return masked_mse(prediction, normalize_patches(patchify(target, p), norm, C), counted)
    whole = resize_area(unpatchify(prediction, p, grid), target.shape[2:])             # (B, C, V, V)
    center = normalize_patches(patchify(center_crop(target, size), p), norm, C)        # the input's own patches
    center = masked_mse(patchify(center_crop(whole, size), p), center, counted)
    band = normalize_patches(patchify(resize_area(target, size), p), norm, C)          # the view, shrunk
    band = resize_area(unpatchify(band, p, grid), target.shape[2:])
    return (1 - band_weight) * center + band_weight * band_mse(whole, band, size)


def recovered_picture(prediction, target, size, p, norm="patch"):
    """The inverse of recovery_loss's normalisation: a picture (B, C, V, V) to look at.

    A normalised prediction says nothing of a patch's mean and deviation: they are borrowed from the target,
    and whoever shows the picture must say so.
    """
    prediction, C, grid = prediction.float(), target.shape[1], [side // p for side in size]

    def restored(picture, reference, resize_to):
        statistics = patch_statistics(patchify(reference, p), norm, C)
        mean, std = (resize_area(unpatchify(x, p, grid), resize_to) for x in statistics)
        return picture * std + mean

    picture = unpatchify(prediction, p, grid)
    if tuple(target.shape[2:]) == tuple(size):
        return restored(picture, target, size)
    whole = resize_area(picture, target.shape[2:])
    picture = restored(whole, resize_area(target, size), target.shape[2:])
    center_crop(picture, size)[:] = restored(center_crop(whole, size), center_crop(target, size), size)
    return picture
