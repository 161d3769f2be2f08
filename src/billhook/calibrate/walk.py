"""The walk: one loop over the blocks of a model that owns all of scale.

    for block in walk(model, batches):
        norms = block.collect(ColumnNorm)
        for site in block.sites:
            site.mask(...)

A method sees block k with its true inputs (its predecessors are already pruned), reads statistics, edits the
weights of the block's sites, and asks for the next. Streaming, offloading, checkpoint and resume, processes,
progress and measurement happen here and nowhere else.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from billhook.anatomy import Anatomy, Site, anatomy_of, block_names, find_blocks, sites_of
from billhook.anatomy.sites import stages_of
from billhook.calibrate import distributed
from billhook.calibrate.activations import Activations
from billhook.calibrate.attention import in_strips
from billhook.calibrate.capture import Batch, Capture, Stop, inference, quiet, surroundings
from billhook.calibrate.halting import Halting, Rehearsal
from billhook.calibrate.journal import Journal, block_tensors
from billhook.calibrate.padding import real_tokens, rows, sequences
from billhook.calibrate.precision import Precision, forward_precision, has_bf16, resolve, statistics_precision
from billhook.calibrate.statistics import Statistic
from billhook.errors import BillhookError
from billhook.models.source import Resident, Source, Streamed, dtype_of, source_of
from billhook.progress import bar
from billhook.record import BlockRecord, SiteRecord
from billhook.surgery.modeling_slim import SlimAttention, SlimBlock
from billhook.surgery.shrink import keep_blocks_
from billhook.surgery.slim import dims_of, resize_
from billhook.system import finite, free_memory, peak_memory, release_memory, resident_memory

log = logging.getLogger("billhook")

R = TypeVar("R")
Needs = Literal["calibration", "nothing", "forward"]

_PROBE_ROWS = 256
State = Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]

_STATE_SECONDS = 60.0  # at most so much of a long step is lost
_HELD = 1 << 30  # bytes of one site's inputs over all calibration data that may be held
_SNAPSHOT_SHARE = 0.05  # of the time may go into saving hidden states for a resume


class Block:
    """One block at its turn.

    Attributes:
        index, name, module: which block it is.
        sites: its prunable weights.
        stages: the sites grouped by the input they share, in the order of execution.
    """

    def __init__(self, walk: Walk, index: int) -> None:
        self._walk = walk
        self.index = index
        self.name = walk.names[index]
        self.module = walk.blocks[index]
        self.sites = walk.sites[index]
        self.stages = stages_of(self.sites, walk.anatomy)
        self.seconds: dict[str, float] = {}
        self._probes: dict[Site, tuple[Tensor, Tensor]] = {}  # input rows and dense outputs
        self._gathered: dict[Any, dict[Site, Any]] = {}  # statistic -> site -> result of its last pass
        self._held: dict[Site, list[Tensor]] = {}  # inputs by batch, from the pass that was told to hold them
        self._known: dict[nn.Module, tuple[Site, list[Tensor]]] = {}  # parts that are not computed any more
        self._left: list[Tensor] | None = None  # outputs by batch, before they are turned by
        self._basis: Tensor | None = None
        self._halting: Halting | None = None  # passes that go on once the sites before are edited
        self._dense_output: Tensor | None = None
        self._repeats = False  # whether a site is called more than once in a pass
        self._shapes = {site: site.shape for site in self.sites}  # before anything is removed

    def collect(
        self, statistic: type[Statistic[R]], sites: Sequence[Site] | None = None, *, hold: Sequence[Site] = ()
    ) -> dict[Site, R]:
        """One pass over the calibration data through the block as it is now.

        Args:
            statistic: what to gather of each site's input.
            sites: which sites; all of the block by default.
            hold: sites whose inputs are kept, where they are few enough, for `proceed_from`.

        Returns:
            The statistic's result per site. Sites that read the same tensor share one result object.

        Raises:
            BillhookError: an input is not finite; names block and site.
        """
        wanted = list(self.sites if sites is None else sites)
        kinds = self._kinds(statistic)
        results = self._pass(kinds, wanted, [site for site in hold if self._walk.holds(site.shape[1])])
        for kind in kinds:
            self._gathered.setdefault(kind, {}).update(results[kind])
        return results[statistic]

    def _kinds(self, statistic: type[Statistic[Any]]) -> list[type[Statistic[Any]]]:
        """What a pass gathers: what is asked, and its companions."""
        return [statistic, *(kind for kind in self._walk.companions if kind is not statistic)]

    def in_turn(
        self, statistic: type[Statistic[R]], *, together: bool = False
    ) -> Iterator[tuple[list[Site], dict[Site, R]]]:
        """The sites stage by stage with their statistic: the inputs that they have once the stages before are edited.

        One pass in all: it halts at every stage, where the caller edits the weights of that stage and no others,
        and its end are the block's outputs. Where activations are too many to be held, or the block does not read
        its sites one stage after the other, each stage costs a pass of its own; what comes out is the same.

        Args:
            statistic: what to gather of each site's input.
            together: all sites as one stage, with the inputs of the block as it was.

        Yields:
            The sites of a stage, and the results as in `collect`.

        Raises:
            BillhookError: an input is not finite; names block and site.
        """
        if together:
            yield self.sites, self.collect(statistic)
            return
        if not self._rehearsed():
            for sites in self.stages:
                yield sites, self.collect(statistic, sites)
            return
        walk = self._walk
        kinds = self._kinds(statistic)
        self._halting = Halting(lambda batch: walk.output_of(self, batch), len(walk.inputs), self.stages)
        for number, sites in enumerate(self.stages):
            gathering: dict[Any, dict[Site, Statistic[Any]]] = {kind: {} for kind in kinds}
            with self._timed("collect"), walk.passing():
                for batch in range(len(walk.inputs)):
                    x = self._halting.arrive(number, batch)
                    if x is not None:
                        for site in sites:
                            self._take(site, sites[0], x, batch, gathering)
                release_memory()  # the gaps that passes and solves leave between what is held would add up
            for kind in kinds:
                results = self._results(kind, gathering[kind], sites, walk.device)
                self._gathered.setdefault(kind, {}).update(results)
            yield sites, {site: self._gathered[statistic][site] for site in sites}
            release_memory()

    def _rehearsed(self) -> bool:
        """Pass the first batch, as the block is, where halting passes have room; whether they can halt by stage."""
        if len(self.stages) < 2:
            return False
        # the residual stream before and after the attention, a normed one, and what the widest site reads
        held = 3 * self._walk.inputs[0].shape[-1] + max(site.shape[1] for site in self.sites)
        if not self._walk.has_room(held):
            return False
        with self._timed("collect"), self._walk.passing():
            rehearsal = Rehearsal(self.stages)
            self._dense_output = self._walk.output_of(self, 0)
            orderly, self._repeats = rehearsal.end()
        return orderly

    def proceed_from(self, site: Site, part: nn.Module, columns: Tensor | None = None) -> None:
        """From now on, compute only the last layer of an attention or MLP, from the inputs that were held for it.

        For a part of a slim block of which no other layer changes what it computes, so that passes need not repeat
        them. Does nothing where the inputs were not held.

        Args:
            site: the part's last layer.
            part: the attention or MLP.
            columns: of the held inputs, those that stay.
        """
        held = self._held.pop(site, None)
        if held is None:
            return
        if columns is not None:
            for batch, x in enumerate(held):  # one by one, so that no second copy of all is there
                held[batch] = x.index_select(-1, columns.to(x.device))
        self._known[part] = (site, held)

    @contextmanager
    def _proceeding(self, batch: int) -> Iterator[None]:
        """While inside, parts that are known from their last layer's inputs answer with its output."""

        def answer(part: nn.Module, site: Site, x: Tensor) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                y = site.module(x)
                return (y, None) if isinstance(part, SlimAttention) else y

            return forward

        for part, (site, held) in self._known.items():
            part.forward = answer(part, site, held[batch])
        try:
            yield
        finally:
            for part in self._known:
                del part.forward

    def let_go(self) -> None:
        """Free what is held of passes."""
        self._known.clear()
        self._held.clear()
        self._left = self._basis = None
        if self._halting is not None:
            self._halting.close()
            self._halting = None

    def _output(self, batch: int) -> Tensor:
        """What leaves the block as it is now."""
        if self._halting is not None:
            with self._walk.passing():
                return self._halting.finish(batch)
        if self._left is None or self._basis is None:
            return self._walk.forward(self, batch)
        x = self._left[batch]
        with torch.autocast(x.device.type, enabled=False):
            return (x.to(self._basis.dtype) @ self._basis).to(x.dtype)

    def gathered(self, statistic: type[Statistic[R]], site: Site) -> R:
        """The result of a statistic for one site: from the last pass, or from one made now if there was none."""
        known = self._gathered.setdefault(statistic, {})
        if site not in known:
            known.update(self._pass([statistic], self.sites)[statistic])
        result: R = known[site]
        return result

    def between(self, statistic: type[Statistic[R]], *, hold: Sequence[Site] = ()) -> R:
        """One pass; the statistic of the residual stream between attention and MLP of a slim block; `hold` as above.

        Where an earlier step removed the MLP, that is what leaves the block.
        """
        at = self.module.get_submodule("post_attention_layernorm") if self.module.mlp is not None else None
        return self._stream(statistic, at, hold)

    def leaving(self, statistic: type[Statistic[R]]) -> R:
        """One pass; the statistic of the residual stream that leaves the block, which is kept for `turn`."""
        self._left = [] if self._walk.holds(int(self._walk.spec["hidden"])) else None
        return self._stream(statistic, None)

    def turn(self, basis: Tensor) -> None:
        """The outputs of the block are those of the last `leaving` pass times `basis`, [hidden, new width].

        The block as it is now computes the same; where the outputs were not kept it is left to do so.
        """
        self._basis = basis

    def _stream(self, statistic: type[Statistic[R]], at: nn.Module | None, hold: Sequence[Site] = ()) -> R:
        found: list[Statistic[R]] = []

        def feed(x: Tensor) -> None:
            if not found:
                found.append(statistic(x.shape[-1], x.device))
            with torch.autocast(x.device.type, enabled=False):
                found[0].update(self._walk.rows(batch, x))

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            feed(args[0])
            raise Stop

        handle = at.register_forward_pre_hook(hook) if at is not None else None
        try:
            with (
                self._timed("collect"),
                forward_precision(self._walk.precision, self._walk.device),
                self._holding([site for site in hold if self._walk.holds(site.shape[1])]),
            ):
                for batch in range(len(self._walk.inputs)):
                    with suppress(Stop):
                        output = self._walk.forward(self, batch)
                        if at is None:
                            feed(output)
                            if self._left is not None:
                                self._left.append(output)
        finally:
            if handle is not None:
                handle.remove()
        distributed.sum_(found[0].sums)
        if not all(finite(t) for t in found[0].sums):
            raise BillhookError(
                f"The residual stream of block {self.index} is not finite on the calibration data: use a wider --dtype "
                "such as float32, or check the model."
            )
        return found[0].result()

    def _pass(
        self, kinds: Sequence[type[Statistic[Any]]], wanted: list[Site], hold: Sequence[Site] = ()
    ) -> dict[Any, dict[Site, Any]]:
        """Gather several statistics of the wanted sites at once."""
        if self._halting is not None:
            raise BillhookError(f"The passes of block {self.index} have halted in its middle: collect before in_turn.")
        if self._walk.current is not self:
            raise BillhookError(
                f"The walk is not at block {self.index} any more: collect inside the loop over the walk."
            )
        gathering: dict[Any, dict[Site, Statistic[Any]]] = {kind: {} for kind in kinds}
        device = self._walk.device
        # one context around all batches: weights are then rounded once, not once per batch
        with (
            self._timed("collect"),
            forward_precision(self._walk.precision, device),
            self._holding(hold),
        ):
            for batch in range(len(self._walk.inputs)):
                output: Tensor | None = None  # stays so where the pass ends early
                with self._listening(wanted, gathering, batch):
                    output = self._walk.forward(self, batch)
                if output is not None and batch == 0 and self._dense_output is None:
                    self._dense_output = output
        return {kind: self._results(kind, gathering[kind], wanted, device) for kind in kinds}

    def _results(
        self, kind: type[Statistic[R]], statistics: dict[Site, Statistic[R]], wanted: list[Site], device: torch.device
    ) -> dict[Site, R]:
        for site in wanted:
            if site not in statistics:  # never called: an expert that no token was routed to
                statistics[site] = kind(site.shape[1], device)
        distinct = list({id(s): s for s in statistics.values()}.values())
        for one in distinct:
            distributed.sum_(one.sums)
        for site in wanted:
            if not all(finite(t) for t in statistics[site].sums):
                raise BillhookError(
                    f"The input of {site.name} (block {self.index}) is not finite on the calibration data: use "
                    "a wider --dtype such as float32, or check the model."
                )
        results = {id(s): s.result() for s in distinct}
        return {site: results[id(statistics[site])] for site in wanted}

    @contextmanager
    def _listening(
        self, wanted: list[Site], gathering: dict[Any, dict[Site, Statistic[Any]]], batch: int
    ) -> Iterator[None]:
        """Hooks that feed the statistics, and end the pass once every site was seen."""
        read: dict[int, tuple[Tensor, Site]] = {}  # inputs of this batch by identity; the tensor is kept alive
        missing = set(wanted)
        whole_pass = batch == 0 and self._dense_output is None
        handles = []

        def listen(site: Site) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0]
                leader = read.setdefault(id(x), (x, site))[1]
                self._take(site, leader, x, batch, gathering)
                if whole_pass and site not in missing:
                    self._repeats = True
                missing.discard(site)
                if not missing and not whole_pass and not self._repeats:
                    raise Stop

            return hook

        for site in wanted:
            handles.append(site.module.register_forward_pre_hook(listen(site)))
        try:
            yield
        except Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def _take(
        self, site: Site, leader: Site, x: Tensor, batch: int, gathering: dict[Any, dict[Site, Statistic[Any]]]
    ) -> None:
        """Take in what `site` reads of one batch, and `leader` was the first to read."""
        real = self._walk.real[batch]
        with statistics_precision(self._walk.precision, x.device):
            for kind, statistics in gathering.items():
                _feed(kind, statistics, site, leader, x, real)
        self._probe(site, rows(x, real))

    @contextmanager
    def _holding(self, sites: Sequence[Site]) -> Iterator[None]:
        """Hooks that keep the inputs of sites; each must be called once per batch."""

        def keep(site: Site) -> Any:
            self._held[site] = []
            return lambda module, args: self._held[site].append(args[0])

        handles = [site.module.register_forward_pre_hook(keep(site)) for site in sites]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _probe(self, site: Site, tokens: Tensor) -> None:
        """Keep some rows of a site's input and the dense outputs for them, to measure its error afterwards."""
        if site not in self._probes:
            rows = torch.linspace(0, len(tokens) - 1, min(_PROBE_ROWS, len(tokens))).long()
            with torch.autocast(tokens.device.type, enabled=False):
                x = tokens[rows.to(tokens.device)].float()
                self._probes[site] = (x, x @ site.weight.float().T)

    def observe(self) -> None:
        """A dense pass over the first batch, for the report, where the method collects nothing."""
        read: set[Site] = set()

        def listen(site: Site) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                self._probe(site, self._walk.rows(0, args[0]))
                read.add(site)

            return hook

        handles = [site.module.register_forward_pre_hook(listen(site)) for site in self.sites]
        try:
            with self._timed("collect"):
                self._dense_output = self._walk.forward(self, 0)
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._walk.device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def _site_records(self) -> list[SiteRecord]:
        inside = {id(module) for module in self.module.modules()}  # a method may have removed some
        present = {site for site in self.sites if id(site.module) in inside}
        targets = self._walk.targets
        return [self._site_record(site, targets.get(site.name, 0.0), present) for site in self.sites]

    def _site_record(self, site: Site, asked: float, present: set[Site]) -> SiteRecord:
        weight, shape = site.weight, self._shapes[site]
        error = None
        if site in self._probes and tuple(weight.shape) == shape:
            x, dense = self._probes[site]
            with torch.autocast(weight.device.type, enabled=False):
                error = _relative_error(dense, x @ weight.float().T)
        return SiteRecord(
            site=site.name,
            block=self.index,
            projection=site.projection,
            shape=shape,
            asked=asked,
            sparsity=1.0 - (int(torch.count_nonzero(weight)) / math.prod(shape) if site in present else 0.0),
            error=error,
        )


class Walk:
    """An iterator over the blocks of a model; see the module's description. Can be iterated once.

    Args:
        model: a model in memory, or one opened for streaming.
        batches: calibration batches: tensors (token ids [b, n] or pixels) or dicts of tensors. Under torchrun
            every process is given all of them and takes its share.
        anatomy: for models of no declared family.
        device: where blocks are computed; their weights are there only for their turn.
        precision: how matrix products of the passes are computed ("auto", "highest", "bf16").
        needs: "calibration": blocks see all batches; "nothing": only the first, for the report; "forward": all,
            and the last block's outputs are kept for `outputs`.
        journal: finished blocks are written there, and a new walk goes on after the last of them. Required for a
            streamed model that is edited.
        max_memory: bytes of resident memory to stay under; hidden states go to disk to honour it.
        label: what the progress bar says.
        shared: this process's share of the batches, where it is known already; `batches` is then ignored.
        source: where weights are, if not where the model says.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch] = (),
        *,
        anatomy: Anatomy | None = None,
        device: torch.device | str | None = None,
        precision: Precision = "auto",
        needs: Needs = "calibration",
        journal: Journal | None = None,
        max_memory: int | None = None,
        label: str = "walk",
        shared: Sequence[Batch] | None = None,
        source: Source | None = None,
    ) -> None:
        self.model = model
        self.anatomy = anatomy_of(model, anatomy)
        self.blocks = find_blocks(model, self.anatomy)
        self.names = block_names(model, self.anatomy)
        self.sites = sites_of(model, self.anatomy)
        self.source = source or source_of(model)
        self.journal = journal
        self.needs = needs
        self.label = label
        self.max_memory = max_memory
        self.targets: dict[str, float] = {}  # site name -> sparsity asked; set by the method, for the record
        self.companions: list[type[Statistic[Any]]] = []  # gathered in every collecting pass besides what is asked
        self.notes: list[str] = []  # what the user should know of how it went
        self.looks: dict[str, dict[str, float]] | None = None  # what other runs over the same model and data found
        self.originals: Callable[[str], Tensor] | None = None  # parameters before the run's first step, by full name
        self.entry: Tensor | None = None  # what the first block's inputs are multiplied by, [hidden, width]
        self.carry: dict[str, Tensor] = {}  # what a method hands from one block to the next, kept with the block
        self.block_records: list[BlockRecord] = []
        self.site_records: list[SiteRecord] = []
        self.resumed_at = 0
        self.current: Block | None = None
        self._remembered: dict[str, dict[str, float]] = {}
        self._state_kept = time.monotonic()
        self._snapshot_cost = 0.0  # seconds that saving the hidden states took last time

        first = next(p for block in self.blocks for p in block.parameters())
        default = "cpu" if first.device.type == "meta" else first.device
        self.device = torch.device(device if device is not None else default)
        self.dtype = dtype_of(model)
        self.precision = resolve(precision, self.device, self.dtype)
        if precision == "bf16" and needs != "nothing" and not has_bf16(self.device):
            log.warning(
                "This %s does not multiply bfloat16 in hardware: precision bf16 is several times slower here than "
                "highest, and less exact.",
                {"cpu": "processor", "cuda": "GPU"}.get(self.device.type, "device"),
            )

        if shared is None and len(batches) == 0 and needs != "nothing":
            raise BillhookError("Calibration batches are needed but none were given.")
        if 0 < len(batches) < distributed.world():
            raise BillhookError(
                f"{len(batches)} calibration batches cannot be split over {distributed.world()} processes: give at "
                "least one batch per process."
            )
        if self.source.streams and journal is None and needs != "forward":
            raise BillhookError("This model is streamed from disk, so its result needs a folder: give out=.")
        own = list(batches)[distributed.rank() :: distributed.world()] if shared is None else list(shared)
        self.batches: list[Batch] = own[:1] if needs == "nothing" else own
        self.real = [real_tokens(batch) for batch in self.batches]  # where a batch has padding: what is none, [b, t]
        self.inputs: Activations = Activations(0, self.device)
        self._scratch: Path | None = None
        self._as_tuple = False

    # -- what a method reads ------------------------------------------------------------------------------

    def all_sites(self) -> list[Site]:
        """Every site of the model, in order."""
        return [site for block in self.sites for site in block]

    def weights(self, wanted: Sequence[Site] | None = None) -> Iterator[tuple[Site, Tensor]]:
        """Every site, or these, with its present weight [out, in], one block in memory at a time; for reading only."""
        for name, module, all_sites in zip(self.names, self.blocks, self.sites, strict=True):
            sites = [site for site in all_sites if wanted is None or site in wanted]
            if not sites:
                continue
            self.source.load(module, name, self.device)
            try:
                for site in sites:
                    yield site, site.weight
            finally:
                self.source.release(module, name)

    def forward(self, block: Block, batch: int) -> Tensor:
        """The block's output for one batch of its present inputs."""
        with self.passing(), block._proceeding(batch):
            return self.output_of(block, batch)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """What forward passes of blocks are computed in."""
        with inference(self.model), forward_precision(self.precision, self.device), in_strips():
            yield

    def output_of(self, block: Block, batch: int) -> Tensor:
        """`forward` for who is inside `passing`."""
        call = self._capture.calls[batch][block.index]
        output = block.module(self.inputs[batch], *call.args, **call.kwargs)
        self._as_tuple = isinstance(output, tuple)
        hidden = output[0] if isinstance(output, tuple) else output
        assert isinstance(hidden, Tensor)
        return hidden

    def rows(self, batch: int, x: Tensor) -> Tensor:
        """The tokens of an activation of one batch, [b, t, width], as rows [tokens, width] without padding."""
        return rows(x, self.real[batch])

    def holds(self, width: int) -> bool:
        """Whether activations of this width are few enough to be kept in memory from one pass to the next.

        By size alone, not by what memory is free, so that the same command does the same.
        """
        if self.max_memory is not None or self.inputs.folder is not None:
            return False
        return self._size(width) <= _HELD

    def has_room(self, width: int) -> bool:
        """Whether activations of this width fit beside everything else, where what comes out is the same either way."""
        if self.inputs.folder is not None:
            return False
        size = self._size(width)
        if self.max_memory is not None:  # twice, for what an allocator leaves between them
            return resident_memory() + 2 * size <= self.max_memory
        return size <= max(_HELD, free_memory(self.device) // 4)

    def _size(self, width: int) -> int:
        """Bytes of activations of this width, over all batches."""
        return self.inputs.positions() * width * self.dtype.itemsize

    def looked(self, name: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Like `remembered`, for what the model and the data alone decide: runs that share `looks` compute it once."""
        key = f"{name} {self.precision}"

        def once() -> dict[str, float]:
            if self.looks is None:
                return make()
            if key not in self.looks:
                self.looks[key] = make()
            return self.looks[key]

        return self.remembered(name, once)

    def remembered(self, name: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """`make()`, computed once per run: a resumed walk reads what the killed one found."""
        if self.journal is None:
            if name not in self._remembered:
                self._remembered[name] = make()
            return dict(self._remembered[name])
        if distributed.agree(int(self.journal.note(name) is not None)):
            return dict(self.journal.note(name) or {})
        made = make()
        if distributed.is_main():
            self.journal.keep_note(name, made)
        distributed.barrier()
        return made

    def keep_state(self, state: State, *, every: float = _STATE_SECONDS) -> None:
        """Keep the state of a long step on disk, if the last time is `every` seconds ago and there is a journal.

        `state` returns tensors and plain values; it is called only if they are written.
        """
        if self.journal is None or time.monotonic() - self._state_kept < every:
            return
        self.journal.keep_state(distributed.rank(), *state())
        self._state_kept = time.monotonic()

    def kept_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What a killed run kept of this step; None unless every process has it."""
        state = self.journal.state(distributed.rank()) if self.journal else None
        return state if distributed.agree_min(int(state is not None)) else None

    @contextmanager
    def original(self, block: Block) -> Iterator[None]:
        """While inside, the block has the weights that it had before the first step of the run.

        Raises:
            BillhookError: this is the first step, so nothing is known of a model before pruning.
        """
        if self.originals is None:
            raise BillhookError(
                "The dense model is needed beside the pruned one: put this step after the pruning, in the same run."
            )
        present = {name: p.data for name, p in block.module.named_parameters()}
        try:
            for name, parameter in block.module.named_parameters():
                parameter.data = self.originals(f"{block.name}.{name}").to(parameter)
            yield
        finally:
            for name, parameter in block.module.named_parameters():
                parameter.data = present[name]

    def call(self, block: Block, batch: int) -> Tensor:
        """Like `forward`, in whatever gradient mode is set: for what is trained inside the block."""
        call = self._capture.calls[batch][block.index]
        with quiet(self.model):
            output = block.module(self.inputs[batch], *call.args, **call.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def dense(self) -> Walk:
        """A walk over the same model and data that edits nothing, to look at all of it before the first block."""
        return Walk(
            self.model,
            (),
            anatomy=self.anatomy,
            device=self.device,
            precision=self.precision,
            needs="forward",
            max_memory=self.max_memory,
            label="look",
            shared=self.batches,
        )

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """All weights on the compute device at once, for what needs the loss of the model; edits nothing.

        Raises:
            BillhookError: the weights alone are over `max_memory`.
        """
        count = sum(p.numel() for p in self.model.parameters())
        if self.max_memory is not None and resident_memory() + count * self.dtype.itemsize > self.max_memory:
            raise BillhookError(
                f"--max-memory {self.max_memory / 1e9:.3g} GB is too little: this needs the whole model in memory, "
                f"{count * self.dtype.itemsize / 1e9:.2f} GB; give more, or choose options that go block by block."
            )
        inside = {id(module) for block in self.blocks for module in block.modules()}
        outside = [(module, name) for name, module in self.model.named_modules() if id(module) not in inside]
        blocks = list(zip(self.blocks, self.names, strict=True))
        try:
            for module, name in outside:
                self.source.load_own(module, name, self.device)
            for module, name in blocks:
                self.source.load(module, name, self.device)
            with inference(self.model):
                yield self.model
        finally:
            for module, name in outside:
                self.source.release_own(module, name)
            for module, name in blocks:
                self.source.release(module, name)

    @contextmanager
    def editing(self, outside: Sequence[str] = ()) -> Iterator[nn.Module]:
        """Like `whole`, for methods that edit all blocks together; on leaving, all are recorded and written.

        Args:
            outside: full names of parameters outside the blocks that are edited too.
        """
        with self.whole() as model, torch.no_grad():
            started = time.perf_counter()
            parameters = dict(model.named_parameters())
            for name in outside:  # may be mapped from a file
                parameters[name].data = parameters[name].data.clone()
            blocks = [Block(self, index) for index in range(len(self.blocks))]  # they know the shapes as they are now
            yield model
            share = (time.perf_counter() - started) / len(self.blocks)
            distributed.from_main_([parameters[name].data for name in outside])
            if outside and self.journal is not None and distributed.is_main():
                self.journal.commit_rest({name: parameters[name].data for name in outside})
            for block in blocks:
                distributed.from_main_([p.data for p in block.module.parameters()])
                block.seconds["solve"] = share
                self._finish(block, None, time.perf_counter())
            if isinstance(self.source, Streamed) and self.journal is not None:
                self.source.refs.update(self.journal.rest())

    @property
    def spec(self) -> dict[str, Any]:
        """What a slim model's configuration says of its blocks."""
        config: Any = self.model.config
        spec: dict[str, Any] = config.slim
        return spec

    def entering(self, statistic: type[Statistic[R]]) -> R:
        """The statistic of the hidden states that enter the first block."""
        look = self.dense()
        try:
            with torch.no_grad():
                look._begin(0)
                found = statistic(look.inputs[0].shape[-1], look.device)
                for batch in range(len(look.inputs)):
                    found.update(look.rows(batch, look.inputs[batch]))
        finally:
            look.close()
        distributed.sum_(found.sums)
        return found.result()

    @contextmanager
    def outside(self, paths: Sequence[str]) -> Iterator[None]:
        """While inside, these modules outside the blocks have their weights; `edited` says which were changed."""
        for path in paths:
            self.source.load_own(self.model.get_submodule(path), path, self.device)
        with torch.no_grad():
            yield
        for path in paths:
            self.source.release_own(self.model.get_submodule(path), path)

    def edited(self, paths: Sequence[str]) -> None:
        """Take over the parameters of modules that were edited in `outside`, and write them."""
        modules = {path: self.model.get_submodule(path) for path in paths}
        tensors = {
            f"{path}.{name}": p.data for path, module in modules.items() for name, p in module.named_parameters()
        }
        distributed.from_main_(list(tensors.values()))
        if self.journal is not None:
            if distributed.is_main():
                self.journal.commit_rest(tensors)
            distributed.barrier()
            if isinstance(self.source, Streamed):
                self.source.refs.update(self.journal.rest())

    def inside(self, label: str = "start") -> Walk:
        """While the model is whole in memory: a walk that edits it there, without a journal."""
        return Walk(
            self.model,
            (),
            anatomy=self.anatomy,
            device=self.device,
            precision=self.precision,
            label=label,
            shared=self.batches,
            source=Resident(),
        )

    def replayed(self) -> bool:
        """Take over everything from the journal if an earlier process finished all blocks."""
        if self.journal is None or distributed.agree(self.journal.finished()) < len(self.blocks):
            return False
        self.resumed_at = len(self.blocks)
        with torch.no_grad():
            for index in range(len(self.blocks)):
                self._replay(index, propagate=False)
            rest = self.journal.rest()
            if isinstance(self.source, Streamed):
                self.source.refs.update(rest)
            else:
                parameters = dict(self.model.named_parameters())
                for name, stored in rest.items():
                    parameters[name].copy_(stored.read())
        return True

    def drop(self, indices: Sequence[int]) -> None:
        """Remove whole blocks of a slim model, in place of iterating over the walk; all blocks are recorded."""
        gone = set(indices)
        counted = {site.name: int(torch.count_nonzero(weight)) for site, weight in self.weights()}
        for index, (name, sites) in enumerate(zip(self.names, self.sites, strict=True)):
            self.block_records.append(BlockRecord(index=index, name=name))
            for site in sites:
                left = 0 if index in gone else counted[site.name]
                self.site_records.append(
                    SiteRecord(
                        site=site.name,
                        block=index,
                        projection=site.projection,
                        shape=site.shape,
                        asked=float(index in gone),
                        sparsity=1.0 - left / site.numel,
                    )
                )
        kept = [i for i in range(len(self.blocks)) if i not in gone]
        keep_blocks_(self.model, kept)
        if isinstance(self.source, Streamed):
            prefixes = {self.names[old]: self.names[new] for new, old in enumerate(kept)}
            self.source.keep_blocks(self.names, prefixes)

    # -- the loop -----------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Block]:
        done = distributed.agree(self.journal.finished() if self.journal else 0)
        self.resumed_at = done
        try:
            with torch.no_grad(), bar(self.label, len(self.blocks)) as step:
                replay_from = self._begin(done)
                last_snapshot = time.perf_counter()
                for index in range(len(self.blocks)):
                    if index < done:
                        self._replay(index, propagate=index >= replay_from)
                        step("resumed")
                        continue
                    block = Block(self, index)
                    with block._timed("load"):
                        self.source.load(block.module, block.name, self.device)
                    if self.needs == "nothing" and self.batches:
                        block.observe()
                    started, inside = time.perf_counter(), sum(block.seconds.values())
                    self.current = block
                    yield block
                    self.current = None
                    block.seconds["solve"] = time.perf_counter() - started - (sum(block.seconds.values()) - inside)
                    if self.needs != "forward":
                        distributed.from_main_([p.data for p in block.module.parameters()])
                    error = self._propagate(block)
                    last_snapshot = self._finish(block, error, last_snapshot)
                    step(f"{self.names[index]}" + (f"  error {error:.3g}" if error is not None else ""))
        finally:
            if self.current is not None:
                self.current.let_go()
            self.current = None
            if self.needs != "forward":
                self.close()

    def _begin(self, done: int) -> int:
        """Fill `inputs` for the first block that must be passed; returns that block's index."""
        rank, world = distributed.rank(), distributed.world()
        if isinstance(self.source, Streamed) and done == 0:
            self.source.check_rest(self.anatomy.blocks)
        self._capture = Capture(self.model, self.anatomy, self.source, self.device, self.batches)
        if not self.batches or done == len(self.blocks):
            return done
        saved = self.journal.latest_inputs(done, rank, world) if self.journal else None
        start = distributed.agree_min(saved[0] if saved else 0)
        held: list[Tensor] = []
        spill = self._must_spill()
        if start == 0:
            self.inputs = self._activations(0, spill)
            self._capture.run(lambda i, hidden: self.inputs.__setitem__(i, self._entered(hidden)))
        else:
            self._capture.run(lambda i, hidden: held.clear())
            assert self.journal is not None
            stored = Activations.open(self.journal.inputs(start, rank, world), self.device)
            self.inputs = stored if spill else stored.in_memory()
        return start

    def _entered(self, hidden: Tensor) -> Tensor:
        if self.entry is None:
            return hidden.clone()
        return (hidden.double() @ self.entry.to(hidden.device)).to(hidden.dtype)

    def _replay(self, index: int, propagate: bool) -> None:
        """Pass a block that an earlier process finished."""
        assert self.journal is not None
        stored = self.journal.stored(index)
        name, module = self.names[index], self.blocks[index]
        record = self.journal.record(index)
        self.block_records.append(BlockRecord.model_validate(record["block"]))
        self.site_records += [SiteRecord.model_validate(s) for s in record["sites"]]
        carried = self.journal.carried(index)
        if carried is not None:
            self.carry = {key: tensor.to(self.device) for key, tensor in carried.items()}
        if "dims" in record:
            config: Any = self.model.config
            resize_(module, config.slim, record["dims"])
            self.sites[index] = sites_of(self.model, self.anatomy)[index]
        if isinstance(self.source, Streamed):
            self.source.refs.update(stored)
        else:
            for full, parameter in block_tensors(name, module).items():
                parameter.copy_(stored[full].read())
        if propagate and self.batches:
            self.source.load(module, name, self.device)
            self._propagate(Block(self, index))
            self.source.release(module, name)

    def _propagate(self, block: Block) -> float | None:
        """Replace the inputs by the outputs of the block as it is now; returns its output error."""
        if not self.batches:
            return None
        error = None
        last = block.index == len(self.blocks) - 1 and self.needs != "forward"
        spill = self.inputs.folder is not None
        with block._timed("propagate"), forward_precision(self.precision, self.device):
            outputs = self._activations(block.index + 1, spill) if spill else self.inputs
            for batch in range(1 if last else len(self.inputs)):
                output = block._output(batch)
                if not finite(output):
                    raise BillhookError(
                        f"The output of block {block.index} ({block.name}) is not finite: use a wider --dtype such as "
                        "float32, or a lower sparsity."
                    )
                if batch == 0 and block._dense_output is not None:
                    error = _relative_error(block._dense_output.float(), output.float())
                outputs[batch] = output
            block._dense_output = None
            self.inputs = outputs
        return error

    def _finish(self, block: Block, error: float | None, last_snapshot: float) -> float:
        """Record and write a finished block, then let it go; returns when hidden states were last saved."""
        if self.needs == "forward":
            self.source.release(block.module, block.name)
            return last_snapshot
        with block._timed("write"):
            sites = block._site_records()
            record = BlockRecord(index=block.index, name=block.name, seconds=block.seconds, error=error)
            if self.journal is not None:
                last_snapshot = self._commit(block, record, sites, last_snapshot)
            block.let_go()
            self.source.release(block.module, block.name)
            release_memory()
        record.seconds = dict(block.seconds)
        record.peak_memory = peak_memory()
        self.block_records.append(record)
        self.site_records += sites
        return last_snapshot

    def _commit(self, block: Block, record: BlockRecord, sites: list[SiteRecord], last_snapshot: float) -> float:
        assert self.journal is not None
        rank, world = distributed.rank(), distributed.world()
        after = block.index + 1
        started = time.perf_counter()
        held = block._known or block._basis is not None
        # Hidden states of block k+1 must be whole before block k counts as finished: a resume may need them.
        if len(self.inputs) and after < len(self.blocks):
            if self.inputs.folder is not None:
                self.inputs.seal()
            # what was held is gone in a resumed run, and computing it from narrower layers rounds differently
            elif held or self._snapshot_cost < _SNAPSHOT_SHARE * (started - last_snapshot):
                self.inputs.save(self.journal.inputs(after, rank, world))
                last_snapshot = time.perf_counter()
                self._snapshot_cost = last_snapshot - started
        if distributed.is_main():
            record.peak_memory = peak_memory()
            entry = {"block": record.model_dump(), "sites": [s.model_dump() for s in sites]}
            if isinstance(block.module, SlimBlock):
                entry["dims"] = dims_of(block.module)
            if self.carry:
                self.journal.keep_carry(block.index, self.carry)
            self.journal.commit(block.index, block_tensors(block.name, block.module), entry)
        distributed.barrier()
        if isinstance(self.source, Streamed):
            self.source.refs.update(self.journal.stored(block.index))
        latest = self.journal.latest_inputs(after, rank, world)
        if latest is not None:
            self.journal.forget_inputs(latest[0], rank, world)
        return last_snapshot

    def close(self) -> None:
        """Drop the hidden states and scratch files."""
        self.inputs = Activations(0, self.device)
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    # -- the end of the model -----------------------------------------------------------------------------

    @contextmanager
    def outputs(self) -> Iterator[Iterator[Any]]:
        """After a "forward" walk: the model's output (for a language model with `.logits`) batch by batch."""
        try:
            with surroundings(self.model, self.anatomy, self.source, self.device):
                yield (
                    self._capture.finish(index, self.inputs[index], self._as_tuple) for index in range(len(self.inputs))
                )
        finally:
            self.close()

    # -- memory -------------------------------------------------------------------------------------------

    def _activations(self, block: int, spill: bool) -> Activations:
        if not spill:
            return Activations(len(self.batches), self.device)
        if self.journal is not None:
            folder = self.journal.inputs(block, distributed.rank(), distributed.world())
        else:
            if self._scratch is None:
                self._scratch = Path(tempfile.mkdtemp(prefix="billhook-"))
            folder = self._scratch / f"inputs-{block % 2}"
        return Activations(len(self.batches), self.device, folder)

    def _must_spill(self) -> bool:
        """Whether hidden states must go to disk to stay under `max_memory`.

        Raises:
            BillhookError: not even one block and one batch fit.
        """
        if self.max_memory is None:
            return False
        itemsize = self.dtype.itemsize
        widest = max(max(site.shape) for site in self.all_sites())
        hidden = min(min(site.shape[1] for site in block) for block in self.sites if block)
        tokens = [_tokens(batch, self.anatomy) for batch in self.batches]
        weights = max(sum(p.numel() for p in block.parameters()) for block in self.blocks) * itemsize
        # one block, its statistics' and solver's copies of the widest matrix, and a forward pass's intermediates
        working = weights + 6 * 4 * max(site.numel for site in self.all_sites())
        working += max(tokens) * (8 * hidden + 4 * widest) * 4
        floor = resident_memory() + working
        if floor > self.max_memory:
            raise BillhookError(
                f"--max-memory {self.max_memory / 1e9:.3g} GB is too little: one block of this model with one batch "
                f"of {max(tokens)} tokens takes about {floor / 1e9:.2f} GB; give more, or use shorter sequences."
            )
        return floor + sum(tokens) * hidden * itemsize > self.max_memory


def walk(model: nn.Module, batches: Sequence[Batch] = (), **options: Any) -> Walk:
    """Walk the blocks of `model` in order; options as in `Walk`."""
    return Walk(model, batches, **options)


def _feed(
    kind: type[Statistic[Any]],
    statistics: dict[Site, Statistic[Any]],
    site: Site,
    leader: Site,
    x: Tensor,
    real: Tensor | None,
) -> None:
    """Add an input that `leader` was the first to read to the statistic of `site`, once for all that share it."""
    if leader is not site and site not in statistics:
        statistics[site] = statistics[leader]
        return
    if leader is not site and statistics[site] is statistics[leader]:
        return
    if site not in statistics:
        statistics[site] = kind(x.shape[-1], x.device)
    for part in sequences(x, real) if kind.per_sequence else [rows(x, real)]:
        statistics[site].update(part)


def _tokens(batch: Batch, anatomy: Anatomy) -> int:
    tensor = batch if isinstance(batch, Tensor) else next(iter(batch.values()))
    if anatomy.input == "pixel_values":
        return len(tensor) * 256  # patches of a usual image; bounds memory only
    return tensor.shape[0] * (tensor.shape[1] if tensor.ndim > 1 else 1)


def _relative_error(reference: Tensor, value: Tensor) -> float | None:
    """‖y − ŷ‖² / ‖y‖²; None where y is zero."""
    scale = float(reference.double().square().sum())
    return float((reference - value).double().square().sum()) / scale if scale > 0 else None
