"""The atlas: every public checkpoint measured in the same way, in one table that others can extend and verify."""

from mto_analysis.atlas.measuring import Entry, Protocol, choose_entries
from mto_analysis.atlas.merging import merge_tables
from mto_analysis.atlas.running import AtlasFolder, measure_all
from mto_analysis.atlas.table import COLUMNS, SCHEMA_VERSION, read_table
from mto_analysis.atlas.verifying import compare_again, sample_table

__all__ = [
    "COLUMNS",
    "SCHEMA_VERSION",
    "AtlasFolder",
    "Entry",
    "Protocol",
    "choose_entries",
    "compare_again",
    "measure_all",
    "merge_tables",
    "read_table",
    "sample_table",
]
