"""The LaTeX table: names are escaped, what is missing is a dash, and a real TeX compiles it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from analysis.report.latex import escape, main_results
from analysis.report.tables import with_imported, with_intervals

TEX = shutil.which("pdflatex")


def table() -> pd.DataFrame:
    names = {
        "backend": "torch",
        "model": "my_llama & 50%",
        "task": "gsm8k",
        "mode": "sparse-to-dense",
        "n_examples": 400,
    }
    rows = [
        names | {"method": method, "sparsity": sparsity, "accuracy": accuracy, "warnings": warnings}
        for method, sparsity, accuracy, warnings in (
            ("random", 0.0, 0.5, ""),
            ("random", 0.5, 0.25, "few-examples unchecked"),
            ("random", 0.9, None, "missing"),
            ("wanda-2:4", 0.0, 0.5, "at-chance hardware"),
            ("wanda-2:4", 0.5, 1.0, "at-chance UNPROVEN-NUMBER"),
        )
    ]
    return with_intervals(pd.DataFrame(rows).assign(accuracy_stderr=None))


def test_each_number_has_its_uncertainty_its_mark_and_each_gap_a_dash() -> None:
    lines = main_results(table()).splitlines()
    assert r"gsm8k & random & sparse-to-dense & 50.0\,(4.9) & 25.0\,(4.2) & -- \\" in lines
    entries = r"gsm8k & wanda-2:4 & sparse-to-dense & 50.0\,(4.9)\textdagger & 100.0\,(0.5)\textdaggerdbl & -- \\"
    assert entries in lines
    assert "task & method & mode & 0 & 0.5 & 0.9 \\\\" in lines


def test_seeds_are_averaged() -> None:
    cells = table()
    cells.loc[len(cells)] = cells.iloc[0].to_dict() | {"accuracy": 0.7}
    assert r"& 60.0\,(4.9)" in main_results(cells)


def test_another_backend_is_a_row_of_its_own() -> None:
    cells = pd.concat([table(), table().assign(backend="imported")])
    assert r"sparse-to-dense (imported) &" in main_results(cells)


def test_tasks_are_ruled_apart_and_odd_names_are_escaped() -> None:
    cells = pd.concat([table(), table().assign(task="my_task", model="my_llama & 50%")])
    lines = main_results(cells).splitlines()
    inner = [i for i, line in enumerate(lines) if line == r"\midrule"]
    assert [lines[i + 1].split(" & ")[0] for i in inner] == ["gsm8k", r"my\_task"]
    assert [line for line in lines if line.startswith(r"\caption{my\_llama \& 50\%. Accuracy in percent")]


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
