"""The code on the documentation's pages runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def test_prune_while_you_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "page"}
    found = blocks("prune-while-you-train.md")
    assert len(found) == 6
    for block in found:
        exec(compile(block, "prune-while-you-train.md", "exec"), scope)
    lines = re.findall(r"^(0\.\d+(?: 0\.\d+)*)$", capsys.readouterr().out, re.MULTILINE)  # what the page prints itself
    assert [round(float(word), 2) for line in lines for word in line.split()] == [0.9, 0.8, 0.8, 0.8, 0.8]
