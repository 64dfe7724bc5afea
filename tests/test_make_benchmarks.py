"""The page of figures: what is written below a table, and the tables that other scripts measured."""

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import load_script

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(DOCS / "make_benchmarks.py")


@pytest.fixture
def report() -> dict[str, Any]:
    """One of the kept ones."""
    return json.loads(min((DOCS / "benchmarks").glob("*.json")).read_text(encoding="utf-8"))


def test_a_report_of_a_cpu(script: ModuleType, report: dict):
    text = script.section(report)
    assert "| engine MB |" in text and "GPU MB" not in text and "no figures" not in text
    assert "| dense |" in script.summary([report]).partition("\n")[0]


def test_a_report_of_a_gpu(script: ModuleType, report: dict):
    mod = report["timings"]["mod"]
    for timing in report["timings"].values():
        timing["activation_bytes"] = None
    mod |= {"device_bytes": 2_000_000_000, "activation_bytes": 1_300_000_000, "far_rows": 0.0123,
            "torch_far_rows": 0.01}
    report["timings"]["compile"] = {**mod, "folder_bytes": None, "far_rows": 0.0}
    report["failed"] = {"masked": "too large\n  found: what"}
    text = script.section(report)
    assert text.count("| GPU MB | beside weights |") == 1 and "| 2000 | 1300 |" in text
    assert "MoD: 1.23% of the rows are far from the float32 model's, in PyTorch 1.00%." in text
    assert "masked: no figures, too large." in text
    assert "| torch.compile |" in text and "|  | 2000 |" in text


def test_a_report_without_the_oracle(script: ModuleType, report: dict):
    del report["timings"]["oracle"], report["ratios"]["oracle/MoD"]
    line = script.summary([report]).splitlines()[-1]
    assert line.count("|") == 9 and line.endswith("|  |")


def test_engines_of_tensorrt_8_6(script: ModuleType):
    figure = {"build_s": 61.2, "engine_mb": 650.0, "device_mb": 900.0, "layers": {"Reformat": 2, "Gemm": 5},
              "far_rows": 0.01, "how": "graph", "times_ms": [1.0, 2.0], "median_ms": 1.5, "spread_ms": 1.0}
    made = {"title": "GPT-2 of 24 blocks, 8 x 1024", "precision": "fp16", "command": "run it",
            "machine": {"gpu": "a GPU", "tensorrt": "8.6.0"},
            "model": {"opset": 17, "capacity": 128, "routed_blocks": ["h.1"], "blocks": 2, "attend_to": "chosen",
                      "gate": "raw"},
            "variants": {"plugins": figure, "dense": {**figure, "far_rows": None, "times_ms": [], "how": ""}}}
    text = script.trt86(made)
    assert "| dense | not timed |  | 61 | 650 | 900 | 7 | 2 |  |" in text
    assert "| MoD, with plugins | 1.500 | 1.000 | 61 | 650 | 900 | 7 | 2 | 1.00% |" in text
    assert text.index("| dense |") < text.index("| MoD, with plugins |")
    made |= {"ratios": {"oracle/plugins": 0.97}, "routing_us_per_block": 21.4}
    assert "oracle/plugins 0.970; routing costs 21 us in each routed block." in script.trt86(made)


def test_models_are_compared_seed_by_seed():
    tables = load_script(DOCS / "quality_tables.py")

    def cell(loss):
        return {"flops": 0.8, "untrained": {"news": 9.0}, "trained": {"news": loss}}

    cells = {"pruned 0.8, seed 1": cell(4.5), "calibrated 0.8, seed 0": cell(1.0), "calibrated 0.8, seed 1": cell(4.0)}
    setting = {"model": "tiny", "train": ["docs.txt"], "held_out_tokens": {"news": 64}, "steps": 4, "device": "CPU",
               "sizes": {"batch": 2, "sequence": 32}, "refit": [0.05, 0.5]}
    given = {"setting": setting | {"structure": [[0, 0.0], [1, 0.625]]},
             "cells": {"pruned 0.5, seed 0": cell(6.0), "calibrated 0.5, seed 0": cell(5.75)}}
    text = tables.budgets({"setting": setting, "cells": cells}, given)
    # Of seed 0 there is no pruned one to compare with.
    assert "| 0.800 | 0.500 |" in text
    assert text.index("| pruned | 0.800 | 1 |") < text.index("| calibrated | 0.800 | 2 |")
    assert "fitted again at 5, 50 % of the steps" in text and "--budgets 0.8 " in text
    assert "`--budgets 0.5`" in text and "`--structure 0:0 1:5/8`" in text and "| 0.250 |" in text


def test_what_was_tried_is_named_by_its_options():
    tables = load_script(DOCS / "quality_tables.py")
    usual = tables.OPTIONS | {"held_out_tokens": {"news": 64}}
    cells = {f"{kind} 0.8, seed 0": {"flops": 0.8, "trained": {"news": 4.5}}
             for kind in ("dense", "pruned", "calibrated", "stochastic")}
    slower, structure = {"lr": 0.0003, "refit": []}, {"structure": [[9, 0.75], [12, 0.0]]}
    reports = [{"setting": usual | changed, "cells": cells} for changed in (
        {"adapt": 300}, slower | {"ratios": [0.375, 0.5]}, structure, slower)]
    # Of a structure that is given for a budget, the pruned model is the other report's.
    reports.append({"setting": usual | slower | structure, "cells": {
        "calibrated 0.8, seed 0": {"flops": 0.8, "trained": {"news": 4.25}}}})
    text = tables.tried(reports)
    # Of an adapted dense model what it comes to is told as well; controls are left out.
    assert re.findall(r"^\| `(.*)` \| (\w+) \|", text, re.MULTILINE) == [
        *(("--lr 0.0003 --refit --ratios 0.375 0.5", kind) for kind in ("pruned", "calibrated")),
        ("--lr 0.0003 --refit --structure A", "calibrated"),
        *(("--lr 0.0003 --refit", kind) for kind in ("pruned", "calibrated")),
        *(("--structure A", kind) for kind in ("pruned", "calibrated")),
        *(("--adapt 300", kind) for kind in ("dense", "pruned", "calibrated"))]
    assert "`A` is `9:3/4 12:0`." in text
    assert re.findall(r"^\| 0.800 \| ([-.0-9]+) \|$", text, re.MULTILINE) == ["0.250", "0.000"]
