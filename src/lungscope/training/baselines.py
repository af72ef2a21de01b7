"""What lungscope's speed is measured beside: the same weights in eager PyTorch with pytorch-grad-cam, as a script has
them, and the same graphs in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lungscope.bundle import Bundle
from lungscope.errors import BundleError, MissingExtraError
from lungscope.radiograph import Geometry, Pixels
from lungscope.readers import read
from lungscope.runtime import Weights
from lungscope.stages.classification import lead, lung_view
from lungscope.stages.segmentation import LungMask, Mask, pool, split
from lungscope.training.networks import CLASSIFIERS, GRADE, SEGMENTERS, build_classifier, build_segmenter
from lungscope.training.weights import load_weights


class Eager:
    """A bundle in eager PyTorch. Only the networks, Grad-CAM, and what has to be between them: no check of the film, no
    severity.

    Raises BundleError for a bundle without a classifier, RecipeError for weights that do not fit, MissingExtraError
    without pytorch-grad-cam.
    """

    def __init__(self, bundle: Bundle) -> None:
        try:
            from pytorch_grad_cam import GradCAM
        except ModuleNotFoundError as error:
            raise MissingExtraError("The eager pipeline", "dev") from error
        if bundle.classifier is None:
            raise BundleError(f"Bundle {bundle.name!r} has no classifier to compare. Take one that has.")
        self.bundle = bundle
        self._spec = bundle.classifier
        self._segmenters = [self.network(member) for member in bundle.segmenter.members]
        classifier = self.network(bundle.classifier.weights)
        layer = classifier.get_submodule(CLASSIFIERS[bundle.classifier.weights.network].layer)
        self._cam = GradCAM(classifier, target_layers=[layer])

    def network(self, weights: Weights) -> nn.Module:
        """A network of the bundle, ready to be called."""
        spec = self.bundle.classifier
        if weights.network.removesuffix(GRADE) in SEGMENTERS or spec is None:
            network = build_segmenter(weights.network)
        else:
            network = build_classifier(weights.network, classes=len(spec.labels), size=spec.view.size)
        load_weights(network, weights.path)
        return network.eval()

    def analyze(self, path: Path) -> tuple[str, Mask, Pixels]:
        """A film's class, lungs bool [H, W], and Grad-CAM's map f32 [H, W] in 0..1 inside them."""
        mask, view, crop = self._view(path)
        cam = self._cam(torch.from_numpy(view)[None, None], targets=None)[0]
        logits = self._cam.outputs[0].detach().numpy()
        if lead(logits) < self._spec.mirror:
            mirror = np.ascontiguousarray(view[:, ::-1])
            cam = (cam + self._cam(torch.from_numpy(mirror)[None, None], targets=None)[0][:, ::-1]) / 2
            logits = np.asarray((logits + self._cam.outputs[0].detach().numpy()) / 2, np.float32)
        return self._spec.labels[int(logits.argmax())], mask, np.where(mask, crop.to_source(cam), np.float32(0))

    def classify(self, path: Path) -> tuple[str, Mask]:
        """A film's class and lungs bool [H, W], without a map."""
        mask, view, _ = self._view(path)
        logits = self._logits(view)
        if lead(logits) < self._spec.mirror:
            logits = np.asarray((logits + self._logits(np.ascontiguousarray(view[:, ::-1]))) / 2, np.float32)
        return self._spec.labels[int(logits.argmax())], mask

    def _logits(self, view: Pixels) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = self._cam.model(torch.from_numpy(view)[None, None])[0].numpy()
        return logits

    def _view(self, path: Path) -> tuple[Mask, Pixels, Geometry]:
        """A film's lungs, and what the classifier is shown."""
        film = read(path)
        geometry = Geometry.of_film(film.pixels, self.bundle.segmenter.size)
        image = torch.from_numpy(geometry.to_network(film.pixels))[None, None]
        with torch.inference_mode():
            maps = [network(image).sigmoid()[0, 0].numpy() for network in self._segmenters]
        settings = self.bundle.segmenter
        probability, found = pool(maps, settings.pool, settings.threshold, geometry.to_source)
        right, left, _ = split(found, geometry.middle)
        lungs = LungMask(right | left, probability, left, right, film.spacing_mm, None, ())
        return lungs.mask, *lung_view(film.pixels, lungs, self._spec.view)


def graphs(bundle: Bundle) -> dict[str, Callable[[Path], Callable[[Pixels], Any]]]:
    """Other ways to run a bundle's graphs, by name: each makes a callable, of images f32 [1, 1, S, S], of an ONNX file.
    ONNX Runtime is among them where it is installed."""
    eager = Eager(bundle)
    by_path = {weights.path: weights for weights in bundle.weights}

    def in_torch(path: Path) -> Callable[[Pixels], Any]:
        network = eager.network(by_path[path])

        def work(image: Pixels) -> Any:
            with torch.inference_mode():
                return network(torch.from_numpy(image))

        return work

    found: dict[str, Callable[[Path], Callable[[Pixels], Any]]] = {"eager PyTorch": in_torch}
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return found

    def in_onnx_runtime(path: Path) -> Callable[[Pixels], Any]:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda image: session.run(None, {"image": image})

    return {**found, "ONNX Runtime": in_onnx_runtime}
