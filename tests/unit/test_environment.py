"""The environment: one lock for .venv, conda and Binder, in step with pyproject.toml."""

import re
import subprocess
import tomllib
from importlib.metadata import version

import yaml
from packaging.requirements import Requirement

from moeits.machine.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked(name):
    """Package -> version of a lock file, for this interpreter."""
    pins = {}
    for line in (ROOT / name).read_text().splitlines():
        if re.match(r"[a-z0-9]", line, re.IGNORECASE):
            requirement = Requirement(line.rstrip("\\ "))
            if requirement.marker is None or requirement.marker.evaluate():
                pins[requirement.name] = str(requirement.specifier).removeprefix("==")
    return pins


def wanted():
    project = PROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


def test_the_lock_satisfies_pyproject():
    pins = locked("requirements.lock")
    for requirement in wanted():
        assert requirement.specifier.contains(pins[requirement.name]), requirement
    assert locked("data.lock") == {
        requirement.name: str(requirement.specifier).removeprefix("==")
        for requirement in map(Requirement, PROJECT["dependency-groups"]["data"])
    }


def test_what_is_installed_is_what_is_locked():
    pins = locked("requirements.lock") | locked("data.lock")
    assert {name: version(name) for name in pins} == pins


def test_every_pin_has_hashes():
    for name in ("requirements.lock", "data.lock"):
        entries = re.split(r"\n(?=[a-zA-Z0-9])", (ROOT / name).read_text())
        assert all("--hash=sha256:" in entry for entry in entries if not entry.startswith("#")), name


def test_conda_and_binder_use_the_same_locks_and_python():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["--require-hashes", "-r requirements.lock"]}
    python = next(entry for entry in conda if entry.startswith("python="))
    assert Requirement(f"python{PROJECT['project']['requires-python']}").specifier.contains(
        python.removeprefix("python=") + ".0"
    )
    post_build, makefile = (ROOT / "postBuild").read_text(), (ROOT / "Makefile").read_text()
    for text in (post_build, makefile):
        assert "--no-deps --require-hashes -r data.lock" in text
        assert "--no-deps -e ." in text
    assert "--require-hashes -r requirements.lock" in makefile


def test_every_make_target_says_what_it_does():
    text = (ROOT / "Makefile").read_text()
    phony = " ".join(re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)).split()
    helped = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(phony) == set(re.findall(r"^  make ([a-z-]+) +\S", helped, re.MULTILINE))


def test_changelog_citation_and_package_have_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == citation["version"] == PROJECT["project"]["version"]


def test_every_dependency_of_the_library_is_imported_or_has_a_reason():
    read_by_others = {"accelerate", "datasets"}  # by transformers' trainer and lm-eval
    names = {"huggingface-hub": "huggingface_hub", "lm-eval": "lm_eval", "pyyaml": "yaml"}
    text = "\n".join(path.read_text() for path in (ROOT / "moeits").rglob("*.py"))
    for requirement in map(Requirement, PROJECT["project"]["dependencies"]):
        name = names.get(requirement.name, requirement.name)
        imported = re.search(rf"^\s*(import|from) {name}\b", text, re.MULTILINE)
        assert imported or requirement.name in read_by_others, requirement.name


def steps(workflow):
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / workflow).read_text())["jobs"]
    return [step["run"].strip() for job in jobs.values() for step in job["steps"] if "run" in step]


def test_public_hosting_runs_the_same_commands_as_any_machine():
    assert steps("test.yml") == ["make lint", "make test-fast", ".ci/run"]
    assert "make wheel" in steps("release.yml")
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"
