"""What classifiers are shown is cut once, and again where it would be cut otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra [train]")

from lungscope.bundle import Bundle
from lungscope.stages.classification import ViewSpec
from lungscope.training import views
from lungscope.training.views import cut_views
from stores import write_store


def test_views_are_cut_again_where_lungs_are_found_otherwise(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, bundle, spec = write_store(tmp_path), Bundle.load(tiny), ViewSpec("lungs", True, 0.05, 64)

    def cut(bundle: Bundle = bundle, spec: ViewSpec = spec) -> int:
        found = cut_views(store, bundle, {"view": spec}, tmp_path / "cache")["view"]
        assert found.usable.tolist() == [True, True, True, False] and np.all(found.views[:3].any((1, 2)))
        return len(list((tmp_path / "cache").glob("*-views.npy")))

    assert [cut(), cut(), cut(spec=replace(spec, equalised=True))] == [1, 1, 1]
    monkeypatch.setattr(views, "FOUND_BY", views.FOUND_BY + 1)
    assert cut() == 2
    assert cut(replace(bundle, segmenter=replace(bundle.segmenter, threshold=0.4))) == 3
    assert cut(spec=replace(spec, aligned=True)) == 4
