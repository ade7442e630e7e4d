"""Boxes and masks of objects (BM 4.4, A2 A.2): Mask R-CNN on an encoder, scenes, COCO's format and
its AP."""
import functools
import json
import shutil
from argparse import Namespace
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection import roi_heads

import finetune
import models
import pretrain
from conftest import (DENSE, ONE, a_run_on_scenes, close, command, commands_of_the_readme, json_of,
                      loaded, log_of, stopped_and_resumed, together)

SMALL = [*"--head detect --width 16 --sampled 16".split(), *DENSE]


def rectangle(left, top, right, bottom):
    return [[left, top, right, top, right, bottom, left, bottom]]


def runs_of(mask):
    """COCO's run lengths: of columns, the first is of 0."""
    changes = np.flatnonzero(np.diff(mask.T.ravel().astype(int), prepend=0))
    return np.diff(changes, prepend=0, append=mask.size).tolist()


@pytest.fixture
def coco(tmp_path):
    """COCO's layout: nine and five images of two sizes, each with a bright square, a crowd beside
    it, and one image of each split with nothing. Numbers of classes have gaps.
    """
    where = tmp_path / "images" / "coco"
    for split, n in (("train2017", 9), ("val2017", 5)):
        images, objects = [], []
        (where / split).mkdir(parents=True)
        (where / "annotations").mkdir(exist_ok=True)
        for i in range(n):
            h, w = (40, 60) if i % 2 else (50, 40)
            picture = np.full((h, w, 3), 60, np.uint8)
            images.append(dict(id=100 - i, file_name=f"{i}.jpg", height=h, width=w))
            if i:
                picture[10:30, 5:25] = 220
                columns = dict(size=[h, w], counts=[30 * h, 6 * h, (w - 36) * h])
                for crowd, box, segmentation in (
                        (0, [5, 10, 20, 20], rectangle(5, 10, 25, 30)),
                        (1, [30, 0, 6, h], columns)):
                    objects.append(dict(id=len(objects), image_id=100 - i, iscrowd=crowd, bbox=box,
                                        category_id=7 if i % 2 else 90, segmentation=segmentation,
                                        area=box[2] * box[3]))
            Image.fromarray(picture).save(where / split / f"{i}.jpg")
        kinds = [dict(id=90, name="even"), dict(id=7, name="odd")]
        held = dict(images=images, annotations=objects, categories=kinds)
        (where / "annotations" / f"instances_{split}.json").write_text(json.dumps(held))
    return where


def detect(*argv):
    return command(finetune, *SMALL, *argv)


@pytest.fixture
def refused(refused):
    return functools.partial(refused, " ".join(SMALL), module=finetune)


# --- What is measured ---

def random_image(rng, classes=4, empty=0.2, side=160):
    """Objects of an image, and what a detector that errs finds: tensors as read() returns them."""
    def some(n):
        labels = torch.tensor(rng.integers(1, classes + 1, n))
        corner = rng.integers(0, side - 20, (n, 2))
        far = np.minimum(corner + rng.integers(2, side, (n, 2)), side)
        boxes = torch.tensor(np.concatenate([corner, far], axis=1).reshape(-1, 4)).float()
        masks = torch.zeros(n, side, side, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
            mask[top:bottom, left:right] = 1
            mask[top:(top + bottom) // 2, left:(left + right) // 2] = 0
        return dict(labels=labels, boxes=boxes, masks=masks)
    n = 0 if rng.random() < empty else rng.integers(1, 9)
    truth = some(n)
    truth.update(crowd=torch.tensor(rng.random(n) < 0.2), area=truth["masks"].sum((1, 2)).double())
    found = some(rng.integers(0, 6))
    if n:  # near the objects, some of them twice
        copies = torch.tensor(rng.integers(0, n, rng.integers(0, 12)))
        near = truth["boxes"][copies] + torch.tensor(rng.integers(-4, 5, (len(copies), 4)))
        near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 1)
        masks = truth["masks"][copies].roll(int(rng.integers(-3, 4)), 2)
        found = {name: torch.cat([found[name], x]) for name, x in dict(
            labels=truth["labels"][copies], boxes=near.clamp(0, side), masks=masks).items()}
    scores = torch.tensor(rng.integers(1, 8, len(found["labels"])) / 8)  # with ties
    return truth, dict(found, scores=scores, masks=found["masks"].bool())


@pytest.mark.parametrize("seed", range(4))
def test_ap_is_pycocotools(seed):
    """With crowds, ties, images without objects and without detections, a class never found."""
    api = pytest.importorskip("pycocotools.coco")
    from pycocotools import mask as rle
    from pycocotools.cocoeval import COCOeval
    rng = np.random.default_rng(seed)
    pairs = [random_image(rng) for _ in range(30)]
    ours = finetune.average_precision([finetune.matched(f, t) for t, f in pairs])

    def rows(objects, image, *names):
        for i, label in enumerate(objects["labels"].tolist()):
            left, top, right, bottom = objects["boxes"][i].tolist()
            mask = np.asfortranarray(objects["masks"][i].numpy().astype(np.uint8))
            row = dict(bbox=[left, top, right - left, bottom - top], segmentation=rle.encode(mask))
            yield dict(image_id=image, category_id=label, **{name: row[name] for name in names})
    truth, annotations = api.COCO(), []
    for i, (t, _) in enumerate(pairs):
        for row, crowd, area in zip(rows(t, i, "bbox", "segmentation"), t["crowd"], t["area"]):
            annotations.append(dict(row, id=len(annotations) + 1, iscrowd=int(crowd),
                                    area=area.item()))
    truth.dataset = dict(images=[dict(id=i, height=160, width=160) for i in range(30)], info={},
                         categories=[dict(id=i) for i in range(1, 6)], annotations=annotations)
    truth.createIndex()
    names = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
    for kind, word, what in (("bbox", "box", "bbox"), ("segm", "mask", "segmentation")):
        rows_of_kind = [dict(row, score=score) for i, (_, f) in enumerate(pairs)
                        for row, score in zip(rows(f, i, what), f["scores"].tolist())]
        run = COCOeval(truth, truth.loadRes(rows_of_kind), kind)
        run.evaluate(), run.accumulate(), run.summarize()
        for name, theirs in zip(names, run.stats):
            assert ours.get(f"{word}_{name}", -100) == pytest.approx(100 * theirs, abs=0.0051), name


def objects(*boxes, scores=None, crowd=None, label=1):
    """Objects of one class, whose masks fill their boxes."""
    n = len(boxes)
    masks = torch.zeros(n, 200, 200, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes):
        mask[top:bottom, left:right] = True
    made = dict(boxes=torch.tensor(boxes).float().view(-1, 4), masks=masks,
                labels=torch.full((n,), label))
    if scores:
        return dict(made, scores=torch.tensor(scores))
    return dict(made, crowd=torch.tensor(crowd or [False] * n), area=masks.sum((1, 2)))


def test_ap_by_hand():
    """Two objects; found are one right, one wrong, one right. Precision is 1 up to recall 1/2, then
    2/3: 51 and 50 of the 101 recalls. The second overlaps by 0.6, right at three thresholds.
    """
    truth = objects((0, 0, 50, 50), (100, 100, 200, 200))
    found = objects((0, 0, 50, 50), (0, 60, 50, 90), (100, 100, 160, 200), scores=[0.9, 0.8, 0.7])
    result = finetune.average_precision([finetune.matched(found, truth)])
    half, both = 51 / 101, (51 + 50 * 2 / 3) / 101
    assert result["box_ap50"] == result["mask_ap50"] == pytest.approx(100 * both, abs=0.01)
    assert result["box_ap75"] == pytest.approx(100 * half, abs=0.01)
    assert result["box_ap"] == pytest.approx(100 * (3 * both + 7 * half) / 10, abs=0.01)
    assert result["box_ap_medium"] == 100 and result["box_ap_large"] == pytest.approx(30)
    assert "box_ap_small" not in result


def test_a_crowd_takes_any_number_and_counts_for_nothing():
    truth = objects((0, 0, 50, 50), (100, 0, 200, 200), crowd=[False, True])
    found = objects((110, 0, 130, 90), (140, 0, 180, 90), (0, 0, 50, 50), scores=[0.9, 0.8, 0.7])
    result = finetune.average_precision([finetune.matched(found, truth)])
    assert result["box_ap"] == result["mask_ap"] == 100
    alone = finetune.average_precision([finetune.matched(found, objects((0, 0, 50, 50)))])
    assert alone["box_ap"] == pytest.approx(100 / 3, abs=0.01)


def test_a_perfect_detection_scores_100(coco, few_scenes, monkeypatch):
    """Of a folder with an image without objects, and of scenes."""
    def right(model, image, *_):
        return next(dict(t, scores=torch.ones(len(t["labels"])), masks=t["masks"].bool())
                    for seen, t in map(data.read, range(5)) if torch.equal(seen, image))
    monkeypatch.setattr(finetune, "objects_of", right)
    for where in (str(coco), "scenes"):
        data = finetune.BoxSet(where, False, None)
        found = finetune.evaluate_boxes(torch.nn.Identity(), data, Namespace(workers=0), ONE, None)
        assert found["box_ap"] == found["mask_ap"] == 100 and found["images"] == 5


def test_what_is_found_is_asked_of_the_image_and_cut_at_a_half():
    image, seen = (torch.rand(3, 4, 5) * 255).byte(), []
    masks = torch.tensor([0.4, 0.6]).view(2, 1, 1, 1).expand(2, 1, 4, 5)
    found = finetune.objects_of(lambda x: (seen.append(x), [dict(masks=masks)])[1], image,
                                torch.device("cpu"), nullcontext)
    assert close(seen[0][0] * 255, image) and torch.equal(found["masks"], masks[:, 0] > 0.5)


def test_the_loss_is_the_sum_of_mask_rcnns():
    assert finetune.LOSSES["detect"](dict(a=1.0, b=2.0), None, None) == 3


# --- Data ---

def test_polygons_and_run_lengths_are_pycocotools_to_the_pixel():
    """Also polygons that leave the image, repeat a corner or cross themselves; compressed ones."""
    rle = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for i in range(200):
        h, w = map(int, rng.integers(5, 90, 2))
        points = [(rng.random((rng.integers(3, 12), 2)) * [w, h] * 1.1 - rng.choice([0, 2]))
                  .round(i % 3).ravel().tolist() for _ in range(rng.integers(1, 3))]
        theirs = rle.decode(rle.merge(rle.frPyObjects(points, h, w)))
        assert np.array_equal(finetune.mask_of(points, h, w), theirs)
        text = rle.encode(np.asfortranarray(theirs))["counts"].decode()
        for counts in (runs_of(theirs), text):
            assert np.array_equal(finetune.mask_of(dict(size=[h, w], counts=counts), h, w), theirs)


def test_a_polygon_by_hand():
    mask = finetune.mask_of(rectangle(1, 2, 4, 5), 6, 8)
    assert mask.sum() == 9 and mask[2:5, 1:4].all()


def test_boxes_of_scenes_are_tight(few_scenes):
    """Around what is seen of a shape. The front one hides the others: no pixel is of two."""
    data = finetune.BoxSet("scenes", True, None)
    for index in range(len(data)):
        image, found = data.read(index)
        assert image.shape == (3, 40, 40) and (found["masks"].sum(0) <= 1).all()
        assert len(found["labels"]) >= 1 and found["masks"].any((1, 2)).all()
        for mask, (left, top, right, bottom) in zip(found["masks"], found["boxes"].int().tolist()):
            rows, columns = mask.nonzero(as_tuple=True)
            assert [left, top] == [columns.min(), rows.min()]
            assert [right, bottom] == [columns.max() + 1, rows.max() + 1]


def test_objects_are_scaled_and_flipped_with_their_image(coco):
    """The bright square is where its box and its mask are. The crowd is not trained on."""
    data = finetune.BoxSet(str(coco), True, None)
    assert len(data) == 8 and data.classes == ["odd", "even"]
    assert "8 of 9 images of" in data.found
    flipped = set()
    for epoch in range(12):
        image, found = data.view(data.read(3), 3, epoch, (32, 32), (0.5, 1.0), 0)
        assert 16 <= min(image.shape[1:]) <= 32 and len(found["labels"]) == 1
        left, top, right, bottom = found["boxes"][0].round().int().tolist()
        assert image[:, top + 1:bottom - 1, left + 1:right - 1].min() > 150
        ys, xs = found["masks"][0].nonzero(as_tuple=True)
        near = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert (found["boxes"][0] - near).abs().max() <= 1
        flipped.add(left < image.shape[2] / 4)
    assert len(flipped) == 2
    spoilt(coco, lambda held: held["annotations"][0].update(area=7))  # what is said is believed
    assert finetune.BoxSet(str(coco), True, None).read(7)[1]["area"].tolist() == [7]
    tall, _ = data.view((torch.zeros(3, 300, 30), data.read(3)[1]), 3, 0, (32, 32), (1.0, 1.0), 0)
    assert max(tall.shape) == round(32 * 1333 / 800)


def spoilt(coco, change, split="train2017"):
    file = coco / "annotations" / f"instances_{split}.json"
    held = json.loads(file.read_text())
    change(held)
    file.write_text(json.dumps(held))


@pytest.mark.parametrize("part, number, change, code, says", [
    ("annotations", 0, dict(bbox=[5, 10, 70, 20]), 2,
     "COCO's format: ValueError the box of object 0 is not within its 60 x 40 image"),
    ("annotations", 0, dict(bbox=[20, 10, -5, 20]), 2, "is not within its"),
    ("annotations", 0, dict(segmentation=[]), 1, "the mask of object 0 of"),
    ("annotations", 0, dict(segmentation=[[5, 10, 25, 30]]), 1, "three corners or more"),
    ("annotations", 0, dict(segmentation=dict(size=[9, 9], counts=[81])), 1,
     "the mask of object 0 of"),
    ("annotations", 0, dict(category_id=3), 2,
     "instances_train2017.json is not of COCO's format: KeyError"),
    ("images", 1, dict(height=41), 1, "1.jpg: it is [40, 60] high and wide"),
    ("images", 1, dict(file_name="gone.jpg"), 1, "gone.jpg: [Errno 2]"),
    ("categories", 0, dict(id=None), 2, "COCO's format: TypeError"),
    ("categories", 0, dict(name="other"), 2, "has other classes")])
def test_annotations_that_do_not_fit_are_named(part, number, change, code, says, coco, refused):
    spoilt(coco, lambda held: held[part][number].update(change))
    assert says in refused(code=code, data=coco)


def test_a_folder_with_val_alone_is_measured(coco, tmp_path, capfd):
    """Its classes are the run's."""
    assert detect("--data", coco, "--out", tmp_path / "run", "--steps", 2) == 0
    (coco / "annotations/instances_train2017.json").unlink()
    argv = ["--head", "detect", "--eval", "--weights", tmp_path / "run", "--workers", 0, "--out"]
    assert command(finetune, *argv, tmp_path / "eval") == 0
    spoilt(coco, lambda held: held["categories"][0].update(name="other"), "val2017")
    assert command(finetune, *argv, tmp_path / "other") == 2
    assert "has other classes" in capfd.readouterr().err


def test_what_is_measured_is_resized_as_what_is_trained_on():
    """Antialiased, and beside it the mean colour."""
    model = models.Detector(models.encoder("vit_micro", 32, 8), 3, 20, 40, "fpn", 16, 16).eval()
    image, (height, width) = torch.rand(3, 40, 60), (20, 30)
    shown, _ = model.rcnn.transform([image])
    want = torch.nn.functional.interpolate(image[None], (height, width), mode="bilinear",
                                           antialias=True)
    seen = shown.tensors + model.rcnn.backbone.pyramid.encoder.mean
    assert seen.shape[2:] == (32, 32) and shown.image_sizes == [(height, width)]
    assert close(seen[:, :, :height, :width], want, 1e-6)
    assert close(seen[0, :, -1, -1], torch.tensor(models.IMAGENET_MEAN), 1e-8)


def test_boxes_are_pooled_from_their_place_whatever_was_seen_first():
    """A padded image does not bend the strides. They are 4, 8, 16, 32 of the pyramid, 16 in c4."""
    for kind, strides in (("fpn", [4, 8, 16, 32]), ("c4", [16])):
        model = models.Detector(models.encoder("resnet18", 64, 8), 3, 64, 128, kind, 16, 16).eval()
        with torch.no_grad():
            model([torch.rand(3, 40, 120)])
        for pool in (model.rcnn.roi_heads.box_roi_pool, model.rcnn.roi_heads.mask_roi_pool):
            assert pool.scales == [1 / s for s in strides]
    with pytest.raises(ValueError, match="power of two"):
        models.Detector(models.encoder("vit_micro", 28, 14), 3, 28, 56, "fpn", 16, 16)


def test_features_that_are_not_finite_are_no_ap_of_0():
    model = models.Detector(models.encoder("vit_micro", 32, 8), 3, 32, 64, "fpn", 16, 16).eval()
    torch.nn.init.constant_(model.rcnn.backbone.pyramid.encoder.norm.weight, torch.inf)
    with torch.no_grad(), pytest.raises(FloatingPointError, match="not finite"):
        model([torch.rand(3, 32, 32)])


def test_what_cannot_be_measured_is_refused_before_training(coco, refused):
    spoilt(coco, lambda held: held["annotations"].clear(), "val2017")
    assert "instances_val2017.json has no objects" in refused(data=coco)
    (coco / "annotations/instances_val2017.json").write_text('{"images": [')
    assert "instances_val2017.json is not of COCO's format" in refused(data=coco)
    shutil.rmtree(coco / "train2017")
    assert "instances_train2017.json: there is no" in refused(data=coco)
    spoilt(coco, lambda held: held["annotations"].clear())
    assert "instances_train2017.json has no objects" in refused(data=coco)
    spoilt(coco, lambda held: held.pop("categories"))
    assert "instances_train2017.json is not of COCO's format" in refused(data=coco)


@pytest.mark.parametrize("flags, says", [
    ("--data shapes", "nor a folder with annotations/instances_train"),
    ("--neck c4", "--neck: invalid choice: 'c4'"), ("--compile", "--head detect change"),
    ("--recipe coco_c4", "vit_micro is no ResNet"), ("--crop 0.5 2.0", "--crop")])
def test_what_is_refused(flags, says, few_scenes, refused):
    assert says in refused(*flags.split())


def test_pre_training_reads_a_split_of_coco(coco):
    """And not the other's images."""
    assert len(loaded(coco)) == 9 and len(loaded(coco, "val")) == 5
    (coco / "train2017").rename(coco / "train")
    assert len(loaded(coco)) == 9


# --- The model ---

@pytest.mark.parametrize("name, size, patch, kind", [
    ("vit_micro", 32, 8, "fpn"), ("resnet18", 64, 8, "fpn"),
    pytest.param("resnet18", 32, 8, "c4", marks=pytest.mark.slow)])
def test_a_detector_trains_every_parameter(name, size, patch, kind):
    """On images of two sizes, one of them without objects; and finds what it finds in them."""
    torch.manual_seed(0)
    encoder = models.encoder(name, size, patch)
    model = models.Detector(encoder, 3, size, 2 * size, kind, 16, 16)
    images = [torch.rand(3, size, size), torch.rand(3, size - 10, size + 9)]
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(),
                masks=torch.zeros(0, size - 10, size + 9, dtype=torch.uint8))
    one = dict(boxes=torch.tensor([[4.0, 4, 28, 28]]), labels=torch.tensor([2]),
               masks=torch.ones(1, size, size, dtype=torch.uint8))
    losses = model(images, None, [one, none])
    sum(losses.values()).backward()
    assert len(losses) == 5
    for parameter, x in model.named_parameters():
        if not parameter.endswith("pos_embed"):
            assert x.grad.isfinite().all() and x.grad.any(), parameter
    model.zero_grad()
    losses = model(images[1:], None, [none])
    assert all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    with torch.no_grad():
        found = model.eval()(images)
    assert [x["masks"].shape[2:] for x in found] == [(size, size), (size - 10, size + 9)]
    assert all(x["boxes"].dtype == torch.float32 for x in found)


@pytest.mark.slow
@pytest.mark.parametrize("name, kind, relative", [
    ("resnet50", "c4", False), ("resnet50", "fpn", False), ("vit_small", "fpn", True)])
def test_a_step_at_the_papers_sizes(name, kind, relative):
    """Short side 800, long 1216: losses and every gradient are finite."""
    model = models.Detector(models.encoder(name, 224, 16, 3, 0, relative), 80, 800, 1333, kind)
    boxes = torch.tensor([[100.0, 100, 500, 400], [600, 300, 700, 380]])
    truth = dict(boxes=boxes, labels=torch.tensor([1, 80]),
                 masks=torch.ones(2, 800, 1210, dtype=torch.uint8))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([torch.rand(3, 800, 1210)], None, [truth])
    sum(losses.values()).backward()
    assert all(x.isfinite() for x in losses.values())
    for parameter, x in model.named_parameters():
        assert parameter.endswith("pos_embed") or x.grad.isfinite().all(), parameter


def test_anchors_are_of_32_pixels_and_more():
    model = models.Detector(models.encoder("vit_micro", 64, 16), 3, 64, 128, width=8)
    sizes = model.rcnn.rpn.anchor_generator.sizes
    assert [side for level in sizes for side in level] == [32, 64, 128, 256, 512]
    shown, _ = model.eval().rcnn.transform([torch.rand(3, 64, 90)])
    assert shown.tensors.shape[2:] == (64, 128)  # whole positions of each level


def test_a_mask_is_trained_on_and_pasted_where_it_lies(monkeypatch):
    """Every pixel of it, in a box with a margin and in its own."""
    model = models.Detector(models.encoder("vit_micro", 32, 8), 3, 32, 64, "fpn", 16, 16)
    targets = []
    monkeypatch.setattr(roi_heads, "maskrcnn_loss", lambda logits, boxes, masks, *_:
                        targets.extend(masks) or logits.sum())
    mask = torch.zeros(2, 32, 32, dtype=torch.uint8)
    mask[:, 9:21, 10:15] = 1
    boxes = torch.tensor([[4.0, 5, 18, 29], [10, 9, 15, 21]])
    model([torch.rand(3, 32, 32)], None, [dict(boxes=boxes, labels=torch.tensor([1, 2]),
                                               masks=mask)])
    cut = roi_heads.project_masks_on_boxes(targets[0], boxes, torch.arange(2), 28)
    found, = model.eval().rcnn.transform.postprocess([dict(boxes=boxes, masks=cut[:, None])],
                                                     [(32, 32)], [(32, 32)])
    assert torch.equal(found["masks"][:, 0] > 0.5, mask.bool())


def test_layers_used_again_keep_their_running_statistics():
    norm = models.BatchNorm(3)
    models.Again(norm)(torch.rand(2, 3, 4, 4))
    assert not norm.running_mean.any() and norm.momentum == 0.1


# --- The run ---

@pytest.mark.parametrize("flags, want", [
    ("--data DIR", dict(recipe="scenes_boxes", img_size=[64])),
    ("--data DIR --recipe coco_bm", dict(img_size=[800], batch_size=16, layer_decay=0.75,
                                         crop=[0.6, 1.0], schedule="step", optimizer="adamw")),
    ("--data DIR --recipe coco_a2", dict(relative_positions=True, neck="fpn")),
    ("--data DIR --model vit_base", dict(recipe="coco_bm", batch_size=16)),
    ("--data DIR --model resnet50", dict(recipe="coco_c4", neck="c4", optimizer="sgd",
                                         crop=[0.8, 1.0], weight_decay=1e-4)),
    ("--data scenes --model resnet18", dict(recipe="scenes_boxes", img_size=[128], neck="fpn")),
    ("", dict(recipe="scenes_boxes", data="scenes", neck="fpn"))])
def test_recipes(flags, want, coco, imagenet):
    """BM 4.4: 3e-4, a tenth after epochs 9 and 11 of 12. MoCo's ResNets: 0.02 by SGD."""
    flags = f"--head detect --model vit_micro {flags}".replace("DIR", str(coco))
    args, _, _ = finetune.options(flags.split())
    assert want.items() <= vars(args).items()
    if args.recipe.startswith("coco"):
        peak = args.lr * 16 / 256
        assert peak == pytest.approx(0.02 if args.neck == "c4" else 3e-4)
        share = 1000 / 180000 if args.neck == "c4" else 1000 / 88716
        assert (args.warmup_share, args.betas[0]) == (share, 0.9)
        assert (args.width, args.sampled) == (256, 512)
        w = torch.nn.Parameter(torch.ones(1))
        group, = finetune.OPTIMIZERS["sgd"]([w], lr=1.0, betas=args.betas).param_groups
        assert group["momentum"] == 0.9
        total = args.epochs
        assert total == (24 if args.neck == "c4" else 12)
        rates = [pretrain.learning_rate(epoch, total, 0, peak, args.schedule, args.drops) / peak
                 for epoch in range(total)]
        first, second = (16, 22) if args.neck == "c4" else (9, 11)
        assert np.allclose(rates, [10.0 ** -((i >= first) + (i >= second)) for i in range(total)])


def test_a_run_on_scenes(few_scenes, tmp_path):
    a_run_on_scenes(detect, tmp_path, "box_ap", "mask_ap50")


ALL_ARE_EVEN = """
import finetune, torch
def objects_of(model, image, *_):
    masks = torch.zeros(int(image.max() > 200), *image.shape[1:], dtype=torch.bool)
    masks[:, 10:30, 5:25] = True
    n = len(masks)
    return dict(boxes=torch.tensor([[5.0, 10, 25, 30]] * n).view(n, 4), masks=masks,
                labels=torch.full((n,), 2), scores=torch.ones(n))
finetune.objects_of = objects_of"""


def test_two_processes_measure_the_same_and_resuming_changes_nothing(coco, tmp_path, at):
    """Five images to measure cannot be halved. In images 4 to 1 the square is found, as what it is
    in 4 and 2, at equal scores, so that their order counts. (Training by two has other losses: each
    is a mean over the boxes that a process has drawn.)
    """
    argv = ["--data", coco, "--out"]
    assert detect(*argv, tmp_path / "one") == 0
    measure = ["--eval", "--weights", tmp_path / "one", "--amp", "off", "--workers", 0, "--out"]
    together("finetune", *measure, tmp_path / "eval", preamble=ALL_ARE_EVEN)
    two = json_of(tmp_path / "eval")
    even = (51 + 50 * 2 / 3) / 101  # of the odd ones none is found
    assert two["box_ap"] == two["mask_ap"] == pytest.approx(100 * even / 2, abs=0.01)
    assert two["images"] == 5
    together("finetune", *SMALL, *argv, tmp_path / "two", "--steps", 2)
    pair = [log_of(tmp_path / name)[0]["loss"] for name in ("one", "two")]
    assert pair[0] == pytest.approx(pair[1], rel=0.2)
    stopped_and_resumed(detect, at, tmp_path, "--data", coco)


def test_the_commands_of_the_readme(few_scenes, coco, tmp_path):
    commands_of_the_readme(detect, "detect", coco, tmp_path)
