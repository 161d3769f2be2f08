"""Code that runs where billhook cannot be imported: in a fork of one process that has Transformers loaded.

A process of its own for each would import Torch and Transformers again, which takes ten times as long as the work.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

_SECONDS = 240

_SERVER = """
import sys
sys.modules["billhook"] = None
import json, os, signal
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import safetensors.torch, torch, transformers
import transformers.generation.utils, transformers.modeling_utils
torch.set_num_threads(1)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1), os.dup2(log, 2)
            signal.alarm(request["seconds"])
            sys.argv = ["-c", *request["arguments"]]
            exec(compile(request["code"], "<foreign>", "exec"), {"__name__": "__main__"})
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
"""


@cache
def _server() -> subprocess.Popen[str]:
    modules = tempfile.TemporaryDirectory()
    atexit.register(modules.cleanup)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules.name}
    command = [sys.executable, "-I", "-c", _SERVER]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, cwd=modules.name
    )
    atexit.register(process.kill)
    return process


def run_foreign(code: str, scratch: Path, *arguments: str) -> None:
    """Run `code` with `arguments` in sys.argv[1:]; what it prints is shown if it fails."""
    log = scratch / "foreign.log"
    log.unlink(missing_ok=True)
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    request = {"code": code, "arguments": arguments, "log": str(log), "seconds": _SECONDS}
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline().strip()
    assert answer == "0", f"exit code {answer or 'none'}: {log.read_text() if log.exists() else ''}"
