"""The normalised pixel target, L_MSE, and the two terms of BM A.2, against numpy on small pictures."""
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
    """A.2: weights are positive on the band and on the hidden patches of the centre, nowhere else, and sum to one."""
    hidden = torch.tensor([[True, False, True, True], [True, True, True, False]])
    goal, weight = L.zoom_targets(picture(2, 3, 12, 12), (8, 8), 4, hidden)
    assert goal.shape == (2, 3, 12, 12) and weight.shape == (2, 1, 12, 12)
    band = torch.ones(12, 12, dtype=torch.bool)
    band[2:10, 2:10] = False
    assert (weight[:, 0] > 0).sum((1, 2)).tolist() == [80 + 48, 80 + 48] and band.sum() == 80
    assert 3 * weight.sum() == pytest.approx(1) and 3 * weight[:, 0, band].sum() == pytest.approx(0.2)
    assert (weight[0, 0, 2:6, 6:10] == 0).all() and (weight[1, 0, 6:10, 6:10] == 0).all()


def test_zoom_in_mask_loss_written_out():
    """A.2 in numpy for S = 8, V = 12, p = 4: centre term on hidden patches, band term, .8 and .2."""
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


def test_the_loss_is_float32_under_autocast():
    view = picture(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = L.recovery_loss(torch.zeros(2, 4, 192, dtype=torch.bfloat16), view, (16, 16), 8)
    assert loss.dtype == torch.float32
