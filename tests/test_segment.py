"""A class for every pixel (BM 4.4, A2 5.3): pyramids, UperNet, scenes, ADE20K's layout, IoU."""
import functools
from argparse import Namespace
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
import models
import pretrain
from conftest import (DENSE, ONE, a_run_on_scenes, close, command, commands_of_the_readme,
                      gradients_of, json_of, loaded, stopped_and_resumed, together)

SMALL = [*"--head segment --width 8".split(), *DENSE]


@pytest.fixture
def ade(tmp_path):
    """ADE20K's layout: nine and five images of two sizes, 1 above and 2 below, 0 at the left."""
    for split, n in (("training", 9), ("validation", 5)):
        for i in range(n):
            h, w = (40, 60) if i % 2 else (50, 40)
            labels = np.ones((h, w), np.uint8)
            labels[h // 2:], labels[:, :5] = 2, 0
            for kind, pixels in (("images", labels * 90), ("annotations", labels)):
                folder = tmp_path / "images" / "ade" / kind / split
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images" / "ade"


def segment(*argv):
    return command(finetune, *SMALL, *argv)


@pytest.fixture
def refused(refused):
    return functools.partial(refused, " ".join(SMALL), module=finetune)


# --- Models ---

def test_positions_are_resized_to_the_image():
    """A model takes an image of another size as a model of that size with the same weights does."""
    small = models.encoder("vit_micro", 32, 8, relative_positions=True).eval()
    for block in small.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
    other = models.encoder("vit_micro", (24, 40), 8, relative_positions=True).eval()
    models.load_weights(other, small.state_dict())
    x = torch.rand(2, 3, 24, 40)
    assert close(small(x), other(x))


@pytest.mark.parametrize("name, layers", [
    ("vit_micro", (2, 3, 4)), ("vit_tiny", (4, 6, 8)), ("resnet18", (1, 2, 3))])
def test_the_maps_of_a_pyramid(name, layers):
    """A ViT's behind a third, a half, two thirds of its blocks, and its last; a ResNet's stages."""
    model, images, seen = models.encoder(name, 32, 16), torch.rand(1, 3, 32, 64), {}
    last = model.encode(images, after=seen.setdefault)
    maps = model.maps(images)
    for z, want in zip(maps, [*map(seen.get, layers), last], strict=True):
        if model.tokens:
            want = want[:, 1:].transpose(1, 2).unflatten(2, (2, 4))
        assert torch.equal(z, want)
    assert maps[3].shape[2:] == ((2, 4) if model.tokens else (1, 2))


@pytest.mark.parametrize("name", ["vit_micro", "resnet18"])
def test_upernet_scores_every_pixel_and_trains_every_parameter(name):
    """Of images that are no whole number of patches."""
    model = models.UperNet(models.encoder(name, 32, 8), 5, 8)
    x = torch.rand(2, 3, 44, 70)
    scores, auxiliary = model(x)
    assert scores.shape == auxiliary.shape == (2, 5, 44, 70)
    (scores.square().mean() + auxiliary.square().mean()).backward()
    for parameter, x in model.named_parameters():
        if not parameter.endswith("pos_embed"):
            assert x.grad.isfinite().all() and x.grad.any(), parameter
    maps = model.pyramid(torch.rand(1, 3, 64, 96))
    strides = (4, 8, 16, 32) if name == "resnet18" else (2, 4, 8, 16)
    assert [tuple(z.shape[2:]) for z in maps] == [(64 // s, 96 // s) for s in strides]


def test_upernet_sums_from_the_top_down_and_then_smooths():
    """What goes down is the sum itself, as in a feature pyramid."""
    model, lateral, summed = models.UperNet(models.encoder("resnet18", 64, 8), 5, 8), [], []
    for layer, smooth in zip(model.lateral, model.smooth):
        layer.register_forward_hook(lambda _, x, y: lateral.append(y))
        smooth.register_forward_hook(lambda _, x, y: summed.append(x[0]))
    model.top.register_forward_hook(lambda _, x, y: summed.append(y))
    model(torch.rand(2, 3, 64, 64))
    for above, z, side in zip(summed, summed[1:], lateral):
        above = torch.nn.functional.interpolate(above, side.shape[2:], mode="bilinear")
        assert torch.allclose(z, side + above)


@pytest.mark.parametrize("head", [
    lambda encoder: models.UperNet(encoder, 5, 8),
    lambda encoder: models.Detector(encoder, 5, 32, 64, "fpn", 16, 16)])
def test_drop_path_and_layer_decay_reach_the_encoder(head, monkeypatch):
    """A2 A.1: embeddings decay^(L + 1), block l of 1 .. L decay^(L + 1 - l), the rest 1."""
    encoder = models.encoder("vit_micro", 32, 8)
    model, seen, drop, real = head(encoder).eval(), [], torch.ones(2, 12), encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda images, after, drop: (
        seen.append(drop), real(images, after=after, drop=drop))[1])
    with torch.no_grad():
        model(torch.rand(2, 3, 32, 32), drop)
    assert seen == [drop]
    scale = finetune.layer_scale(model, 0.5)
    for name, _ in model.named_parameters():
        l = int(name.split("blocks.")[1].split(".")[0]) + 1 if "blocks." in name else 0
        l = l if "encoder." in name and "encoder.norm" not in name else 7
        assert scale(name) == 0.5 ** (7 - l), name


# --- What is measured ---

def test_the_loss_by_hand():
    """Over all pixels: those without a label count 0. A2's code: .4 of the auxiliary one."""
    scores, labels = torch.randn(2, 2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    labels[0, :, :3] = 255
    odds = scores.log_softmax(2).gather(2, labels.clamp(max=2).expand(2, 2, 4, 5).unsqueeze(2))
    main, auxiliary = (-(x[:, 0] * (labels != 255)).mean() for x in odds)
    got = finetune.segment_loss(scores, labels, Namespace(auxiliary=0.4))
    assert got.item() == pytest.approx((main + 0.4 * auxiliary).item(), rel=1e-5)


def test_a_class_is_the_highest_score_at_the_images_own_size():
    seen, images = [], torch.zeros(2, 4, 20, 40, dtype=torch.uint8)
    images[:, 0, :, :20] = images[:, 1, :, 20:] = 255  # red, green
    found = finetune.classes_of(lambda x: (seen.append(x), x)[1], images,
                                Namespace(img_size=[10, 10]), torch.device("cpu"), nullcontext)
    assert seen[0].shape == (2, 3, 10, 20) and seen[0].max() <= 1
    assert (found[:, :, :18] == 0).all() and (found[:, :, 22:] == 1).all()


def test_mean_iou_by_hand():
    """The third class is neither there nor found, and is left out. Rows are the truth."""
    found = finetune.iou(torch.tensor([[6.0, 2, 0], [1, 3, 0], [0, 0, 0]]))
    assert found == dict(miou=round(100 * (6 / 9 + 3 / 6) / 2, 2), pixel_accuracy=75)


def test_a_perfect_prediction_scores_100(ade, monkeypatch):
    """What is not labelled does not count: there a wrong class is found."""
    def right(model, images, *_):
        return torch.where(images[:, 3] == 255, 0, images[:, 3]).long()
    monkeypatch.setattr(finetune, "classes_of", right)
    data = finetune.PixelSet(str(ade), False, 7)
    found = finetune.evaluate_pixels(torch.nn.Identity(), data, Namespace(workers=2), ONE, None)
    assert found == dict(miou=100, pixel_accuracy=100, images=5)


# --- Data ---

def test_scenes():
    """The same seed draws the same, in any order. The front shape hides the others."""
    first, again = (pretrain.Scenes(40, 32, seed=0) for _ in range(2))
    images = first.drawn(torch.arange(40))
    assert torch.equal(again.drawn(torch.tensor([7, 3])), images[[7, 3]])
    assert (images[:, 3].amax((1, 2)) <= first.counts).all()
    assert first.counts.unique().tolist() == [1, 2, 3, 4]
    for i in range(40):
        n = int(first.counts[i])
        r, outline = first.numbers[i, n - 1], [*pretrain.SHAPES.values()][first.kinds[i, n - 1]]
        r = r[:, None, None, None]
        _, seen = pretrain.draw_shapes([(outline, r, 0.2 + 0.4 * r[0])], 32)
        assert torch.equal(images[i, 3] == n, seen[0, 0] == 1)


def test_classes_are_read_and_scaled_with_their_images(ade):
    """0 is not labelled. Padding is not, either. Nothing between two classes appears."""
    data = finetune.PixelSet(str(ade), True, 7)
    assert len(data) == 9
    image = data.read(1)
    assert image[3].unique().tolist() == [0, 1, 255]
    kinds = (torch.arange(60) // 20).expand(40, 60)
    bands = torch.stack([90 * kinds] * 3 + [kinds]).byte()  # pixels that say their class
    for epoch in range(20):
        view = data.view(image, 1, epoch, (32, 48), (0.5, 2.0), 0)
        assert view.shape == (4, 32, 48) and {*view[3].unique().tolist()} <= {0, 1, 255}
        again = data.view(image, 1, epoch, (32, 48), (0.5, 2.0), 0)
        assert torch.equal(view, again)
        view = data.view(bands, 1, epoch, (32, 48), (0.75, 2.0), 0)
        apart = (view[0].float() - 90 * view[3])[view[3] != 255].abs()
        assert apart.mean() < 6  # but for edges
    view = data.view(image, 1, 0, (32, 48), (0.2, 0.2), 0)
    assert (view[3] == 255).float().mean() > 0.9  # it is shrunk to 6 pixels
    assert view[:3, 31, 24].tolist() == [123, 116, 103]  # the mean colour around it
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    where = torch.stack([y, x, x, x]).byte()  # the image says the place
    found = [data.view(where, 1, epoch, (32, 32), (2.0, 2.0), 0) for epoch in range(60)]
    top, left = ([int(view[i].min()) for view in found] for i in (0, 1))
    assert min(len({*top}), len({*left})) > 15 and top != left
    assert 15 < sum(int(view[1, 0, 0]) > int(view[1, 0, -1]) for view in found) < 45  # flipped


def test_a_label_map_that_does_not_fit_is_named(ade, refused):
    """One of five is more than 1%: the run stops."""
    Image.fromarray(np.full((50, 40), 9, np.uint8)).save(ade / "annotations/validation/0.png")
    said = refused("--num_classes", 7, code=1, data=ade)
    assert "annotations/validation/0.png is (50, 40) of 0 .. 9" in said and "7 classes" in said


@pytest.mark.parametrize("flags, says", [
    ("--labels 3", "--labels"), ("--num_classes 300", "at most 255"),
    ("--batch_size 1", "more than 1 value per channel"),
    ("--data shapes", "nor a folder with images/ and annotations/"),
    ("--eval --weights none", "has no head for"),
    ("--model resnet18 --img_size 64 --layer_decay 0.5", "unrecognized arguments: --layer_decay")])
def test_what_is_refused(flags, says, few_scenes, refused):
    assert says in refused(*flags.split())


@pytest.mark.parametrize("turned, code", [(0, 0), (6, 1)])
def test_an_image_that_exif_turns_is_named(turned, code, ade, tmp_path, capfd):
    """0 says that it is not known."""
    path, exif = ade / "images/validation/0.png", Image.Exif()
    exif[0x0112] = turned
    with Image.open(path) as image:
        image.save(path, exif=exif)
    assert segment("--data", ade, "--num_classes", 7, "--steps", 1, "--out", tmp_path) == code
    assert ("images/validation/0.png: EXIF turns it" in capfd.readouterr().err) == bool(code)


def test_a_long_image_is_shown_four_times_as_long_as_high():
    """At most: 2048 to 512 in the codes for ADE20K."""
    for height, width, shown in ((10, 30, (16, 48)), (1, 100, (1, 64)), (200, 8, (64, 3))):
        assert models.to_short_side(torch.rand(1, 3, height, width), 16).shape[2:] == shown


def test_an_image_without_annotation_is_refused(ade, refused):
    """Before anything is trained. Pre-training does not take annotations for images."""
    assert len(loaded(ade)) == 9
    (ade / "annotations/validation/3.png").unlink()
    assert "annotations/validation/3.png" in refused(data=ade)


def test_the_last_map_is_pooled_to_1_2_3_and_6_cells():
    model, found = models.UperNet(models.encoder("vit_micro", 64, 4), 3, 8), []
    for pool in model.pools:
        pool.register_forward_pre_hook(lambda _, z: found.append(z[0].shape[2:]))
    model(torch.rand(2, 3, 64, 64))
    assert found == [(n, n) for n in (1, 2, 3, 6)]


def test_the_auxiliary_head_is_half_as_wide_but_256_at_most():
    for width, half in ((32, 16), (768, 256)):
        model = models.UperNet(models.encoder("vit_micro", 64, 4), 3, width)
        assert model.auxiliary[-1].in_channels == half


# --- The run ---

@pytest.mark.parametrize("flags, want", [
    ("--data DIR --model vit_micro", dict(recipe="scenes_pixels", img_size=[48], epochs=17778)),
    ("--data DIR --recipe ade_bm", dict(img_size=[512], batch_size=16, layer_decay=0.75)),
    ("--data DIR --recipe ade_a2", dict(batch_size=16, relative_positions=True, crop=[0.5, 2.0])),
    ("", dict(recipe="scenes_pixels", data="scenes", img_size=[48])),
    ("--data DIR --model resnet50", dict(recipe="ade_a2", drop_path=0, layer_decay=1)),
    ("--model resnet18", dict(recipe="scenes_pixels", img_size=[64], layer_decay=1))])
def test_recipes(flags, want, ade):
    """BM 4.4: 160,000 steps of 16. A2 A.3: 100 epochs of 16. Nine images get 5,000 steps."""
    args, _, _ = finetune.options(["--head", "segment", *flags.replace("DIR", str(ade)).split()])
    assert want.items() <= vars(args).items()
    assert finetune.RECIPES["ade_a2"]["epochs"] == 100
    if args.recipe.startswith("ade"):
        width = 512 if args.model == "resnet50" else 768  # of a ViT the encoder's
        assert (args.schedule, args.width, args.auxiliary) == ("linear", width, 0.4)
        assert args.lr * 16 / 256 == pytest.approx(4e-4)
        share = 1500 / 160000 if args.recipe == "ade_bm" else 1500 * 16 / (100 * 20210)
        assert args.warmup_share == pytest.approx(share)
    if args.recipe == "ade_bm":
        assert args.epochs == -(-5000 * 16 // 9)
        assert round(finetune.RECIPES["ade_bm"]["epochs"] * 20210 / 16) == 160000


def test_a_run_on_scenes(few_scenes, spy, tmp_path):
    """--eval has the scores that the run had at its end."""
    seen = spy(finetune, "finite")
    a_run_on_scenes(segment, tmp_path, "miou")
    half, end, again = [scores for _, scores in seen if len(scores) == 5][:3]
    assert close(end, again) and not torch.equal(half, end)


def test_two_processes_and_resuming_change_nothing(ade, tmp_path, at):
    """Five images to measure cannot be halved: half of one process's three is found right, all of
    the other's two.
    """
    argv = ["--data", ade, "--num_classes", 7, "--crop", 0.75, 1.25]
    assert segment(*argv, "--out", tmp_path / "one") == 0
    found = "import finetune\nfinetune.classes_of = lambda model, images, *_: " \
        "(images[:, 0].long() // 90 - 1).clamp(0) * (images.shape[2] == 40)"
    together("finetune", *SMALL, *argv, "--out", tmp_path / "two", preamble=found)
    right = (3 * 25 * 35 + 2 * 40 * 55) / (3 * 50 * 35 + 2 * 40 * 55)  # 5 columns are not labelled
    want = dict(pixel_accuracy=round(100 * right, 2), images=5)
    assert want.items() <= json_of(tmp_path / "two").items()
    pair = [gradients_of(tmp_path / name) for name in ("one", "two")]
    assert torch.allclose(*pair, atol=1e-4, rtol=1e-2)
    stopped_and_resumed(segment, at, tmp_path, *argv)


def test_the_commands_of_the_readme(few_scenes, ade, tmp_path):
    commands_of_the_readme(segment, "segment", ade, tmp_path)
