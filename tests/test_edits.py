"""What people change first: each edit is made on a copy of the files and trains three steps.

An edit is a list of (file, before or after which line, the line's beginning, new lines). Nothing
else has to be touched.
"""
import importlib
import sys

import pytest
import torch

import pretrain
from conftest import ROOT, TINY, log_of

TASK = [("degrade.py", "before", "# --- The table of tasks ---", '''
def shuffle(images, patch_size, share=0.5, turned=False, generator=None, within=None):
    """A share of the patches is put in another order: (B, C, H, W)."""
    p, (B, C, H, W) = patch_size, images.shape
    patches = F.unfold(images.flip(3) if turned else images, p, stride=p)  # (B, C p p, N)
    u = random_numbers(B, patches.shape[2], generator=generator, within=within).to(images.device)
    moved = (u < share).float() * (1 + u)
    return F.fold(patches.gather(2, moved.argsort(1)[:, None].expand_as(patches)), (H, W), p,
                  stride=p)
'''), ("degrade.py", "before", '    "zoom_out": Task(', '''
    "shuffle": Task(shuffle),
''')]
LOSS = [("losses.py", "after", '    "l1": torch.abs', '''
    "charbonnier": lambda error: (error.square() + 1e-6).sqrt(),
''')]
AVERAGE = [("pretrain.py", "before", "    start, recent = begin(", '''
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda a, b, _: a.lerp(b, 0.01))
    state["average"] = average
'''), ("pretrain.py", "after", "        optimizer.zero_grad()", '''
        average.update_parameters(model)
''')]
MASK = [("degrade.py", "before", "# A mask function is given what", '''
def dark_mask(images, patch_size, ratio):
    """The darkest patches are hidden: (B, N) bool."""
    grey = F.avg_pool2d(images.mean(1, keepdim=True), patch_size).flatten(1)
    return grey.argsort(1).argsort(1) < round(ratio * grey.shape[1])
'''), ("degrade.py", "before", "def patch_pixels(", '''
MASKS["dark"] = dark_mask
''')]
TENSORS = [("pretrain.py", "before", '    if data in BUILT_IN or data in SETS:', '''
    if data.endswith(".pt"):
        return "named"
'''), ("pretrain.py", "before", '    if kind == "named":', '''
    if args.data.endswith(".pt"):
        images = torch.load(args.data, weights_only=True)
        return MemorySet(images, torch.zeros(len(images)), ["all"], args.data)
''')]
NETWORK = [("models.py", "before", "# --- BM: an encoder-decoder ---", '''
class ConvNeXtBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm, self.mlp = nn.LayerNorm(dim, eps=1e-6), MLP(dim)

    def forward(self, z, drop=None):
        y = self.norm(self.conv_dw(z).permute(0, 2, 3, 1))
        return z + branch(self.mlp(y).permute(0, 3, 1, 2), drop, 0)


class ConvNeXt(Encoder):
    stride = 32
    first = "stem"

    def __init__(self, img_size, patch_size, depths, widths, channels=3, num_classes=0):
        super().__init__(img_size, patch_size, channels)
        self.stem = nn.Conv2d(channels, widths[0], 4, 4)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in zip(widths, widths[1:]))
        self.stages = nn.ModuleList(nn.Sequential(*(ConvNeXtBlock(w) for _ in range(n)))
                                    for n, w in zip(depths, widths))
        self.widths, self.dim = [widths[0], *widths], widths[-1]
        self.branches = sum(depths)
        self.fc = classifier(self.dim, num_classes)

    def encode(self, images, after=lambda l, z: z, drop=None):
        z, i = after(0, self.stem(self.normalize(images))), 0
        for l, stage in enumerate(self.stages, 1):
            z = z if l == 1 else self.down[l - 2](z)
            for block in stage:
                z, i = block(z, None if drop is None else drop[:, i:i + 1]), i + 1
            z = after(l, z)
        return z
'''), ("models.py", "after", '    "resnet152": resnet(', '''
    "convnext": Network(ConvNeXt, dict(depths=(1, 1, 2, 1), widths=(32, 64, 128, 256)), 4, 3),
''')]

EDITS = {"task": (TASK, "--task shuffle --share 0.75 --turned False"),
         "loss": (LOSS, "--loss charbonnier"),
         "average": (AVERAGE, ""),
         "mask": (MASK, "--task mask --mask_kind dark --mask_ratio 0.5"),
         "tensors": (TENSORS, "--data {}/set.pt"),
         "network": (NETWORK, "--task a2mim --model convnext --img_size 32 --patch_size 8")}


@pytest.fixture
def train(tmp_path, monkeypatch, capfd):
    """train(name, *options) -> the log of three steps of pretrain.py with the edit, in a folder."""
    def go(name, *more, out="run"):
        changes, flags = EDITS[name]
        texts = {path.stem: path.read_text() for path in ROOT.glob("*.py")}
        for file, where, beginning, new in changes:
            lines = texts[file[:-3]].split("\n")
            at, = (i for i, line in enumerate(lines) if line.startswith(beginning))
            lines.insert(at + (where == "after"), new.strip("\n"))
            texts[file[:-3]] = "\n".join(lines)
        for room, text in texts.items():
            (tmp_path / f"{room}.py").write_text(text)
            monkeypatch.delitem(sys.modules, room, raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        edited = importlib.import_module("pretrain")
        assert edited.__file__ == str(tmp_path / "pretrain.py")
        argv = ["--model", "vit_micro", *TINY[2:], *flags.format(tmp_path).split(), "--steps", 3,
                "--out", tmp_path / out, *more]
        assert edited.command(edited.main, [*map(str, argv)]) == 0, capfd.readouterr()
        log = log_of(tmp_path / out)
        assert len(log) == 3 and all(line["grad_norm"] > 0 for line in log)
        return log
    return go


@pytest.mark.parametrize("name", ["task", "mask", "tensors", "network"])
def test_an_edit_trains(name, train, tmp_path):
    images = torch.randint(256, (20, 3, 20, 20), generator=torch.Generator().manual_seed(0))
    torch.save(images.byte(), tmp_path / "set.pt")
    train(name)


def test_a_new_loss_is_the_loss_of_the_default_task(train):
    """Charbonnier is above L1 by less than its constant, and is not L1."""
    ours, l1 = train("loss")[0]["loss"], train("loss", "--loss", "l1", out="b")[0]["loss"]
    assert 0 < ours - l1 < 1e-3


def test_float_tensors_are_refused():
    with pytest.raises(ValueError, match="images are uint8, not torch.float32"):
        pretrain.MemorySet(torch.rand(2, 3, 8, 8), torch.zeros(2), ["all"], "x")


def test_an_average_of_the_weights_is_saved_and_loaded(train, tmp_path):
    train("average")
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert state["average"]["n_averaged"] == 3
    train("average", "--resume")
