"""What real folders hold: each case is read right, or one line says what is wrong."""
import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import degrade
import finetune
import models
import pretrain
import probe
from conftest import loaded


def pictures(folder, count=4, mode="RGB", name="{}.png"):
    """`count` pictures of 24 px in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).convert(mode)
        image.save(folder / name.format(i))


def labelled(folder, classes=("cat", "dog"), without=()):
    for split in ("train", "val"):
        for name in classes:
            if (split, name) not in without:
                pictures(folder / split / name)


@pytest.mark.parametrize("dtype, top, right", [
    (np.uint16, 65535, True), (np.uint16, 4095, False), (np.uint16, 255, False),
    (np.float32, 1, False),
    (np.int32, 255, False)])
def test_a_picture_is_read_at_its_range_or_refused(dtype, top, right, tmp_path):
    """16 bits are scaled; of floats, 32 bits and 12 in 16 the range is not known."""
    grey = np.linspace(0, 1, 24 * 24).reshape(24, 24)
    Image.fromarray((grey * top).astype(dtype)).save(tmp_path / "x.tif")
    if right:
        image = degrade.read_image(tmp_path / "x.tif").float() / 255
        assert (image - torch.from_numpy(grey)).abs().max() < 0.01
    else:
        with pytest.raises(ValueError, match="range of its"):
            degrade.read_image(tmp_path / "x.tif")


def test_the_demo_reads_as_training_does(tmp_path):
    """A 16-bit picture is no white sheet."""
    Image.fromarray(np.full((64, 64), 20000, np.uint16)).save(tmp_path / "x.png")
    degrade.main([str(tmp_path / "x.png"), "--out", str(tmp_path / "y.png")])
    view = degrade.read_image(tmp_path / "y.png")[:, 20:150, 10:150]  # the first view of `mask`
    assert view.min() == view.max() == 20000 * 255 // 65535


def test_train_is_a_split_with_val_beside_it_and_else_a_class(tmp_path):
    """A split if no folder beside it holds images, too. Beside train and val nothing is data."""
    data = tmp_path / "data"
    labelled(data)
    pictures(data / "samples")
    pictures(data / ".ipynb_checkpoints")
    assert len(loaded(data)) == 8
    shutil.rmtree(data / "val")
    assert len(loaded(data)) == 12
    shutil.rmtree(data / "samples")
    assert len(loaded(data)) == 8


def test_a_folder_that_cannot_be_opened_is_named(tmp_path, monkeypatch, real=os.scandir):
    def scandir(path):
        if os.fspath(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)
    labelled(tmp_path / "data")
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match="dog cannot be read: Permission denied"):
        loaded(tmp_path / "data")


def test_a_path_stays_a_path(of, done, tmp_path, monkeypatch):
    """A folder of one's own called shapes is not the built-in set, in no script."""
    monkeypatch.chdir(tmp_path)
    labelled(tmp_path / "shapes")
    done("r", "--steps 1", data="./shapes")
    code, said, _ = of(probe, "--weights", "r", data="./shapes", out="p")
    assert code == 0 and '"images": 8' in said


def test_a_class_without_val_images_is_allowed_and_said(of, tmp_path):
    labelled(tmp_path / "a", without=[("val", "dog")])
    code, said, _ = of(finetune, "--steps", 1, data=tmp_path / "a")
    assert code == 0 and "has no images of dog" in said


def test_two_links_to_one_class_folder_are_two_classes(tmp_path):
    labelled(tmp_path / "data")
    (tmp_path / "data/train/copy").symlink_to(tmp_path / "data/train/cat")
    data = pretrain.FolderSet(str(tmp_path / "data/train"), labelled=True)
    assert data.classes == ["cat", "copy", "dog"] and len(data) == 12
    (tmp_path / "data/train/cat/loop").symlink_to(tmp_path / "data/train")  # no third time
    pretrain.image_files.cache_clear()
    assert len(pretrain.FolderSet(str(tmp_path / "data/train"), labelled=True)) == 12


def test_classes_of_a_list_alone(of, run, done, tmp_path):
    """--classes: an ImageNet-100 of ImageNet. A run hands it on. What is not there is said."""
    labelled(tmp_path / "data", ("cat", "dog", "sea cow"))
    (tmp_path / "some.txt").write_text("\ufeffsea cow\ncat\nyeti\n")  # as Notepad's
    some = f"--classes {tmp_path}/some.txt --steps 1"
    code, said, _ = run(*some.split(), data=tmp_path / "data", out=tmp_path / "r")
    assert code == 0 and "8 images" in said and "(of --classes are not there: yeti)" in said
    code, said, _ = of(probe, "--weights", tmp_path / "r", data=f"{tmp_path}/data/")  # the same
    assert code == 0 and "of 2 classes" in said and '"images": 8' in said
    fine = done("f", some, module=finetune, data=tmp_path / "data")
    assert models.read_weights(fine)["config"]["classes"] == ["cat", "sea cow"]
    labelled(tmp_path / "other", ("a", "b"))  # the list is of the run's own data
    for name in ("data", "other"):
        more = f"--steps 1 --weights {tmp_path}/r"
        done(f"fine-{name}", more, module=finetune, data=tmp_path / name)
    pictures(tmp_path / "bare/cat")  # there is no val
    done("b", some, data=tmp_path / "bare")
    assert run("--classes", "nowhere", out=tmp_path / "s")[0] == 2


def test_weights_of_another_program(tmp_path, of):
    """Their `config` is not ours. Of two networks one is taken, and the other's names are said."""
    own = models.encoder("vit_micro", 16, 4).state_dict()
    file = {f"{part}.{n}": x for part in ("student", "teacher") for n, x in own.items()}
    torch.save({"model": file, "config": "a.yaml", "model_ema": own}, tmp_path / "w.pth")
    labelled(tmp_path / "data")
    code, said, _ = of(probe, "--weights", tmp_path / "w.pth", data=tmp_path / "data")
    assert code == 0 and "79 (model_ema, teacher.cls_token," in said, said


def test_names_that_stdout_cannot_encode(done, tmp_path, monkeypatch):
    """They are printed with escapes."""
    pictures(tmp_path / "donn\u00e9es")
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, "ascii", write_through=True))
    done("run", "--steps 1", data=tmp_path / "donn\u00e9es")
    assert b"donn\\xe9es" in said.getvalue()


@pytest.mark.skipif(os.geteuid() != 0 or subprocess.run(
    ["unshare", "-m", "true"], capture_output=True).returncode != 0, reason="wants mount rights")
@pytest.mark.slow
def test_a_small_shared_memory_ends_in_one_line(tmp_path):
    """Docker gives 64 MB. The run ends, and says what to do."""
    pictures(tmp_path / "data", 16)
    start = (f"mount -t tmpfs -o size=1m t /dev/shm && exec timeout -k 5 60 {sys.executable} "
             f"pretrain.py --task mask --model vit_micro --img_size 224 --patch_size 16 "
             f"--workers 4 --data {tmp_path / 'data'} --batch_size 16 --steps 4 "
             f"--out {tmp_path / 'run'}")
    done = subprocess.run(["unshare", "-m", "bash", "-c", start], capture_output=True, text=True,
                          cwd=os.path.dirname(pretrain.__file__))
    assert done.returncode == 1 and "--workers 0" in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize("name, what", [
    ("dist_token", "distilled"), ("blocks.0.ls1.gamma", "DINOv2"), ("blocks.0.gamma_1", "BEiT"),
    ("register_tokens", "registers"), ("class_token", "torchvision"), ("fc_norm.weight", "pooling"),
    ("module.patch_embed.proj.0.weight", "stem"), ("vit.embeddings.cls_token", "Hugging Face")])
def test_files_of_other_models_are_named(name, what):
    model = models.encoder("vit_micro", 32, 4)
    with pytest.raises(ValueError, match=what):
        models.load_weights(model, {**model.state_dict(), name: torch.zeros(3)})


def test_moco_v3_and_dino_load():
    """MoCo-v3's query encoder, whose head is a projector, DINO's backbone, also of a teacher."""
    source = models.encoder("vit_micro", 32, 4).state_dict()
    moco = {f"module.{part}.{name}": x for part in ("base_encoder", "momentum_encoder")
            for name, x in source.items()}
    moco["module.base_encoder.head.0.weight"] = torch.zeros(9, 9)
    moco["module.predictor.0.weight"] = torch.zeros(9, 9)
    dino = {f"module.backbone.{name}": x for name, x in source.items()}
    dino["module.head.mlp.0.weight"] = torch.zeros(9, 9)
    for file in ({"epoch": 300, "state_dict": moco}, source, {"teacher": dino}):
        model = models.encoder("vit_micro", 32, 4, num_classes=7)
        loaded = models.load_weights(model, file)
        assert loaded.missing == ["head.weight", "head.bias"]
        assert all(torch.equal(x, model.state_dict()[name]) for name, x in source.items())


def test_safetensors(tmp_path):
    """Read where the package is there. Else its name is said."""
    source = models.encoder("vit_micro", 32, 4)
    file = tmp_path / "model.safetensors"
    try:
        from safetensors.torch import save_file
    except ImportError:
        with pytest.raises(ValueError, match="pip install safetensors"):
            models.load_weights(source, file)
        return
    save_file(source.state_dict(), file)
    target = models.encoder("vit_micro", 32, 4)
    models.load_weights(target, file)
    assert torch.equal(target.cls_token, source.cls_token)


@pytest.mark.parametrize("state, message", [
    ({"student": {"a": torch.zeros(1)}, "teacher": {"a": torch.zeros(1)}}, "several dicts"),
    ({0: torch.zeros(3)}, "no named tensors"),
    ({"patch_embed.proj.weight": torch.zeros(128, 3, 4, 4), "pos_embed": torch.zeros(65, 128)},
     "pos_embed is")])
def test_odd_weight_files_get_one_line(state, message):
    with pytest.raises(ValueError, match=message):
        models.load_weights(models.encoder("vit_micro", 32, 4), state)
