"""One function per equation of *Beyond Masking* (BM) and *A2MIM* (A2). Predictions and targets in,
one number out, in float32, outside autocast.

Patches are (B, N, p p C), a row of the picture at a time, channels last in a patch (MAE's order).
Images are (B, C, H, W). counted (B, N) bool: the patches whose error is averaged; None = all.
"""
import math

import torch
import torch.nn.functional as F

# Pixel losses, of the error prediction - target. Every task takes any of them.
PIXEL_LOSS = {
    "mse": torch.square,  # L_MSE, BM section 3.1
    "l1": torch.abs,  # L_spa, A2 eq. 6; SimMIM's
}


def patchify(images, p):
    """(B, C, H, W) -> (B, N, p p C)."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(patches, p, grid):
    """(B, N, p p C) -> (B, C, H, W), the inverse of patchify. grid: (H / p, W / p)."""
    gh, gw = grid
    x = patches.reshape(len(patches), gh, gw, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, gh * p, gw * p)


def patch_statistics(patches, norm="patch", channels=3):
    """Mean and deviation of each patch of (B, N, p p C), in the same shape.

    norm "patch": over all its p p C values (MAE). "channel": per channel. "off": 0 and 1.
    # differs from the authors' code: BM's is "channel".
    """
    if norm == "off":
        return torch.zeros_like(patches), torch.ones_like(patches)
    x = patches.unflatten(2, (-1, channels)) if norm == "channel" else patches.unsqueeze(3)
    mean = x.mean(2, keepdim=True)  # (B, N, 1, C or 1)
    variance = (x - mean).square().sum(2, keepdim=True) / max(1, x.shape[2] - 1)  # as MAE
    std = (variance + 1e-6).sqrt()
    return mean.expand_as(x).flatten(2), std.expand_as(x).flatten(2)


def normalize_patches(patches, norm="patch", channels=3):
    """The normalised pixel target (MAE): each patch minus its own mean, over its own deviation."""
    if norm == "off":
        return patches
    mean, std = patch_statistics(patches, norm, channels)
    return (patches - mean) / std


def area_matrix(n, m, device):
    """Box averages from n to m pixels repeat every n / g pixels: the matrix of one period,
    (n / g, m / g), and g. Two periods at once, where they pair up, are faster.
    """
    g = math.gcd(n, m)
    g = g // 2 if g % 2 == 0 else g
    matrix = F.interpolate(torch.eye(n // g)[None], m // g, mode="area")[0]
    return matrix.to(device), g  # from the CPU: Apple's GPU has no "area"


def resize_area(images, size):
    """(B, C, H, W) -> (B, C, *size), F.interpolate's "area" (BM A.2). On a CPU two matrix products
    are faster.
    """
    if images.is_cuda:
        return F.interpolate(images, size, mode="area")
    (rows, gh), (columns, gw) = (area_matrix(n, m, images.device)
                                 for n, m in zip(images.shape[2:], size))
    images = (images.unflatten(3, (gw, -1)) @ columns).flatten(3)  # (B, C, H, w)
    return (rows.T @ images.unflatten(2, (gh, -1))).flatten(2, 3)  # (B, C, h, w)


def center(whole, size):
    """The index of the central `size` = (h, w) in images of `whole` = (H, W) pixels."""
    return ..., *(slice((n - m) // 2, (n + m) // 2) for n, m in zip(whole, size))


def pixel_loss(prediction, target, counted=None, loss="mse"):
    """The loss of PIXEL_LOSS, averaged over the pixels of the patches that count."""
    error = PIXEL_LOSS[loss](prediction.float() - target)  # (B, N, p p C)
    return error.mean() if counted is None else (error.mean(2) * counted).sum() / counted.sum()


def frequency_weight(distance, alpha=1.0):
    """omega (A2 eq. 5): |dF|^alpha over its largest value in the image and channel, in [0, 1].
    distance: |dF|^2 (B, C, H, W').
    """
    largest = distance.amax((2, 3), keepdim=True).clamp(min=torch.finfo(distance.dtype).tiny)
    return (distance / largest).pow_(alpha / 2)


def focal_frequency(prediction, target, counted=None, alpha=1.0, batch_mean=False):
    """L_freq (A2 eq. 3-5, after Focal Frequency Loss, ICCV 2021): the mean of omega |dF|^2 over the
    images (B, C, H, W), their channels and frequencies.

    dF: the spectrum of [prediction where counted, *detached* prediction elsewhere] minus the
    target's, orthonormal: |dF|^2 is of the size of a pixel's square error.
    counted: (B or 1, 1, H, W) bool, None = all pixels. alpha 0: omega is 1 (A2 Table 5).
    # differs from the authors' code: theirs averages spectra over the batch (batch_mean), where
    # errors of its images cancel, blends half of the target into the visible pixels, and weighs by
    # a logarithm over one maximum of the batch. Its lambda is .1 for ViTs.
    # differs from the paper: eq. 3 is not orthonormal, eq. 4 writes a norm and sums, eq. 5 does not
    # scale omega. FFL, which it cites, has all four as here.
    """
    error = prediction.float() - target
    # By Parseval the sum of omega |dF|^2 is <error, G>, with G the inverse transform of omega dF.
    # omega is a constant: the gradient is 2 G, where the prediction is not detached.
    with torch.no_grad():
        compared = error.mean(0, keepdim=True) if batch_mean else error
        spectrum = torch.fft.rfft2(compared, norm="ortho")  # (B, C, H, W / 2 + 1)
        real = torch.view_as_real(spectrum)
        real *= frequency_weight(real[..., 0] ** 2 + real[..., 1] ** 2, alpha)[..., None]
        G = torch.fft.irfft2(spectrum, s=error.shape[2:], norm="ortho")
        value = (compared * G).mean()
        # 0 where it is not counted: the prediction is detached there
        G = (G if counted is None else G * counted).expand_as(error)
    slope = torch.dot(error.flatten(), G.flatten()) / error.numel()
    return value + 2 * (slope - slope.detach())  # adds 0 to the value, the gradient 2 G


def zoom_targets(view, size, p, counted=None, norm="patch", band_weight=0.5):
    """BM A.2's two terms as a picture of targets (B, C, V, V) and their weights (B, 1, V, V).

    Centre, `size` = (h, w): the input's patches, each normalised. Those that count share
    1 - band_weight. Outer band: the view shrunk to `size` (area), its patches normalised, then
    resized to the view (area). Its pixels share band_weight.
    """
    B, C, H, W = view.shape
    grid = [side // p for side in size]
    inner = center((H, W), size)

    def normalized(images):
        return unpatchify(normalize_patches(patchify(images, p), norm, C), p, grid)

    goal = resize_area(normalized(resize_area(view, size)), (H, W))
    goal[inner] = normalized(view[inner])
    weight = view.new_full((B, 1, H, W), band_weight / (B * C * (H * W - size[0] * size[1])))
    share = view.new_ones(B, 1, *grid) if counted is None else counted.view(B, 1, *grid).float()
    share = share * (1 - band_weight) / (share.sum() * C * p * p)
    weight[inner] = share.repeat_interleave(p, 2).repeat_interleave(p, 3)
    return goal, weight


def recovery_loss(prediction, target, size, p, counted=None, norm="patch", band_weight=0.5,
                  loss="mse", freq=(0.0, 1.0, False)):
    """The loss of every task: pixel loss + lambda * L_freq (A2 eq. 6).

    prediction (B, N, p p C): patches of a picture of `size` = (H, W). target (B, C, V, V): the
    picture to be recovered, normalised as the model's input is. If it is larger than `size`, the
    prediction is of all of it (BM A.2): it is resized to the target (area), and the error has a
    centre and a band term. The paper gives them no weights: they weigh alike.
    freq: lambda, and focal_frequency's alpha and batch_mean.
    # differs from the authors' code: its weights are .8 and .2, but its band term sums four strips'
    # means, about 4 times ours. In effect it weighs the terms alike, as ours.
    """
    prediction = prediction.float()
    grid = [side // p for side in size]
    picture = unpatchify(prediction, p, grid)
    if target.shape[2:] == tuple(size):
        goal = normalize_patches(patchify(target, p), norm, target.shape[1])
        spatial = pixel_loss(prediction, goal, counted, loss)
        goal = unpatchify(goal, p, grid)
        if counted is not None:
            counted = counted.view(-1, 1, *grid).repeat_interleave(p, 2).repeat_interleave(p, 3)
    else:
        goal, weight = zoom_targets(target, size, p, counted, norm, band_weight)
        picture = resize_area(picture, target.shape[2:])  # (B, C, V, V)
        spatial = (PIXEL_LOSS[loss](picture - goal) * weight).sum()
        counted = weight > 0
    strength, *how = freq
    if strength:
        spatial = spatial + strength * focal_frequency(picture, goal, counted, *how)
    return spatial


def recovered_picture(prediction, target, size, p, norm="patch"):
    """The inverse of recovery_loss's normalisation: a picture (B, C, V, V) to look at. Each
    patch's mean and deviation are the target's, and whoever shows it must say so.
    """
    grid = [side // p for side in size]
    whole = target.shape[2:]

    def restored(picture, reference):
        statistics = patch_statistics(patchify(reference, p), norm, target.shape[1])
        mean, std = (resize_area(unpatchify(x, p, grid), picture.shape[2:]) for x in statistics)
        return picture * std + mean

    picture = resize_area(unpatchify(prediction.float(), p, grid), whole)
    result = restored(picture, resize_area(target, size))
    inner = center(whole, size)
    result[inner] = restored(picture[inner], target[inner])
    return result
