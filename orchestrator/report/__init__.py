"""The self-contained HTML report of a comparison; `page.py` puts it together."""

from orchestrator.report.page import SMOKE_TEST, render_report, write_report

__all__ = ["SMOKE_TEST", "render_report", "write_report"]
