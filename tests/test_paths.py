"""Files that callers name: whole or not at all, through links, and never in the place of a device or a pipe."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from results_cases import make

from protoken import RecordProbe, RecordScores, Trace, errors
from protoken.history import History

PROBE = RecordProbe(up={"w": torch.ones(2, 3)}, down={"w": -torch.ones(2, 3)}, digests={"w": "0"}, step=0.1, steps=1)
SCORES = RecordScores(("a",), (None,), np.zeros(1), np.ones(1), 0.1)
HISTORY = History((1,), ("ada",), ("a",), np.zeros((2, 1)), np.ones((1, 1)), np.zeros(1), "log_prob", 1)
# Each writes one file, and reads it back where there is a reader.
WRITERS: dict[str, tuple[Callable[[Any], object], Callable[[Any], object] | None]] = {
    "trace": (make().save, Trace.load),
    "scores": (SCORES.save, RecordScores.load),
    "probe": (PROBE.save, RecordProbe.load),
    "page": (make().to_html, None),
    "history": (HISTORY.to_html, None),
}
WHOLE = ("trace", "scores", "probe")
NO_PATHS = [None, 1, True, 1.5, b"x", ["x"], np.int64(1), np.array([1]), "", "a\0b", "\ud83d"]


@pytest.fixture(params=WRITERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 64 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("path", NO_PATHS, ids=ascii)
def test_what_is_no_path_is_named(kind: str, path: Any) -> None:
    # None is no file at all for a page, which is returned as text.
    calls = [call for call in WRITERS[kind] if call is not None and not (path is None and kind in ("page", "history"))]
    for call in calls:
        with pytest.raises(errors.ArgumentError, match="path: expected a path"):
            call(path)


def test_a_descriptor_is_no_path_and_stays_open(kind: str, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        with pytest.raises(errors.ArgumentError):
            WRITERS[kind][0](file.fileno())
        file.write("still open")
    assert (tmp_path / "file").read_text() == "still open"


def test_a_link_keeps_pointing_at_what_is_written(kind: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "file", tmp_path / "latest"
    link.symlink_to(target)
    for _ in range(2):  # the first makes the file
        WRITERS[kind][0](link)
        assert link.is_symlink()
        assert target.stat().st_size > 100
    assert os.listdir(tmp_path / "elsewhere") == ["file"]


def test_a_pipe_is_written_to_and_not_replaced(kind: str, tmp_path: Path) -> None:
    pipe, plain = tmp_path / "pipe", tmp_path / "plain"
    os.mkfifo(pipe)
    came: list[bytes] = []
    reader = threading.Thread(target=lambda: came.append(pipe.read_bytes()))
    reader.start()
    WRITERS[kind][0](pipe)
    WRITERS[kind][0](plain)
    reader.join(60)
    assert pipe.is_fifo()
    assert came == [plain.read_bytes()]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a device")
def test_a_device_stays_one(kind: str, tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
        device.write_text("x")
    except PermissionError:
        pytest.skip("no devices here")
    WRITERS[kind][0](device)
    assert device.is_char_device()


def test_what_a_shell_has_opened_is_written_to(kind: str, tmp_path: Path) -> None:
    WRITERS[kind][0](tmp_path / "plain")
    code = "import sys; sys.path.insert(0, sys.argv[1]); from test_paths import WRITERS"
    code += "; WRITERS[sys.argv[2]][0]('/dev/stdout')"
    command = [sys.executable, "-c", code, str(Path(__file__).parent), kind]
    done = subprocess.run(command, capture_output=True, timeout=300, check=False)
    assert done.stdout == (tmp_path / "plain").read_bytes(), done.stderr
    with (tmp_path / "out").open("wb") as out:
        subprocess.run(command, stdout=out, stderr=subprocess.PIPE, timeout=300, check=True)
        assert os.fstat(out.fileno()).st_nlink == 1
    assert (tmp_path / "out").read_bytes() == done.stdout


def test_rights_are_those_of_any_new_file_or_of_the_one_there_was(kind: str, tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.touch()
    old.chmod(0o640)
    before = os.umask(0o022)
    try:
        for path in (new, old):
            WRITERS[kind][0](path)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (new, old)] == [0o644, 0o640]


def test_a_full_disk_is_an_error_that_names_the_file(kind: str, tmp_path: Path) -> None:
    with full_disk(), pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as raised:
        WRITERS[kind][0](tmp_path / "file")
    assert str(tmp_path / "file") in str(raised.value)
    assert "partial" not in str(raised.value)


@pytest.mark.parametrize("kind", WHOLE)
def test_what_was_there_outlives_a_full_disk(kind: str, tmp_path: Path) -> None:
    write, read = WRITERS[kind]
    assert read is not None
    write(tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    with full_disk(), pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        write(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == before
    read(tmp_path / "file")


def test_folders_that_are_missing_or_in_the_way_are_named(kind: str, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "file"):
        with pytest.raises(OSError, match=r"directory|Directory") as raised:
            WRITERS[kind][0](path)
        assert str(path) in str(raised.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", WHOLE)
def test_a_pipe_or_folder_is_not_waited_for_when_reading(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read = WRITERS[kind][1]
    assert read is not None
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(errors.ProtokenError, match="path"):
            read(path)
