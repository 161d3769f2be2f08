"""Safetensors files against the reference implementation, and what damage and a full disk do."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from billhook.errors import BillhookError
from billhook.models import files
from billhook.models.files import DiskFull, Entry, read_index, room, write, write_atomically

DTYPES = list(files._DTYPES.values())
SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 0, 3), (2, 3, 4)]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bit pattern, NaN payloads included."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def all_kinds() -> dict[str, torch.Tensor]:
    return {f"{dtype}-{shape}": random_bits(shape, dtype, i) for i, dtype in enumerate(DTYPES) for shape in SHAPES}


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = all_kinds()
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "note": "hello"})
    stored, metadata = read_index(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt", "note": "hello"}
    assert stored.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert stored[key].nbytes == tensor.numel() * tensor.element_size()
        assert same_bits(stored[key].read(), tensor), key
        assert same_bits(stored[key].map(), tensor), key
        assert b"".join(stored[key].chunks()) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    tensors = all_kinds()
    write(tmp_path / "x.safetensors", [Entry.of(k, t) for k, t in tensors.items()], {"note": "hello"})
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert same_bits(back[key], tensor), key
    assert read_index(tmp_path / "x.safetensors")[1] == {"format": "pt", "note": "hello"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=0, max_size=4),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=4, max_size=4),
    names=st.lists(st.text(max_size=8).filter(lambda t: t != "__metadata__"), min_size=4, max_size=4, unique=True),
)
def test_round_trip_of_any_shapes_and_names(
    tmp_path: Path, shapes: list[list[int]], dtypes: list[torch.dtype], names: list[str]
) -> None:
    tensors = {n: random_bits(tuple(s), d) for n, s, d in zip(names, shapes, dtypes, strict=False)}
    write(tmp_path / "x.safetensors", [Entry.of(k, t) for k, t in tensors.items()])
    stored, _ = read_index(tmp_path / "x.safetensors")
    back = load_file(tmp_path / "x.safetensors")
    assert list(stored) == list(tensors)
    for key, tensor in tensors.items():
        assert same_bits(stored[key].read(), tensor)
        assert same_bits(back[key], tensor)


def test_views_that_are_not_contiguous_are_written_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    write(tmp_path / "x", [Entry.of("t", base.T), Entry.of("s", base[:, ::2])])
    stored, _ = read_index(tmp_path / "x")
    assert torch.equal(stored["t"].read(), base.T)
    assert torch.equal(stored["s"].read(), base[:, ::2])


def test_copying_an_entry_moves_bytes_under_a_new_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK", 7)  # many pieces that fit no element
    tensor = random_bits((5, 9), torch.bfloat16)
    save_file({"a": tensor}, tmp_path / "a")
    write(tmp_path / "b", [Entry.copy(read_index(tmp_path / "a")[0]["a"], "new"), Entry.of("x", torch.ones(1))])
    assert same_bits(load_file(tmp_path / "b")["new"], tensor)


def test_reading_gives_memory_of_its_own_and_mapping_changes_no_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "a")
    stored = read_index(tmp_path / "a")[0]["a"]
    stored.read().zero_()
    stored.map().zero_()
    assert torch.equal(stored.read(), torch.ones(4))


# -- damage ------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(4, 4), "b": torch.zeros(2)}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BillhookError, match=r"no\.safetensors is missing"):
        read_index(tmp_path / "no.safetensors")


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(BillhookError, match="cannot be read"):
        read_index(tmp_path)


def test_every_truncation_is_noticed(whole: Path) -> None:
    data = whole.read_bytes()
    for length in range(len(data)):
        whole.write_bytes(data[:length])
        with pytest.raises(BillhookError, match=r"not a whole safetensors|truncated|damaged"):
            read_index(whole)


def test_truncation_names_the_tensor_and_the_sizes(whole: Path) -> None:
    data = whole.read_bytes()
    whole.write_bytes(data[:-1])
    with pytest.raises(BillhookError, match=rf"tensor 'b' ends at byte {len(data)}, the file at {len(data) - 1}"):
        read_index(whole)


def test_a_file_that_shrinks_after_it_was_opened(whole: Path) -> None:
    stored, _ = read_index(whole)
    whole.write_bytes(whole.read_bytes()[:-4])
    with pytest.raises(BillhookError, match="truncated at tensor 'b'"):
        stored["b"].read()
    with pytest.raises(BillhookError, match="truncated at tensor 'b'"):
        list(stored["b"].chunks())


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "3",
        "null",
        "{",
        "\xff",
        '{"a": 3}',
        '{"a": {}}',
        '{"a": null}',
        '{"__metadata__": 3}',
        '{"a": {"dtype": "F32", "shape": [2]}}',
        '{"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        '{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        '{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}',
    ],
)
def test_damaged_headers(tmp_path: Path, header: str) -> None:
    text = header.encode("latin-1").ljust(8)
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(BillhookError, match="damaged safetensors header"):
        read_index(tmp_path / "x")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_one_wrong_byte_never_ends_in_a_traceback(whole: Path, position: int, value: int) -> None:
    data = bytearray(whole.read_bytes())
    data[position % len(data)] = value
    damaged = whole.with_name("damaged")
    damaged.write_bytes(data)
    with contextlib.suppress(BillhookError):
        for tensor in read_index(damaged)[0].values():
            tensor.read()


def test_unknown_dtype_is_named(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(BillhookError, match="tensor 'a' has dtype F4, which is not supported"):
        read_index(tmp_path / "x")


# -- writing is all or nothing -------------------------------------------------------------------------------


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_atomically(tmp_path / "x", broken())
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "x", [b"old"])

    def broken() -> Iterator[bytes]:
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x", broken())
    assert (tmp_path / "x").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_file_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b))[1])
    write_atomically(tmp_path / "x", [b"abc"])
    assert order == ["sync", "rename"]


@pytest.mark.parametrize("code", [28, 122])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(fd: int) -> None:
        raise OSError(code, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="is full: free some room and run the same command again"):
        write(tmp_path / "x", [Entry.of("a", torch.ones(3))])
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_bytes_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    class Full:
        def __init__(self, stream: Any) -> None:
            self.stream, self.left = stream, 2

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *args: object) -> None:
            self.stream.close()

        def write(self, data: bytes) -> None:
            self.left -= 1
            if self.left < 0:
                raise OSError(28, "No space left on device")
            self.stream.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

    monkeypatch.setattr(Path, "open", lambda self, mode="r", *a, **k: Full(real(self, mode, *a, **k)))
    with pytest.raises(DiskFull):
        write(tmp_path / "x", [Entry.of("a", torch.ones(3)), Entry.of("b", torch.ones(3))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["No space left on device (os error 28)", "Disk quota exceeded (os error 122)"])
def test_a_full_disk_that_safetensors_reports(tmp_path: Path, text: str) -> None:
    with pytest.raises(DiskFull, match="is full: free some room and save again"), room(tmp_path, "save again"):
        raise SafetensorError(f"Error while serializing: I/O error: {text}")
    with pytest.raises(SafetensorError, match="os error 5"), room(tmp_path):
        raise SafetensorError("I/O error: Input/output error (os error 5)")


def test_other_trouble_is_not_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error") as caught:
        write_atomically(tmp_path / "x", [b"abc"])
    assert not isinstance(caught.value, BillhookError)
    assert list(tmp_path.iterdir()) == []
