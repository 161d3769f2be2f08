"""A process of its own for each model that is measured.

What loading a model adds to resident memory can only be told in a process that holds nothing else, and llama.cpp ends
the process where a file does not suit it. The process then keeps its model, so that models can take turns.

    python -m billhook.measure.worker

reads one JSON request a line and answers each with one JSON line. The first is {"folder" or "gguf", "dtype",
"threads", "prompt", "decode", "seed"}; then {"do": one of the methods below without an underscore}.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from billhook.errors import BillhookError


class Worker:
    """The process that measures one model, seen from the one that asks."""

    def __init__(self, label: str, request: dict[str, Any]) -> None:
        self.label = label
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        root = str(Path(__file__).resolve().parents[2])  # the child imports this package even if it is not installed
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "billhook.measure.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": paths},
            text=True,
            encoding="utf-8",
        )
        self.request = request

    def load(self) -> dict[str, Any]:
        """Load the model and run one prefill; says what that added to memory.

        Raises:
            BillhookError: the model cannot be loaded or run, or the process ended.
        """
        return self._ask(self.request)

    def ask(self, what: str) -> dict[str, Any]:
        """The answer to {"do": what}.

        Raises:
            BillhookError: the model cannot be run, or the process ended.
        """
        return self._ask({"do": what})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BillhookError(f"{self.label} could not be measured: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BillhookError(
                answer["error"] if answer["user"] else f"{self.label} could not be measured: {answer['error']}"
            )
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        if code == -9:
            return "the system ended its process, as it does when memory is short; try a smaller model."
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return f"its process ended with code {code}" + (f" ({lines[-1].strip()})." if lines else ".")

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()  # it ends at the end of its input
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()


# -- the process itself -----------------------------------------------------------------------------------


class _Folder:
    """A model folder, run by PyTorch."""

    def __init__(self, request: dict[str, Any]) -> None:
        import torch

        from billhook.measure.latency import prefill, random_prompt
        from billhook.models.load import load
        from billhook.system import (
            parse_dtype,
            peak_memory,
            release_memory,
            reset_peak_memory,
            resident_memory,
        )

        torch.set_num_threads(request["threads"])
        self.steps = request["decode"]
        config = json.loads((Path(request["folder"]) / "config.json").read_text(encoding="utf-8"))
        _import_classes(config)
        torch.ones(64, 64) @ torch.ones(64, 64)  # the math library sets up its memory at the first product
        release_memory()
        before = resident_memory()
        reset_peak_memory()
        self.model, _ = load(request["folder"], dtype=parse_dtype(request["dtype"]))
        text: Any = self.model.config.get_text_config()  # type: ignore[union-attr, operator]
        self.ids = random_prompt(int(text.vocab_size), request["prompt"], request["seed"])
        _, cache, _ = prefill(self.model, self.ids)
        peak = peak_memory()
        release_memory()
        self.loaded = {"memory": max(peak - before, 0), "resident": max(resident_memory() - before, 0)}
        del cache

    def round(self) -> dict[str, Any]:
        from billhook.measure.latency import decode, prefill

        first, cache, token = prefill(self.model, self.ids)
        return {"prefill": first, "decode": decode(self.model, cache, token, self.steps)}

    def count(self) -> dict[str, Any]:
        from billhook.measure.latency import count_flops
        from billhook.measure.size import model_size

        size = model_size(self.model)
        return {
            "flops": count_flops(self.model, self.ids),
            "parameters": size.parameters,
            "nonzero": size.nonzero,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
        }

    def profile(self) -> dict[str, Any]:
        from dataclasses import asdict

        from billhook.measure.latency import op_times

        return {name: asdict(time) for name, time in op_times(self.model, self.ids).items()}


class _GGUF:
    """A GGUF file, run by llama.cpp, which times itself."""

    def __init__(self, request: dict[str, Any]) -> None:
        import xllamacpp

        from billhook.measure.latency import random_prompt

        self.steps = request["decode"]
        params = xllamacpp.CommonParams()
        params.model.path = request["gguf"]
        params.n_ctx = request["prompt"] + request["decode"] + 8
        params.n_batch = max(params.n_batch, request["prompt"])
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.warmup = False
        params.ui = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
        self.server = xllamacpp.Server(params)
        self.ids = random_prompt(request["vocabulary"], request["prompt"], request["seed"])[0].tolist()
        self.loaded: dict[str, Any] = {}
        self.round()

    def round(self) -> dict[str, Any]:
        question = {
            "prompt": self.ids,
            "n_predict": self.steps + 1,  # the first token comes out of the prompt, before the clock starts
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        answer = self.server.handle_completions(question)
        answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
        if "timings" not in answer:
            raise RuntimeError(json.dumps(answer))
        times = answer["timings"]
        if times["prompt_n"] != len(self.ids):
            raise RuntimeError(f"llama.cpp read {times['prompt_n']} tokens of a prompt of {len(self.ids)}")
        if times["predicted_n"] != self.steps + 1:
            raise RuntimeError(f"llama.cpp wrote {times['predicted_n']} tokens instead of {self.steps + 1}")
        return {"prefill": times["prompt_ms"] / 1e3, "decode": times["predicted_ms"] / 1e3}


def _import_classes(config: dict[str, Any]) -> None:
    """Import the model's code, which is not part of what its weights add to memory."""
    import transformers

    from billhook.surgery.slim import class_named

    for name in config.get("architectures") or []:
        if class_named(name) is None:
            getattr(transformers, name, None)


def main() -> None:
    """Answer requests until the input ends."""
    # libraries print: the answers keep the real output for themselves
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        subject: Any = None
        for line in sys.stdin:
            request = json.loads(line)
            try:
                if subject is None:
                    subject = _GGUF(request) if "gguf" in request else _Folder(request)
                    answer = subject.loaded
                else:
                    answer = getattr(subject, request["do"])()
            except BillhookError as error:
                answer = {"error": str(error), "user": True}
            except Exception as error:  # goes to the process that asked, as one sentence
                text = str(error).strip()
                answer = {"error": f"{type(error).__name__}: {text.splitlines()[0] if text else ''}", "user": False}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
