"""One function per equation of *Beyond Masking* (BM) and *A2MIM* (A2). Predictions and targets in, one number out,
in float32 (outside autocast, which would bring some of it down to its own precision).

Patches are (B, N, p p C), a row of the picture at a time, channels last inside a patch (MAE's order).
Images are (B, C, H, W). counted (B, N) bool: the patches whose error is averaged; None = all of them.
"""
import math

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
    mean = x.mean(2, keepdim=True)                                                     # (B, N, 1, C or 1)
    std = ((x - mean).square().sum(2, keepdim=True) / (x.shape[2] - 1) + 1e-6).sqrt()  # n - 1, as MAE
    if norm == "off":
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    return mean.expand_as(x).flatten(2), std.expand_as(x).flatten(2)


def normalize_patches(patches, norm="patch", channels=3):
    """The normalised pixel target (MAE): each patch minus its own mean, divided by its own deviation."""
    if norm == "off":
        return patches
    mean, std = patch_statistics(patches, norm, channels)
    return (patches - mean) / std


def _area_weights(n, m, like):
    """'area' from n to m pixels repeats gcd(n, m) times: an (m / g, n / g) matrix and how often it applies, g.

    Two periods at once where they pair up: 20 x 14 for 224 -> 320 is faster than 10 x 7.
    """
    g = math.gcd(n, m)
    g = g // 2 if g % 2 == 0 else g
    eye = torch.eye(n // g, dtype=like.dtype, device=like.device)
    return F.interpolate(eye[None, None], (m // g, n // g), mode="area")[0, 0], g


def resize_area(images, size):
    """(B, C, H, W) -> (B, C, *size), F.interpolate's mode 'area' (BM A.2): every output pixel is a box average.

    As two small matrix products, one a direction: the same numbers to rounding in half the time on a CPU.
    """
    if images.shape[2:] == tuple(size):
        return images
    rows, gh = _area_weights(images.shape[2], size[0], images)
    columns, gw = _area_weights(images.shape[3], size[1], images)
    images = F.linear(images.unflatten(3, (gw, -1)), columns).flatten(3)               # (B, C, H, w)
    return (rows @ images.unflatten(2, (gh, -1))).flatten(2, 3)                        # (B, C, h, w)


def center_crop(images, size):
    """The central size = (h, w) of (B, C, H, W)."""
    (H, W), (h, w) = images.shape[2:], size
    return images[:, :, (H - h) // 2:(H + h) // 2, (W - w) // 2:(W + w) // 2]


def masked_mse(prediction, target, counted=None):
    """L_MSE (BM section 3.1) over patches (B, N, p p C): mean square of each, averaged over those that count."""
    if counted is None:
        return F.mse_loss(prediction.float(), target)
    error = (prediction.float() - target).square().mean(2)                             # (B, N)
    return (error * counted).sum() / counted.sum()


def masked_l1(prediction, target, counted=None):
    """L_spa (A2 eq. 6, SimMIM's loss) over patches (B, N, p p C): |x_pred - x|, averaged over the pixels that count."""
    error = (prediction.float() - target).abs().mean(2)                                # (B, N)
    return error.mean() if counted is None else (error * counted).sum() / counted.sum()


def frequency_weight(distance, alpha=1.0):
    """omega (A2 eq. 5) for |dF|^2 (B, C, H, W'): |dF|^alpha over its largest value in the image and channel, in [0, 1]."""
    share = distance / distance.amax((2, 3), keepdim=True).clamp(min=torch.finfo(distance.dtype).tiny)
    return share.sqrt_() if alpha == 1 else share.pow_(alpha / 2)


class _FocalFrequency(torch.autograd.Function):
    """sum omega |dF|^2. omega counts as a constant, so with G the inverse transform of omega dF the gradient is 2 G, and by
    Parseval the sum is <difference, G>. One transform there and one back, and little kept.
    """

    @staticmethod
    def forward(ctx, prediction, target, counted, alpha, batch_mean):
        difference = prediction - target
        if batch_mean:                                                                 # transforms are linear
            difference = difference.mean(0, keepdim=True)
        spectrum = torch.fft.rfft2(difference, norm="ortho")                           # dF: (B, C, H, W / 2 + 1), by symmetry all
        real, imaginary = torch.view_as_real(spectrum).unbind(4)
        weight = frequency_weight(real.square().addcmul_(imaginary, imaginary), alpha)
        torch.view_as_real(spectrum).mul_(weight[..., None])
        filtered = torch.fft.irfft2(spectrum, s=difference.shape[2:], norm="ortho")    # (B, C, H, W)
        value = torch.dot(difference.flatten(), filtered.flatten()) / difference.numel()
        ctx.save_for_backward(filtered if counted is None else filtered * counted)
        ctx.share, ctx.shape = 2 / prediction.numel(), prediction.shape
        return value

    @staticmethod
    def backward(ctx, scale):
        return (ctx.saved_tensors[0] * (scale * ctx.share)).expand(ctx.shape), None, None, None, None


def focal_frequency(prediction, target, counted=None, alpha=1.0, batch_mean=False):
    """L_freq (A2 eq. 3-5, after Focal Frequency Loss, ICCV 2021): a scalar; prediction and target (B, C, H, W).

    The spectrum of [prediction where counted, *detached* prediction elsewhere] against the target's: omega |dF|^2,
    averaged over frequencies, channels and images. Orthonormal, so that |dF|^2 is of the size of a pixel's square error.
    counted: (B or 1, 1, H, W) bool, None = all pixels. alpha 0: omega is 1 everywhere (A2 Table 5, "w/o omega").
    batch_mean: compare spectra averaged over the batch (of one process), where errors of different images cancel.
    # differs from the authors' code: that is theirs; and it blends half of the target into the visible pixels.
    # differs from the paper: eq. 3 is not orthonormal, eq. 4 writes a norm and sums, eq. 5 does not scale omega. Its text
    # says mean square error, and FFL, which it cites, has all four as they are here; lambda is meant for these.
    """
    return _FocalFrequency.apply(prediction.float(), target, counted, alpha, batch_mean)


def zoom_targets(view, size, p, counted=None, norm="patch", band_weight=0.2):
    """BM A.2's two terms as one picture of targets and one of weights that sum to 1: (B, C, V, V) and (B, 1, V, V).

    Centre, `size` = (h, w): the input's own patches, each normalised; the patches that count (B, N) share
    1 - band_weight. Outer band: the view shrunk to `size` (area), its patches normalised there, put together
    again and resized to the view (area); its pixels share band_weight.
    """
    (B, C, H, W), grid = view.shape, [side // p for side in size]

    def normalized(images):
        return unpatchify(normalize_patches(patchify(images, p), norm, C), p, grid)

    goal = resize_area(normalized(resize_area(view, size)), (H, W))
    center_crop(goal, size)[:] = normalized(center_crop(view, size))
    weight = view.new_full((B, 1, H, W), band_weight / (B * C * (H * W - size[0] * size[1])))
    counts = view.new_ones(B, 1, *grid) if counted is None else counted.view(B, 1, *grid).to(view.dtype)
    counts = counts * (1 - band_weight) / (counts.sum() * C * p * p)
    center_crop(weight, size)[:] = counts.repeat_interleave(p, 2).repeat_interleave(p, 3)
    return goal, weight


def recovery_loss(prediction, target, size, p, counted=None, norm="patch", band_weight=0.2,
                  loss="mse", freq_weight=0.0, freq_alpha=1.0, freq_batch_mean=False):
    """The loss of every pre-training task: distance in pixels + freq_weight * distance in frequencies (A2 eq. 6).

    prediction (B, N, p p C): patches of a picture of `size` = (H, W). target (B, C, V, V): the picture to be
    recovered, normalised as the model's input is. When it is larger than `size` the prediction means the
    whole of it at the input's resolution (BM A.2): it is resized to the view (area), and its error has a centre
    and a band term. The paper gives them no weights; .8 and .2 are the authors' code's.
    # differs from the authors' code: its band term is the sum of four strips' means, ours the mean over the band, about a
    # quarter of it: in effect it weighs the two terms alike, as band_weight 0.5 does.
    loss: "mse" (BM) or "l1" (A2). The frequencies are those of the picture and the normalisation that are compared.
    """
    prediction, grid = prediction.float(), [side // p for side in size]
    if tuple(target.shape[2:]) == tuple(size):
        goal = normalize_patches(patchify(target, p), norm, target.shape[1])
        spatial = {"mse": masked_mse, "l1": masked_l1}[loss](prediction, goal, counted)
        if freq_weight:
            prediction, goal = unpatchify(prediction, p, grid), target if norm == "off" else unpatchify(goal, p, grid)
            counted = None if counted is None else counted.view(-1, 1, *grid).repeat_interleave(p, 2).repeat_interleave(p, 3)
    else:
        goal, weight = zoom_targets(target, size, p, counted, norm, band_weight)
        prediction = resize_area(unpatchify(prediction, p, grid), target.shape[2:])    # (B, C, V, V)
        error = prediction - goal
        spatial = ((error.square() if loss == "mse" else error.abs()) * weight).sum()
        counted = weight > 0
    if not freq_weight:
        return spatial
    return spatial + freq_weight * focal_frequency(prediction, goal, counted, freq_alpha, freq_batch_mean)


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
