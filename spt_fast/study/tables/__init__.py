"""Tables of studies: ours by themselves, and beside what has been published."""

from spt_fast.study.tables.arms import read_studies
from spt_fast.study.tables.formats import FORMATS, format_tables
from spt_fast.study.tables.make import TABLES, make_tables

__all__ = ["FORMATS", "TABLES", "format_tables", "make_tables", "read_studies"]
