"""The report: sections, figures, page."""
