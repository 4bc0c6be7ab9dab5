"""The report: tables, figures, LaTeX and the HTML page."""
