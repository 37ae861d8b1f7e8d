"""Files and folders appear whole or not at all."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from d2llm.errors import ArgumentError, DataError, ModelError, OutputExistsError
from d2llm.files import folder_beside, new_folder, replaced, require_new, write_lines


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    file = tmp_path / "kept.txt"
    file.write_text("old")
    with replaced(file) as staging:
        staging.write_text("new")
        assert file.read_text() == "old", "until the block has ended"
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "kept.txt"
    write_lines(file, ["old"])

    def lines() -> list[str]:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"), replaced(file) as staging:
        staging.write_text("half")
        lines()
    assert file.read_text() == "old\n" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_replaced_file_has_the_permissions_of_a_new_one(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with replaced(tmp_path / "weights") as staging:
            staging.unlink()
            staging.touch(0o600)  # as safetensors does
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "weights").stat().st_mode) == 0o666 & ~mask


def test_lines_are_written_into_a_new_folder(tmp_path: Path) -> None:
    write_lines(tmp_path / "a" / "b.txt", ["one", "zwei ü"])
    assert (tmp_path / "a" / "b.txt").read_bytes() == "one\nzwei ü\n".encode()


def test_what_is_there_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    require_new(tmp_path / "empty")
    require_new(tmp_path / "nothing")
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("file", "full", "link"):
        with pytest.raises(OutputExistsError, match=f"{name} exists already. Choose another name or remove it first"):
            require_new(tmp_path / name)
        for kind in (DataError, ModelError):  # what earlier releases raised
            with pytest.raises(kind, match="exists already"), new_folder(tmp_path / name):
                raise AssertionError("nothing is to be done")


def test_the_content_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run removes its checkpoint next: a power cut must not leave neither."""
    synced, fsync = set[tuple[int, bool]](), os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.add((os.fstat(descriptor).st_ino, (tmp_path / "folder").exists()))

    monkeypatch.setattr(os, "fsync", noted)
    with new_folder(tmp_path / "folder") as staging:
        (staging / "inner").mkdir()
        (staging / "inner" / "weights").write_text("heavy")
        (staging / "config").write_text("light")
    files = [path for path in (tmp_path / "folder").rglob("*") if path.is_file()]
    assert synced == {(path.stat().st_ino, False) for path in files} and len(files) == 2


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    target = tmp_path / "a [model]"
    code = "import sys, pathlib, d2llm.files\n"
    code += "with d2llm.files.new_folder(pathlib.Path(sys.argv[1])): print(flush=True), sys.stdin.read()"
    killed = [sys.executable, "-c", code, str(target)]
    with subprocess.Popen(killed, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (working,) = tmp_path.glob(".*.part")
        with folder_beside(target):
            assert working.exists()  # its process still runs
        process.kill()
    assert working.exists()
    with folder_beside(tmp_path / "another"), folder_beside(tmp_path / "a"):
        assert working.exists()
    with folder_beside(target) as folder:
        assert {path.name for path in tmp_path.iterdir()} == {folder.name, f"{folder.name}.lock"}
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match=r"file/x/out cannot be written: .*/file is no folder"):
        require_new(tmp_path / "file" / "x" / "out")
    with pytest.raises(OutputExistsError, match="empty exists already"):
        require_new(tmp_path / "empty", file=True)
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ArgumentError, match=r"\. is no name for an output: name a new folder"):
        require_new(Path("."))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_permits_no_new_files_is_refused_before_the_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(ArgumentError, match="permits no new files"):
        require_new(tmp_path / "x" / "out")
