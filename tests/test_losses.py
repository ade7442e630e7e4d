"""The normalised pixel target, L_MSE, the two terms of BM A.2; L_spa and L_freq of A2: against numpy on small pictures."""
import math

import numpy as np
import pytest
import torch

import losses as L


def picture(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def area(image, out):
    """'area' resizing of one channel by its definition: the mean over floor(i n / m) .. ceil((i + 1) n / m)."""
    n, m = len(image), out
    edges = [(i * n // m, math.ceil((i + 1) * n / m)) for i in range(m)]
    return np.array([[image[a:b, c:d].mean() for c, d in edges] for a, b in edges])


def test_patchify_by_hand():
    """Patches row by row; inside a patch pixel by pixel, channels last."""
    x = torch.arange(32.0).view(1, 2, 4, 4)
    patches = L.patchify(x, 2)
    assert patches.shape == (1, 4, 8)
    assert patches[0, 1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]


def test_patchify_and_unpatchify_are_inverse_on_non_square_images():
    x = picture(2, 3, 8, 20)
    assert torch.equal(L.unpatchify(L.patchify(x, 4), 4, (2, 5)), x)
    with pytest.raises(ValueError, match="8x20"):
        L.patchify(x, 3)


def test_normalised_target_is_maes():
    """Mean and (unbiased) deviation over all p p C values of a patch; per channel with norm = "channel"."""
    x = picture(2, 5, 12)
    n = x.numpy().astype(np.float64)
    want = (n - n.mean(2, keepdims=True)) / np.sqrt(n.var(2, ddof=1, keepdims=True) + 1e-6)
    assert np.allclose(L.normalize_patches(x), want, atol=1e-5)
    c = n.reshape(2, 5, 4, 3)
    want = (c - c.mean(2, keepdims=True)) / np.sqrt(c.var(2, ddof=1, keepdims=True) + 1e-6)
    assert np.allclose(L.normalize_patches(x, "channel"), want.reshape(2, 5, 12), atol=1e-4)
    assert torch.equal(L.normalize_patches(x, "off"), x)
    flat = L.normalize_patches(torch.full((1, 1, 12), 0.7))
    assert flat.abs().max() < 1e-3                              # a patch of one colour is all zeros, not NaN


def test_mse_is_averaged_over_the_patches_that_count():
    prediction, target = torch.tensor([[[1.0, 1], [3, 1], [0, 5]]]), torch.zeros(1, 3, 2)
    assert L.masked_mse(prediction, target).item() == pytest.approx((1 + 5 + 12.5) / 3)
    assert L.masked_mse(prediction, target, torch.tensor([[True, True, False]])).item() == pytest.approx(3)


def test_area_is_a_box_average():
    x = picture(1, 1, 8, 8)
    for side in (12, 5):
        assert np.allclose(L.resize_area(x, (side, side))[0, 0], area(x[0, 0].numpy(), side), atol=1e-6)


def test_the_two_regions_tile_the_view():
    """BM A.2: weights are positive on the band and on the hidden patches of the centre, nowhere else, and sum to one."""
    hidden = torch.tensor([[True, False, True, True], [True, True, True, False]])
    goal, weight = L.zoom_targets(picture(2, 3, 12, 12), (8, 8), 4, hidden)
    assert goal.shape == (2, 3, 12, 12) and weight.shape == (2, 1, 12, 12)
    band = torch.ones(12, 12, dtype=torch.bool)
    band[2:10, 2:10] = False
    assert (weight[:, 0] > 0).sum((1, 2)).tolist() == [80 + 48, 80 + 48] and band.sum() == 80
    assert 3 * weight.sum() == pytest.approx(1) and 3 * weight[:, 0, band].sum() == pytest.approx(0.2)
    assert (weight[0, 0, 2:6, 6:10] == 0).all() and (weight[1, 0, 6:10, 6:10] == 0).all()


def test_zoom_in_mask_loss_written_out():
    """BM A.2 in numpy for S = 8, V = 12, p = 4: centre term on hidden patches, band term, .8 and .2."""
    target, prediction = picture(1, 1, 12, 12), picture(1, 4, 16, seed=1)
    hidden = torch.tensor([[True, False, True, True]])
    t, p = target[0, 0].double().numpy(), L.unpatchify(prediction, 4, (2, 2))[0, 0].double().numpy()

    def normalised(image):                                      # 8x8, patch by patch
        out = np.zeros_like(image)
        for i in (0, 4):
            for j in (0, 4):
                patch = image[i:i + 4, j:j + 4]
                out[i:i + 4, j:j + 4] = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
        return out

    whole = area(p, 12)
    error = (whole[2:10, 2:10] - normalised(t[2:10, 2:10])) ** 2
    center = np.mean([error[:4, :4].mean(), error[4:, :4].mean(), error[4:, 4:].mean()])
    band = (whole - area(normalised(area(t, 8)), 12)) ** 2
    band[2:10, 2:10] = 0
    band = band.sum() / (144 - 64)
    for weight in (0.2, 0.0, 1.0):
        loss = L.recovery_loss(prediction, target, (8, 8), 4, hidden, band_weight=weight)
        assert loss.item() == pytest.approx((1 - weight) * center + weight * band, rel=1e-4)


def test_a_perfect_prediction_costs_nothing_and_the_picture_comes_back():
    view = picture(2, 3, 16, 24)
    perfect = L.normalize_patches(L.patchify(view, 8))
    assert L.recovery_loss(perfect, view, (16, 24), 8).item() == pytest.approx(0, abs=1e-10)
    for norm in ("patch", "channel", "off"):
        perfect = L.normalize_patches(L.patchify(view, 8), norm)
        assert torch.allclose(L.recovered_picture(perfect, view, (16, 24), 8, norm), view, atol=1e-5)


def test_the_picture_of_a_whole_view_borrows_from_the_input_and_from_the_shrunk_view():
    """What recovery_loss compares, times the deviation that was divided by: the centre's own patches', the shrunk view's outside."""
    view, prediction, size = picture(2, 3, 12, 12), picture(2, 4, 48, seed=1), (8, 8)
    whole, (goal, _) = L.resize_area(L.unpatchify(prediction, 4, (2, 2)), (12, 12)), L.zoom_targets(view, size, 4)
    mean, std = (L.resize_area(L.unpatchify(x, 4, (2, 2)), (12, 12)) for x in L.patch_statistics(L.patchify(L.resize_area(view, size), 4)))
    want = mean + whole * std
    inner, own = L.center_crop(view, size), L.patch_statistics(L.patchify(L.center_crop(view, size), 4))[1]
    L.center_crop(want, size)[:] = inner + L.center_crop(whole - goal, size) * L.unpatchify(own, 4, (2, 2))
    assert torch.allclose(L.recovered_picture(prediction, view, size, 4), want, atol=1e-5)


# A2 -------------------------------------------------------------------------------------------------------

def test_l_spa_counts_each_hidden_pixel_once():
    """A2 eq. 6: errors summed over hidden pixels, divided by how many pixels they are, and by nothing else."""
    x, y = picture(2, 4, 12), picture(2, 4, 12, seed=1)
    counted = torch.tensor([[True, False, False, True], [False, True, False, True]])
    by_hand = sum((x[b, n] - y[b, n]).abs().sum() for b in range(2) for n in range(4) if counted[b, n]) / (4 * 12)
    assert L.masked_l1(x, y, counted) == pytest.approx(float(by_hand), rel=1e-5)
    assert L.masked_l1(x, x + 1, counted) == pytest.approx(1) and L.masked_l1(x, y) == pytest.approx(float((x - y).abs().mean()), rel=1e-5)


def dft(x):
    """A2 eq. 3 by its sum, orthonormal: (H, W) -> (H, W) complex."""
    H, W = x.shape
    h, w = np.arange(H), np.arange(W)
    return np.array([[(x * np.exp(-2j * np.pi * (u * h[:, None] / H + v * w[None, :] / W))).sum() for v in range(W)] for u in range(H)]) / np.sqrt(H * W)


@pytest.mark.parametrize("size", [(8, 8), (6, 9), (5, 4)])
@pytest.mark.parametrize("alpha", [0, 0.5, 1, 2])
def test_focal_frequency_equals_a_direct_dft(alpha, size):
    """A2 eq. 3-5: per image and channel, omega |dF|^2 averaged over all H W frequencies."""
    x, y = picture(3, 2, *size), picture(3, 2, *size, seed=1)
    values = []
    for b in range(3):
        for c in range(2):
            distance = np.abs(dft(x[b, c].double().numpy()) - dft(y[b, c].double().numpy())) ** 2
            omega = distance ** (alpha / 2)
            values.append((omega / omega.max() * distance).mean())
    assert L.focal_frequency(x, y, alpha=alpha) == pytest.approx(np.mean(values), rel=1e-4)


def test_without_weighting_it_is_the_mean_square_error():
    """Parseval: an orthonormal spectrum has the picture's energy."""
    x, y = picture(2, 3, 8, 10), picture(2, 3, 8, 10, seed=1)
    assert L.focal_frequency(x, y, alpha=0) == pytest.approx(float((x - y).square().mean()), rel=1e-5)


def test_focal_frequency_of_equal_images_is_zero():
    x = picture(2, 3, 8, 8).requires_grad_()
    loss = L.focal_frequency(x, x.detach())
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


def test_its_gradient_is_only_where_hidden():
    """det(x_pred) (1 - M): visible pixels count in the value, but nothing is asked of them."""
    x, y = picture(2, 3, 8, 8).requires_grad_(), picture(2, 3, 8, 8, seed=1)
    hidden = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    hidden[0, :, :4], hidden[1, :, :, 4:] = True, True
    loss = L.focal_frequency(x, y, hidden)
    loss.backward()
    hidden = hidden.expand_as(x)
    assert (x.grad[hidden] != 0).all() and (x.grad[~hidden] == 0).all()
    assert loss == L.focal_frequency(x, y) and L.focal_frequency(torch.where(hidden, x, y), y) < loss


def test_the_spectrum_weight_is_in_0_1_and_has_no_gradient():
    """omega is 1 at the largest error of each image and channel; the gradient is that of omega |dF|^2 with omega fixed."""
    distance = picture(2, 3, 8, 5)
    for alpha in (0, 0.5, 1, 3):
        weight = L.frequency_weight(distance, alpha)
        assert weight.min() >= 0 and (weight.amax((2, 3)) == 1).all()
    x, y = picture(2, 2, 4, 5).double().requires_grad_(), picture(2, 2, 4, 5, seed=1).double()
    F = torch.fft.fft2(x - y, norm="ortho")
    omega = (F.abs() / F.abs().amax((2, 3), keepdim=True)).detach()
    value = (omega * (F.real ** 2 + F.imag ** 2)).mean()
    (want,) = torch.autograd.grad(3 * value, x)
    (grad,) = torch.autograd.grad(3 * L.focal_frequency(x, y), x)
    assert L.focal_frequency(x, y).item() == pytest.approx(value.item(), rel=1e-5) and torch.allclose(grad, want, rtol=1e-4, atol=1e-7)
    F = torch.fft.fft2((x - y).mean(0, keepdim=True), norm="ortho")                                    # the batch's mean
    omega = (F.abs() / F.abs().amax((2, 3), keepdim=True)).detach()
    value = (omega * (F.real ** 2 + F.imag ** 2)).mean()
    (want,), (grad,) = torch.autograd.grad(value, x), torch.autograd.grad(L.focal_frequency(x, y, batch_mean=True), x)
    assert L.focal_frequency(x, y, batch_mean=True).item() == pytest.approx(value.item(), rel=1e-5) and torch.allclose(grad, want, rtol=1e-4, atol=1e-7)


def test_errors_that_cancel_in_the_batch_average_are_seen_per_image():
    """One image too bright, the other too dark: the authors' averaged spectra are equal, the images are not."""
    y = picture(2, 3, 8, 8)
    x = y + torch.tensor([0.5, -0.5]).view(2, 1, 1, 1) * picture(1, 3, 8, 8, seed=1)
    assert L.focal_frequency(x, y, batch_mean=True) < 1e-10 < 1e-3 < L.focal_frequency(x, y)
    errors = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))                 # independent ones shrink with the batch
    per_image, averaged = (L.focal_frequency(errors, 0 * errors, alpha=0, batch_mean=b) for b in (False, True))
    assert averaged < per_image / 32


@pytest.mark.parametrize("norm", ["off", "patch"])
def test_the_whole_loss_is_eq_6(norm):
    """L = L_spa + lambda L_freq, in the pixels that are compared; without hidden patches over all of them."""
    target, prediction = picture(2, 3, 8, 8), picture(2, 4, 48, seed=1)
    hidden = torch.tensor([[True, False, True, True], [False, True, True, True]])
    goal = L.normalize_patches(L.patchify(target, 4), norm)
    pixels = hidden.view(2, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    for counted, where in ((hidden, pixels), (None, None)):
        want = L.masked_l1(prediction, goal, counted) + 0.7 * L.focal_frequency(L.unpatchify(prediction, 4, (2, 2)), L.unpatchify(goal, 4, (2, 2)), where, 2)
        got = L.recovery_loss(prediction, target, (8, 8), 4, counted, norm, loss="l1", freq_weight=0.7, freq_alpha=2)
        assert got == pytest.approx(float(want), rel=1e-5)


def test_a_whole_view_takes_every_distance():
    """BM A.2's two terms with A2's losses: gradient on the band and the hidden patches of the centre, zero where it is right."""
    target, counted = picture(1, 3, 12, 12), torch.tensor([[True, False, False, True]])
    for loss in ("mse", "l1"):
        prediction = picture(1, 4, 48, seed=1)
        values = [L.recovery_loss(prediction, target, (8, 8), 4, counted, "off", loss=loss, freq_weight=w) for w in (0, 1)]
        whole, (goal, weight) = L.resize_area(L.unpatchify(prediction, 4, (2, 2)), (12, 12)), L.zoom_targets(target, (8, 8), 4, counted, "off")
        error = (whole - goal).abs() if loss == "l1" else (whole - goal) ** 2
        assert values[0] == pytest.approx(float((error * weight).sum()), rel=1e-5)
        assert values[1] - values[0] == pytest.approx(float(L.focal_frequency(whole, goal, weight > 0)), rel=1e-4)
    prediction.requires_grad_()
    gradients = [torch.autograd.grad(L.recovery_loss(prediction, target, (8, 8), 4, counted, "off", freq_weight=w), prediction)[0] for w in (0, 1)]
    visible = L.patchify(L.resize_area((weight == 0).float(), (8, 8)), 4).repeat_interleave(3, 2) == 1         # of the prediction, wholly in visible patches
    assert visible.any() and all((g[visible] == 0).all() and (g[~visible] != 0).all() for g in gradients)


def test_frequencies_are_float32_under_autocast():
    x, y = picture(2, 4, 48).bfloat16(), picture(2, 3, 8, 8, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = L.recovery_loss(x, y, (8, 8), 4, loss="l1", norm="off", freq_weight=1)
    assert loss.dtype == torch.float32
