"""The option that every benchmark has, and the toy models; `tests/test_benches.py` runs each with --smoke."""

from __future__ import annotations

import argparse

from tune_sparse.models.toy_models import toy_model


def bench_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows the docstring of a benchmark as its help and has --smoke."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--smoke", action="store_true", help="the smallest setting: shows that it runs, measures nothing"
    )
    return parser


def toy(name: str, smoke: bool) -> str:
    """Name a toy model, which is trained first where it is missing; for a smoke run one of two steps."""
    folder = toy_model(name, print, steps=2 if smoke else None)
    return str(folder) if smoke else name
