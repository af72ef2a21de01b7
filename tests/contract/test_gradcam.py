"""Grad-CAM without a backward pass, as the runtime computes it, against Grad-CAM by autograd.

Grad-CAM weighs feature map k by the mean over its h·w places of ∂logit/∂A_k (Selvaraju et al. 2017, equation 1). Behind
average pooling and a linear layer that gradient is w_k / (h·w) at every place, so its mean is w_k / (h·w) too, and
ReLU(Σ_k w_k A_k), which the exported graph gives, is h·w times Grad-CAM's map.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lungscope.errors import RecipeError
from lungscope.runtime import Arrays, Runtime
from lungscope.training.export import ClassifierGraph, to_onnx
from lungscope.training.gradcam import METHODS, class_activation
from lungscope.training.networks import CLASSIFIERS, features, head_of
from nets import CLASSES, SMALL, awake_classifier, blotches

#: Largest difference, as a share of the map's range.
TOLERANCE = 1e-3
#: Large enough for maps of more than one place.
SIZES = SMALL | {"inceptionresnetv2": 160}


@dataclass(frozen=True)
class Exported:
    """network: in torch. films: f32 [N, 1, S, S]. found: what the runtime makes of them."""

    name: str
    network: nn.Module
    films: torch.Tensor
    found: Arrays


@pytest.fixture(scope="module", params=CLASSIFIERS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    name = str(request.param)
    size = SIZES[name]
    network = awake_classifier(name, size)
    path: Path = tmp_path_factory.mktemp(name) / "classifier.onnx"
    to_onnx(ClassifierGraph(network, name), size, path, ["logits", "cam"])
    films = blotches(3, size)
    found = Runtime("cpu", "f32").compile(path, outputs=("logits", "cam"))({"image": films.numpy()})
    return Exported(name, network, films, found)


def test_the_runtimes_map_is_grad_cam(exported: Exported) -> None:
    cam = exported.found["cam"]
    h, w = cam.shape[-2:]
    assert cam.shape == (3, CLASSES, h, w) and h * w > 1
    positive = 0
    for target in range(CLASSES):
        reference = h * w * class_activation(exported.network, exported.films, target)
        assert reference.shape == (3, h, w)
        span = float(np.ptp(cam[:, target]))
        assert span > 0.1
        assert np.abs(np.maximum(cam[:, target], 0) - reference).max() <= TOLERANCE * span
        positive += int((reference > 0).sum())
    assert positive > 0


def test_the_map_averages_to_the_logit(exported: Exported) -> None:
    with torch.no_grad():
        logits = exported.network(exported.films).numpy()
    bias = head_of(exported.network, exported.name).bias.detach().numpy()
    assert np.abs(bias).min() > 0.01
    span = float(np.ptp(exported.found["cam"]))
    np.testing.assert_allclose(exported.found["cam"].mean((2, 3)) + bias, logits, atol=TOLERANCE * span)
    np.testing.assert_allclose(exported.found["logits"], logits, atol=TOLERANCE * span)


@pytest.mark.parametrize(("name", "layer"), [("resnet50", "layer4"), ("xception", "act4"), ("coatnet0", "norm")])
def test_the_reference_agrees_with_pytorch_grad_cam(name: str, layer: str) -> None:
    package = pytest.importorskip("pytorch_grad_cam", reason="pip install grad-cam")
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    size = SMALL[name]
    network = awake_classifier(name, size)
    films = blotches(2, size)
    for target in range(CLASSES):
        ours = class_activation(network, films, target)
        with package.GradCAM(network, target_layers=[network.get_submodule(layer)]) as theirs:
            expected = theirs(films, [ClassifierOutputTarget(target)] * len(films))
        # The package scales each map to 0..1, enlarges it to the film, and scales it again.
        np.testing.assert_allclose(scale_cam_image(scale_cam_image(ours, (size, size))), expected, atol=1e-3)


def test_layer_cam_by_hand() -> None:
    network = awake_classifier("resnet50", 64)
    x = torch.rand(1, 1, 64, 64)
    weight = head_of(network, "resnet50").weight[1]
    with torch.no_grad():
        maps = features(network, x)[0]
    by_hand = (weight.clamp_min(0)[:, None, None] / maps[0].numel() * maps).sum(0).clamp_min(0)
    np.testing.assert_allclose(class_activation(network, x, 1, "layercam")[0], by_hand.detach().numpy(), rtol=1e-4)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "scorecam"])
def test_every_method_gives_a_map_that_is_not_negative(method: str) -> None:
    network = awake_classifier("resnet50", 64)
    cam = class_activation(network, torch.rand(2, 1, 64, 64), 0, method)
    assert cam.shape == (2, 2, 2) and cam.dtype == np.float32
    assert cam.min() >= 0 and np.isfinite(cam).all()


def test_score_cam_weighs_channels_by_what_they_alone_score() -> None:
    """A network of two channels in which only the second one's place decides."""

    class Two(nn.Module):
        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x.flip(3)], 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 100 * x[:, :, :, -1].mean((1, 2))[:, None].repeat(1, 2)

    x = torch.zeros(1, 1, 4, 4)
    x[..., 0] = 0.5
    x[..., -1] = 1.0
    cam = class_activation(Two(), x, 1, "scorecam")
    np.testing.assert_allclose(cam[0, :, -1], 1.0, atol=1e-5)
    np.testing.assert_allclose(cam[0, :, 0], 0.5, atol=1e-5)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(RecipeError, match="gradcam"):
        class_activation(nn.Identity(), torch.zeros(1, 1, 32, 32), 0, "gradcan")
