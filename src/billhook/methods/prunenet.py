"""PruneNet: a small policy learns, from weights alone, which MLP neurons leave with the least change of a spectrum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from billhook.calibrate.gram import Gram
from billhook.calibrate.walk import Needs, Walk
from billhook.errors import BillhookError
from billhook.methods.base import Paper, register
from billhook.methods.structured import Dims, WidthMethod, random_scores
from billhook.progress import bar
from billhook.sparsity.policy import LinearPolicy, TwoLayerPolicy, reinforce, row_features
from billhook.sparsity.refit import refit
from billhook.sparsity.spectrum import kept_values, kolmogorov_smirnov, singular_values, wasserstein
from billhook.sparsity.structure import rounded, strongest
from billhook.surgery.shrink import keep_neurons_
from billhook.surgery.slim import dims_of


@register("prunenet")
class PruneNet(WidthMethod):
    title = "PruneNet"
    paper: ClassVar[Paper | None] = Paper(
        "You Only Prune Once: Designing Calibration-Free Model Compression With Policy Learning",
        "A. Sengupta, S. Chaudhary, T. Chakraborty",
        "ICLR 2025",
        "2501.15296",
    )
    summary = (
        "Removes MLP neurons by one learned direction: policy gradient finds the projection of a neuron's weights by "
        "which the rows that stay have the singular values of all. Attention stays; no text is read."
    )
    when = (
        "Only where no text may be read; with any text take fasp or modegpt. On the demo model without 20% of its "
        "neurons the spectra are nearer than with random ones (0.094 against 0.109), and the model is far worse: "
        "perplexity 6,808 and 9,160 (two seeds) against 146 to 330 for random neurons (score=random) and 37 to 41 for "
        "fasp's; dense 28."
    )
    needs: ClassVar[Needs] = "nothing"

    sparsity: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="Fraction of the blocks' parameters removed, all of it MLP neurons: of them leaves "
        "sparsity · block / MLP (their parameters).",
    )
    score: Literal["policy", "norm", "random"] = Field(
        "policy", description="What ranks neurons; norm (of the scored rows) and random are controls."
    )
    policy: Literal["linear", "official"] = Field(
        "linear", description="linear: one direction; official: the published two layers, which come to the same form."
    )
    matrix: Literal["gate", "gate+up"] = Field("gate", description="Whose rows are scored where the MLP is gated.")
    norm_feature: bool = Field(True, description="The policy sees a row's norm too, not only the row; linear only.")
    reward: Literal["ks", "wasserstein"] = Field("ks", description="Distance of the spectra that is made small.")
    episodes: int = Field(32, ge=1, description="Steps of the policy.")
    selections: int = Field(2, ge=2, description="Selections drawn per block and episode.")
    lr: float | None = Field(None, gt=0, description="Of Adam; 0.05 for linear and 0.001 for official unless given.")
    gamma: float = Field(1.0, gt=0, le=1, description="Weight of a block over that of the one before; the paper: 0.99.")
    every: int = Field(3, ge=1, description="The policy learns on every n-th block, and is applied to all.")
    learn_at: float | None = Field(
        None, gt=0, lt=1, description="Share of neurons removed while it learns; that of the block unless given."
    )
    restore: bool = Field(False, description="Refit the down projection on calibration data.")
    damping: float = Field(1e-3, ge=0, description="Of the refit, in units of the mean diagonal of the Gram matrix.")
    draw: int = Field(0, ge=0, description="Seed of the draws, and of score=random.")

    @property
    def requires(self) -> Needs:
        return "calibration" if self.restore or self.sharing != "uniform" else "nothing"

    def prune(self, walk: Walk) -> None:
        widths = [self._width(block, ratio) for block, ratio in zip(walk.blocks, self.ratios(walk), strict=True)]
        learnt = self._learnt(walk, widths) if self.score == "policy" else None
        for block in walk:
            width, mlp = widths[block.index], _mlp(block.module)
            if width is None or width == mlp.down_proj.in_features:
                continue
            down = mlp.down_proj
            rows = torch.cat([getattr(mlp, name).weight.detach() for name in self._scored(block.module)], dim=1)
            if self.score == "random":
                scores = random_scores(block, len(rows), self.draw).to(rows.device)
            elif learnt is None:
                scores = rows.double().norm(dim=1)
            else:
                scores = self._features(rows) @ learnt.to(rows.device)
            keep = strongest(scores, width)
            new = None
            if self.restore:
                site = self.site(block, "mlp.down_proj")
                assert site is not None
                new = refit(down.weight, block.collect(Gram, [site])[site].matrix, keep, self.damping)
            keep_neurons_(block.module, keep)
            if new is not None:
                down.weight.data.copy_(new.to(down.weight.dtype))

    # -- the policy ---------------------------------------------------------------------------------------

    def _learnt(self, walk: Walk, widths: list[int | None]) -> Tensor | None:
        """The direction v that ranks neurons, float64; None where nothing leaves. Tells the user how it compares."""
        counts = {
            index: width if self.learn_at is None else max(1, round(size * (1 - self.learn_at)))
            for index, (block, width) in enumerate(zip(walk.blocks, widths, strict=True))
            if width is not None and width < (size := _mlp(block).down_proj.in_features)
        }
        if not counts:
            return None
        chosen = list(counts)[:: self.every]
        found = walk.remembered("policy", lambda: self.learn(walk, {index: counts[index] for index in chosen}))
        random, learnt = found.pop("random"), found.pop("policy")
        kind = "Kolmogorov-Smirnov" if self.reward == "ks" else "Relative Wasserstein"
        walk.notes.append(
            f"{kind} distance of the spectra, mean over {len(chosen)} blocks: {learnt:.3f} with the policy's neurons, "
            f"{random:.3f} with random ones. A nearer spectrum need not mean a better model: compare with score=random."
        )
        return torch.tensor([found[str(i)] for i in range(len(found))], dtype=torch.float64)

    def learn(self, walk: Walk, counts: dict[int, int]) -> dict[str, float]:
        """REINFORCE on minus the distance between the spectra of all rows and of those kept; one step per episode.

        The policy that is returned is the one whose selection without noise is nearest on average.

        Args:
            counts: rows to keep, per block to learn on.
        """
        generator = torch.Generator().manual_seed(self.draw)
        full: dict[int, Tensor] = {}
        grams: dict[int, Tensor] = {}

        def reward(index: int, rows: Tensor, keep: Tensor) -> float:
            kept = kept_values(rows, grams[index], keep)
            if self.reward == "ks":
                return -kolmogorov_smirnov(full[index], kept)
            return -wasserstein(full[index], kept) / (float(full[index].mean()) or 1.0)

        random: list[float] = []
        shape = torch.Size()
        for index, rows in self._rows(walk, counts):
            grams[index], full[index], shape = rows.T @ rows, singular_values(rows), rows.shape
            for _ in range(self.selections):
                drawn = torch.randperm(len(rows), generator=generator)[: counts[index]]
                random.append(-reward(index, rows, drawn.to(rows.device)))

        policy = self._policy(shape[0], shape[1], generator).to(walk.device)
        default = 0.05 if self.policy == "linear" else 1e-3
        optimiser = torch.optim.Adam(policy.parameters(), lr=default if self.lr is None else self.lr)
        best, direction = float("inf"), torch.empty(0)
        with torch.enable_grad(), bar("policy", self.episodes) as step:
            for episode in range(self.episodes + 1):  # the last one only judges
                distance = 0.0
                for index, rows in self._rows(walk, counts):
                    logits, count = policy(self._features(rows)), counts[index]
                    distance -= reward(index, rows, strongest(logits.detach(), count)) / len(counts)
                    if episode < self.episodes:
                        loss = reinforce(logits, count, partial(reward, index, rows), self.selections, generator)
                        (loss * self.gamma**index / len(counts)).backward()  # type: ignore[no-untyped-call]
                if distance < best:
                    best, direction = distance, policy.direction()[0]
                optimiser.step()
                optimiser.zero_grad()
                step(f"distance {distance:.4f}", advance=int(episode > 0))
        return {"random": sum(random) / len(random), "policy": best} | {
            str(i): value for i, value in enumerate(direction.tolist())
        }

    def _policy(self, count: int, width: int, generator: torch.Generator) -> LinearPolicy | TwoLayerPolicy:
        if self.policy == "official":
            return TwoLayerPolicy(width, count, generator)
        return LinearPolicy(width + self.norm_feature)

    def _features(self, rows: Tensor) -> Tensor:
        if self.policy == "official":
            return row_features(rows, gain=1.0, norm=False)
        return row_features(rows, norm=self.norm_feature)

    def _rows(self, walk: Walk, indices: dict[int, int]) -> Iterator[tuple[int, Tensor]]:
        """The scored matrix of these blocks, float64 [n, d] each, one at a time."""
        wanted = {index: {f"mlp.{name}" for name in self._scored(walk.blocks[index])} for index in indices}
        sites = [site for site in walk.all_sites() if site.projection in wanted.get(site.block, ())]
        parts: list[Tensor] = []
        for site, weight in walk.weights(sites):
            parts.append(weight.double())
            if len(parts) == len(wanted[site.block]):
                yield site.block, torch.cat(parts, dim=1)
                parts = []

    def _scored(self, block: Any) -> list[str]:
        """Names of the matrices whose rows are scored."""
        gated = hasattr(_mlp(block), "gate_proj")
        if not gated:
            return ["up_proj"]
        return ["gate_proj"] if self.matrix == "gate" else ["gate_proj", "up_proj"]

    # -- how much -----------------------------------------------------------------------------------------

    def check(self, walk: Walk) -> None:
        ratio = self.overall(walk)
        widths = [self._width(block, ratio) for block in walk.blocks]
        read = {_mlp(b).up_proj.in_features for b, w in zip(walk.blocks, widths, strict=True) if w is not None}
        if self.score == "policy" and len(read) > 1:
            raise BillhookError(
                f"One policy ranks the neurons of all blocks, but their MLPs read {min(read)} to {max(read)} channels: "
                "use score=norm, or a method that looks at each block by itself, such as fasp."
            )

    def shapes(self, walk: Walk, ratios: Sequence[float]) -> list[Dims | None]:
        result: list[Dims | None] = []
        for block, ratio in zip(walk.blocks, ratios, strict=True):
            width, dims = self._width(block, ratio), dims_of(block)
            if width is not None:
                dims["mlp"]["width"] = width
            result.append(dims)
        return result

    def most(self, walk: Walk) -> float:
        shares = [neurons / total for total, neurons in map(_counted, walk.blocks) if neurons]
        return 0.95 * min(shares, default=1.0)  # something has to stay

    def _width(self, block: Any, ratio: float) -> int | None:
        """How many neurons stay, to remove `ratio` of the block; None where there is nothing to narrow.

        Raises:
            BillhookError: that is more than the block's neurons hold.
        """
        if block.self_attn is None and block.mlp is None:
            return None
        total, neurons = _counted(block)
        share = ratio * total / max(neurons, 1)
        size = block.mlp.down_proj.in_features if block.mlp is not None else 0
        if ratio > 0 and size * (1 - share) < 0.5:
            raise BillhookError(
                f"{ratio:.0%} of a block cannot be removed when its MLP neurons, which alone leave, are "
                f"{neurons / total:.0%} of it: lower the sparsity, or use fasp, which narrows the attention too."
            )
        return rounded(size * (1 - share), self.round, size) if size else None


def _counted(block: Any) -> tuple[int, int]:
    """Parameters of a block, and how many of them are in its neurons."""
    total = sum(p.numel() for p in block.parameters())
    if block.mlp is None:
        return total, 0
    return total, sum(p.numel() for name, p in block.mlp.named_parameters() if name != "down_proj.bias")


def _mlp(block: Any) -> Any:
    return block.mlp
