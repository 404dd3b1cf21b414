"""The page of a study: one HTML file with tables, curves, NMI, CKA, confusion and nearest patches."""

from spt_fast.study.report.page import Report, write_report

__all__ = ["Report", "write_report"]
