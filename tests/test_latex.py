"""The LaTeX table: names are escaped, what is missing is a dash, and a real TeX compiles it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from analysis.report.latex import escape, main_results
from analysis.report.tables import with_imported

TEX = shutil.which("pdflatex")


def table(**changes: object) -> pd.DataFrame:
    names = {
        "backend": "torch",
        "model": "my_llama & 50%",
        "task": "gsm8k",
        "mode": "sparse-to-dense",
        "seed": 0,
        "schedule": "one-shot",
    }
    rows = [
        names | {"method": method, "sparsity": sparsity, "accuracy": accuracy, "warnings": warnings} | changes
        for method, sparsity, accuracy, warnings in (
            ("random", 0.0, 0.5, ""),
            ("random", 0.5, 0.25, "few-examples unchecked"),
            ("random", 0.9, None, "missing"),
            ("wanda-2:4", 0.0, 0.5, "at-chance hardware"),
            ("wanda-2:4", 0.5, 1.0, "at-chance UNPROVEN-NUMBER"),
        )
    ]
    return pd.DataFrame(rows).assign(
        status=lambda cells: cells["accuracy"].notna().map({True: "done", False: "missing"}),
        accuracy_stderr=lambda cells: 0.025 * cells["accuracy"].notna(),
    )


def test_each_number_has_its_uncertainty_its_mark_and_each_gap_a_dash() -> None:
    lines = main_results(table()).splitlines()
    assert r"gsm8k & accuracy & random & sparse-to-dense & 50.0\,(2.5) & 25.0\,(2.5) & -- \\" in lines
    entries = r"wanda-2:4 & sparse-to-dense & 50.0\,(2.5)\textdagger & 100.0\,(2.5)\textdaggerdbl & -- \\"
    assert f"gsm8k & accuracy & {entries}" in lines
    assert "task & metric & method & mode & 0 & 0.5 & 0.9 \\\\" in lines


def test_several_seeds_show_the_deviation_between_them_and_one_seed_the_error_over_examples() -> None:
    cells = table()
    assert "in parentheses the standard error over examples (one seed)" in main_results(cells)
    cells.loc[len(cells)] = cells.iloc[0].to_dict() | {"accuracy": 0.7, "seed": 1}
    found = main_results(cells)
    assert r"& 60.0\,(14.1) & 25.0\,(2.5)" in found, "0.5 and 0.7 lie 0.141 from their mean, over one degree of freedom"
    caption = "the standard deviation between 2 seeds, or where there is one seed the standard error over examples"
    assert caption in found


def test_the_other_metric_has_lines_of_its_own_below_the_primary_one_that_the_caption_names() -> None:
    metrics = {"primary_metric": "exact_match_strict", "exact_match_strict": 0.5, "exact_match_strict_stderr": 0.02}
    others = {"exact_match_flexible": 0.625, "exact_match_flexible_stderr": 0.012}
    found = main_results(table(**metrics, **others))
    lines = [line.split(" & ")[:3] for line in found.splitlines() if line.startswith("gsm8k &")]
    strict, flexible = r"exact\_match\_strict", r"exact\_match\_flexible"
    assert [line[1] for line in lines] == [strict, strict, flexible, flexible]
    assert r"gsm8k & exact\_match\_flexible & random & sparse-to-dense & 62.5\,(1.2) &" in found
    assert r"Primary metrics: exact\_match\_strict of gsm8k." in found


def test_what_methods_were_calibrated_on_stands_in_the_caption_and_a_shared_learning_rate() -> None:
    cells = table(calibration=None, calibration_order=None, calibration_tokens_seen=None)
    is_calibrated = cells["method"] == "wanda-2:4"
    cells.loc[is_calibrated, ["calibration", "calibration_order"]] = ("wikitext2", "sequential")
    cells["calibration_tokens_seen"] = is_calibrated.map({True: 262144.0, False: None})
    assert "Calibrated on: wanda-2:4: wikitext2, sequential, 262,144 tokens." in main_results(cells)
    assert "Calibrated on" not in main_results(table())
    assert "All at one shared learning rate." in main_results(table())


def test_another_backend_is_a_row_of_its_own() -> None:
    cells = pd.concat([table(), table().assign(backend="imported")])
    assert r"sparse-to-dense (imported) &" in main_results(cells)


def test_tasks_are_ruled_apart_and_odd_names_are_escaped() -> None:
    cells = pd.concat([table(), table().assign(task="my_task", model="my_llama & 50%")])
    lines = main_results(cells).splitlines()
    inner = [i for i, line in enumerate(lines) if line == r"\midrule"]
    assert [lines[i + 1].split(" & ")[0] for i in inner] == ["gsm8k", r"my\_task"]
    assert [line for line in lines if line.startswith(r"\caption{my\_llama \& 50\%. Primary metrics: acc")]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b", r"a\_b"),
        ("50% & more #1", r"50\% \& more \#1"),
        ("~^\\", r"\textasciitilde \textasciicircum \textbackslash "),
        ("{$}", r"\{\$\}"),
    ],
)
def test_names_are_escaped(text: str, escaped: str) -> None:
    assert escape(text) == escaped


@pytest.mark.skipif(TEX is None, reason="no TeX is installed: the table is not compiled")
def test_a_real_tex_compiles_it(tmp_path: Path) -> None:
    cells = table()
    cells["method"] = [r"odd_~^\{}$#%&", *cells["method"][1:]]
    cells = pd.concat([cells, with_imported(cells, []).assign(model="another")])
    (tmp_path / "main_results.tex").write_text(main_results(cells), encoding="utf-8")
    page = "\n".join(
        [
            r"\documentclass{article}",
            r"\usepackage{booktabs}",
            r"\begin{document}",
            r"\input{main_results}",
            r"\end{document}",
        ]
    )
    (tmp_path / "page.tex").write_text(page, encoding="utf-8")
    command = [str(TEX), "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "page.pdf").stat().st_size > 1000
    assert "undefined" not in done.stdout
