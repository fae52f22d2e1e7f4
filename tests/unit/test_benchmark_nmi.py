import json
import math
import os
import subprocess
import sys

import pytest

from moeits.machine.paths import ROOT


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    output = tmp_path_factory.mktemp("bench") / "rows.json"
    command = [sys.executable, ROOT / "benchmarks" / "nmi.py", "--quick", "-o", output]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text()), done.stdout


def test_the_benchmark_measures_every_method_on_both_kinds_of_weights(quick):
    rows, _ = quick
    times = {(r["method"], r["variant"]): r["value"] for r in rows if r["metric"] == "time per pair"}
    methods = ("ours", "numpy", "scikit-learn", "limit")
    assert set(times) == {(method, kind) for method in methods for kind in ("normal", "heavy-tailed")}
    assert all(value > 0 for value in times.values())
    assert {r["variant"] for r in rows if r["metric"] == "exponent"} == {"experts", "elements", "bins"}
    assert all(math.isfinite(r["value"]) for r in rows)


def test_the_benchmark_compares_each_measure_with_its_bar(quick):
    _, printed = quick
    for measure in (
        "against NumPy",
        "against scikit-learn",
        "limit",
        "whole model",
        "peak memory",
        "reading",
    ):
        assert printed.count(f"small, normal: {measure}") or printed.count(f"the machine's {measure}")
    assert "heavy-tailed against normal" in printed
