"""What a result says it was measured with."""

from __future__ import annotations

from pathlib import Path

import pytest

from lungscope.evaluation import provenance


def test_without_git_the_commit_is_what_the_one_who_built_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.delenv("LUNGSCOPE_COMMIT", raising=False)
    assert provenance.commit() is None
    monkeypatch.setenv("LUNGSCOPE_COMMIT", "ab" * 20)
    assert provenance.commit() == "ab" * 20


def test_a_checkout_says_its_own_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    own = provenance.commit()
    monkeypatch.setenv("LUNGSCOPE_COMMIT", "ab" * 20)
    assert own is None or provenance.commit() == own
