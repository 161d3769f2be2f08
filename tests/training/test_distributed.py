"""Pruning in data-parallel training: every process has the same mask, or an error says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, sys, time, torch, torch.distributed as dist
from torch import nn
import billhook as bh

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
if sys.argv[2] == "apart":
    torch.manual_seed(rank)  # the mistake that has to be noticed: weights that nothing keeps equal
    net[0].reset_parameters()
    model = net
else:
    model = nn.parallel.DistributedDataParallel(net)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
methods = {"granet": bh.GraNet, "set": bh.SET, "gmp": bh.GMP}
pruner = methods[sys.argv[1]](sparsity=0.8, update_every=2).attach(model, optimizer, 20)
draw = torch.Generator().manual_seed(100 + rank)  # every process has data of its own
for _ in range(20):
    optimizer.zero_grad()
    x, y = torch.randn(16, 8, generator=draw), torch.randint(0, 4, (16,), generator=draw)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    try:
        pruner.step()
    except bh.BillhookError as error:
        print("REFUSED", error)
        dist.destroy_process_group()
        sys.exit(0)
pruner.finalize()
seen = [None, None]
dist.all_gather_object(seen, [net[0].weight.tolist(), {n: m.tolist() for n, m in pruner.masks.items()}])
assert seen[0] == seen[1]
assert round(pruner.sparsity, 2) == 0.8
print("EQUAL", flush=True)
dist.barrier()  # a process that leaves while the other still reads from it brings that one down
time.sleep(0.5)
os._exit(0)  # now and then gloo's threads abort a process that takes itself down in order
"""


def run(tmp_path: Path, *arguments: str) -> str:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(path)]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr  # whole: torchrun's own traceback comes last and hides the cause
    return done.stdout


def test_masks_are_equal_on_all_processes(tmp_path: Path) -> None:
    for method in ("granet", "set"):
        assert run(tmp_path, method, "together").count("EQUAL") == 2


def test_processes_that_drifted_apart_are_refused(tmp_path: Path) -> None:
    assert "The processes disagree about the mask" in run(tmp_path, "gmp", "apart")
