from __future__ import annotations

import math
import random
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from billhook.record import BlockRecord, Calibration, Evaluation, Report, SiteRecord, Size, StepRecord

PROJECTIONS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


def make_step(
    method: str = "wanda",
    blocks: int = 30,
    projections: int = 7,
    spread: float = 0.0,
    block_errors: bool = True,
) -> StepRecord:
    """A step with the shapes of a small Llama; `spread` is how far sparsities stray from 50%."""
    draw = random.Random(0)
    shapes = list(PROJECTIONS.items()) + [(f"mlp.expert_{i}", (1536, 576)) for i in range(9)]
    sites, records = [], []
    for block in range(blocks):
        depth = block / max(blocks - 1, 1)
        for name, shape in shapes[:projections]:
            sparsity = 0.5 + spread * (math.sin(3 * depth + len(name)) + 0.3 * draw.random()) / 1.3
            error = math.exp(-5.2 + 1.9 * depth + 0.35 * draw.gauss(0, 1) + (1.6 if "down" in name else 0))
            sites.append(
                SiteRecord(
                    site=f"model.layers.{block}.{name}",
                    block=block,
                    projection=name,
                    shape=shape,
                    asked=sparsity,
                    sparsity=sparsity,
                    error=error,
                )
            )
        seconds = {
            "load": 0.05 + 0.02 * draw.random(),
            "collect": 0.9 + 0.1 * draw.random(),
            "solve": 0.35 + 0.05 * draw.random(),
            "propagate": 0.7 + 0.1 * draw.random(),
            "write": 0.12 + 0.05 * draw.random(),
        }
        records.append(
            BlockRecord(
                index=block,
                name=f"model.layers.{block}",
                seconds=seconds,
                error=math.exp(-6 + 1.5 * depth + 0.2 * draw.gauss(0, 1)) if block_errors else None,
                peak_memory=1_300_000_000 + 3_000_000 * block,
            )
        )
    return StepRecord(
        method=method,
        options={"sparsity": 0.5, "pattern": "unstructured", "scope": "row", "allocation": "uniform"},
        blocks=records,
        sites=sites,
        seconds=sum(record.total_seconds for record in records) + 4.0,
    )


def make_report(*steps: StepRecord, model: str = "HuggingFaceTB/SmolLM2-135M-Instruct") -> Report:
    """A finished run with the given steps; one Wanda step of 30 blocks and 7 projections by default."""
    protocol = {"data": "wikitext2", "length": 1024, "windows": 40, "tokens": 40920, "dtype": "float32"}
    steps = steps or (make_step(),)
    return Report(
        billhook="0.1.0",
        model=model,
        family="llama",
        recipe=[{"method": step.method, **step.options} for step in steps],
        fingerprint="9f2c4e7ab01d",
        calibration=Calibration(data="wikitext2", samples=32, length=512, seed=0, fingerprint="c2a94d10fe83"),
        steps=list(steps),
        before=Evaluation(perplexity=18.4021, seconds=61.2, **protocol),
        after=Evaluation(perplexity=27.9634, seconds=60.7, **protocol),
        size_before=Size(parameters=134_515_008, nonzero=134_515_008, bytes=538_090_408),
        size_after=Size(parameters=134_515_008, nonzero=81_430_848, bytes=538_090_408),
        seconds=sum(step.seconds for step in steps) + 130.0,
        peak_memory=1_420_000_000,
        versions={"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
        machine={"processor": "Example CPU @ 2.50GHz", "cores": 2, "memory": 16_600_000_000, "system": "Linux"},
    )


@pytest.fixture
def sample() -> Report:
    """30 blocks with 7 projections, pruned by Wanda."""
    return make_report()


@pytest.fixture
def build() -> Callable[..., Report]:
    """`make_report`."""
    return make_report


@pytest.fixture
def step() -> Callable[..., StepRecord]:
    """`make_step`."""
    return make_step


class Page(HTMLParser):
    """A parsed page: every element with its attributes and own text; unbalanced tags are an error."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str], list[int]]] = []
        self._open: list[int] = []
        self.feed(text)
        self.close()
        assert not self._open, [self.elements[i][0] for i in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} repeats an attribute"
        values = {name: value or "" for name, value in attrs}
        self.elements.append((tag, values, [], list(self._open)))
        if tag not in self.VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        opened = self.elements[self._open.pop()][0]
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data: str) -> None:
        if self._open:
            self.elements[self._open[-1]][2].append(data)

    def find(self, tag: str, inside: str = "") -> list[tuple[dict[str, str], str]]:
        """(attributes, text) of the elements `tag`, within one of class `inside` if given."""
        return [
            (attributes, "".join(own))
            for name, attributes, own, parents in self.elements
            if name == tag
            and (not inside or any(inside in self.elements[i][1].get("class", "").split() for i in parents))
        ]

    def text(self, tag: str) -> str:
        """All text inside the elements `tag`."""
        at = {i for i, element in enumerate(self.elements) if element[0] == tag}
        return " ".join(
            "".join(own) for i, (_, _, own, parents) in enumerate(self.elements) if i in at or at.intersection(parents)
        )

    def assert_self_contained(self) -> None:
        """Nothing on the page is loaded from elsewhere."""
        for tag, attributes, own, _ in self.elements:
            assert tag not in {"link", "iframe", "object", "embed", "base", "img"}
            for name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster", "background"):
                assert name not in attributes, (tag, name)
            assert not any(name.startswith("on") for name in attributes), tag
            style = attributes.get("style", "") + ("".join(own) if tag == "style" else "")
            assert "url(" not in style
            assert "@import" not in style


@pytest.fixture(scope="session")
def parse() -> type[Page]:
    """`Page`: raises AssertionError where the HTML is not balanced."""
    return Page
