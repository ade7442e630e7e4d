"""The normalised target, BM A.2's two terms, A2's L_spa and L_freq: by hand on small pictures."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import degrade
import losses as L
import pretrain
from conftest import close, picture


def area(images, size):
    return F.interpolate(images, size, mode="area")


def test_patchify():
    """Patches row by row, their pixels row by row, channels last. unpatchify is its inverse."""
    x = torch.arange(48.0).view(1, 2, 4, 6)
    patches = L.patchify(x, 2)
    assert patches[0, 1].tolist() == [2, 26, 3, 27, 8, 32, 9, 33]
    assert torch.equal(L.unpatchify(patches, 2, (2, 3)), x)


@pytest.mark.parametrize("norm, shape", [("patch", (2, 5, 12, 1)), ("channel", (2, 5, 4, 3))])
def test_normalised_target(norm, shape):
    """MAE: (x - mean) / deviation over all p p C values of a patch; or per channel of it."""
    x = picture(*shape)
    want = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True) + 1e-6).sqrt()
    got = L.normalize_patches(x.flatten(2), norm)
    assert close(got, want.flatten(2), 1e-4)
    assert L.normalize_patches(torch.full((1, 1, 12), 0.7), norm).abs().max() < 1e-3


@pytest.mark.parametrize("loss, each", [("mse", [1, 5, 12.5]), ("l1", [1, 2, 2.5])])
def test_pixel_loss_is_averaged_over_what_counts(loss, each):
    """L_MSE (BM 3.1) and L_spa (A2 eq. 6)."""
    prediction, target = torch.tensor([[[1.0, -1], [3, 1], [0, 5]]]), torch.zeros(1, 3, 2)
    for counted, n in ((None, 3), (torch.tensor([[True, True, False]]), 2)):
        got = L.pixel_loss(prediction, target, counted, loss)
        assert got == pytest.approx(sum(each[:n]) / n)


@pytest.mark.parametrize("old, new", [
    ([224, 224], [320, 320]), ([320, 320], [224, 224]), ([8, 12], [12, 8]), ([7, 9], [5, 11])])
def test_resize_area_is_torchs(old, new):
    x = picture(2, 3, *old)
    assert close(L.resize_area(x, new), area(x, new), 1e-6)


def test_resize_area_has_a_gradient_after_inference_mode():
    with torch.inference_mode():
        L.resize_area(picture(1, 1, 10, 10), (15, 15))
    x = picture(1, 1, 10, 10).requires_grad_()
    L.resize_area(x, (15, 15)).sum().backward()
    assert x.grad.sum() == pytest.approx(15 * 15, rel=1e-4)


def normalized(images):
    """(B, C, H, W) -> each 4 x 4 patch minus its mean, over its deviation."""
    x = images.unflatten(3, (-1, 4)).unflatten(2, (-1, 4))  # (B, C, H / 4, 4, W / 4, 4)
    mean, variance = (f((1, 3, 5), keepdim=True) for f in (x.mean, x.var))
    return ((x - mean) / (variance + 1e-6).sqrt()).flatten(4).flatten(2, 3)


@pytest.mark.parametrize("norm", ["patch", "channel", "off"])
def test_the_picture_of_a_larger_view_borrows_each_patchs_mean_and_deviation(norm):
    """The centre's of the input, the band's of the shrunk view."""
    view, prediction = picture(2, 3, 16, 16), picture(2, 4, 48, seed=1)
    inner, want = (..., slice(4, 12), slice(4, 12)), L.unpatchify(prediction, 4, (2, 2))

    def restored(picture, images):
        mean, std = (area(L.unpatchify(x, 4, (2, 2)), picture.shape[2:])
                     for x in L.patch_statistics(L.patchify(images, 4), norm))
        return picture * std + mean
    whole = area(want, (16, 16))
    want = restored(whole, area(view, (8, 8)))
    want[inner] = restored(whole[inner], view[inner])
    assert close(L.recovered_picture(prediction, view, (8, 8), 4, norm), want)


@pytest.mark.parametrize("loss, distance", [("mse", torch.square), ("l1", torch.abs)])
@pytest.mark.parametrize("band_weight", [0, 0.2, 0.5, 1])
def test_zoom_in_mask_by_hand(loss, distance, band_weight):
    """BM A.2 for S = 8 x 12, V = 12 x 20, p = 4. Term 1: the centre of the resized prediction,
    where hidden, against the normalised input. Term 2: the band against the normalised shrunk view.
    """
    size, whole = (8, 12), (12, 20)
    inner = (..., slice(2, 10), slice(4, 16))
    view, prediction = picture(2, 3, *whole), picture(2, 6, 48, seed=1)
    hidden = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]]).bool()
    resized = area(L.unpatchify(prediction, 4, (2, 3)), whole)
    error = distance(resized[inner] - normalized(view[inner]))
    center = L.patchify(error, 4)[hidden].mean()
    error = distance(resized - area(normalized(area(view, size)), whole))
    error[inner] = 0
    band = error.sum() / (2 * 3 * (12 * 20 - 8 * 12))
    want = (1 - band_weight) * center + band_weight * band
    got = L.recovery_loss(prediction, view, size, 4, hidden, band_weight=band_weight, loss=loss)
    assert got == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("task", degrade.TASKS)
def test_every_task_takes_any_distance(task, monkeypatch):
    """Also a new line of PIXEL_LOSS, on the command line too."""
    monkeypatch.setitem(L.PIXEL_LOSS, "nearly l1", lambda e: (e * e + 1e-6).sqrt())
    assert pretrain.options(["--task", task, "--loss", "nearly l1"]).loss == "nearly l1"
    view, prediction = picture(2, 3, *degrade.view_size(task, 32)), picture(2, 16, 192)
    d = degrade.degrade(view, task, 32, 8)
    l1, near, mse = (L.recovery_loss(prediction, d.target, (32, 32), 8, d.counted, loss=name)
                     for name in ("l1", "nearly l1", "mse"))
    assert 0 < near - l1 < 1e-3 < abs(near - mse)


def dft(x):
    """A2 eq. 3 by its sum, orthonormal: (..., H, W)."""
    H, W = x.shape[-2:]
    rows, columns = (np.exp(-2j * np.pi / n * np.outer(range(n), range(n))) for n in (H, W))
    return rows @ x @ columns / np.sqrt(H * W)


@pytest.mark.parametrize("size", [(4, 4), (6, 5), (5, 6)])
@pytest.mark.parametrize("alpha", [0, 0.5, 1, 2])
@pytest.mark.parametrize("batch_mean", [False, True])
def test_focal_frequency_by_hand(size, alpha, batch_mean):
    """A2 eq. 3-5: omega |dF|^2 with omega = |dF|^alpha over its largest in each image and channel.
    batch_mean: of the batch's mean spectra.
    """
    x, y = picture(3, 2, *size), picture(3, 2, *size, seed=1)
    distance = dft(x.double().numpy()) - dft(y.double().numpy())
    distance = abs(distance.mean(0) if batch_mean else distance)
    omega = (distance / distance.max((-2, -1), keepdims=True)) ** alpha
    got = L.focal_frequency(x, y, alpha=alpha, batch_mean=batch_mean)
    assert got == pytest.approx((omega * distance ** 2).mean(), rel=1e-4)


def test_errors_that_cancel_in_a_batch_are_seen_image_by_image():
    """In the mean spectrum of the authors' code they do not count."""
    target, error = picture(1, 3, 8, 8), picture(1, 3, 8, 8, seed=1)
    prediction = torch.cat([target + error, target - error])
    alone, mean = (L.focal_frequency(prediction, target, batch_mean=x) for x in (False, True))
    assert mean < 1e-6 < 1e-3 < alone


@pytest.mark.parametrize("batch_mean", [False, True])
def test_gradient_of_focal_frequency(batch_mean):
    """That of omega |dF|^2, omega constant, at hidden pixels. Visible ones count, but detached."""
    x, y = picture(2, 3, 8, 6).requires_grad_(), picture(2, 3, 8, 6, seed=1)
    hidden = (torch.arange(8) < 3)[:, None].expand(2, 1, 8, 6)
    error = torch.where(hidden, x, x.detach()) - y
    size = torch.fft.fft2(error.mean(0, keepdim=True) if batch_mean else error, norm="ortho").abs()
    omega = size.detach() / size.detach().amax((2, 3), keepdim=True)
    want = (omega * size.square()).mean()
    got = L.focal_frequency(x, y, hidden, batch_mean=batch_mean)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    (want,), (got,) = (torch.autograd.grad(value, x) for value in (want, got))
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-7)
    assert got[:, :, 3:].abs().max() == 0


@pytest.mark.parametrize("V, rows, columns", [(8, slice(0, 4), slice(4, 8)),
                                              (12, slice(2, 4), slice(4, 6))])
def test_the_whole_loss_asks_nothing_of_visible_pixels(V, rows, columns):
    """A2 eq. 6. The gradient is zero within the visible patch, of the centre if V > S, only."""
    view, prediction = picture(1, 3, V, V), picture(1, 4, 48, seed=1).requires_grad_()
    hidden = torch.tensor([[True, False, True, True]])
    spatial, total = (L.recovery_loss(prediction, view, (8, 8), 4, hidden, "off", 0.2, "l1", freq)
                      for freq in ((0, 2, False), (0.7, 2, False)))
    goal = view if V == 8 else L.zoom_targets(view, (8, 8), 4, norm="off")[0]
    whole = area(L.unpatchify(prediction, 4, (2, 2)), V)
    frequency = L.focal_frequency(whole, goal, alpha=2)
    assert total.item() == pytest.approx((spatial + 0.7 * frequency).item(), rel=1e-5)
    zero = torch.zeros(1, 3, 8, 8) > 0
    zero[:, :, rows, columns] = True
    (gradient,) = torch.autograd.grad(total, prediction)
    assert torch.equal(L.unpatchify(gradient, 4, (2, 2)) == 0, zero)


@pytest.mark.parametrize("norm", ["patch", "channel", "off"])
def test_a_perfect_prediction_costs_nothing_and_is_the_picture(norm):
    view = picture(2, 3, 8, 12)
    perfect = L.normalize_patches(L.patchify(view, 4), norm)
    assert L.recovery_loss(perfect, view, (8, 12), 4, norm=norm) < 1e-9
    assert close(L.recovered_picture(perfect, view, (8, 12), 4, norm), view)
    freq = 1, 1, False  # no weight is 0 / 0
    assert L.recovery_loss(perfect, view, (8, 12), 4, norm=norm, freq=freq) < 1e-9
