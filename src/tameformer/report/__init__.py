"""The report of a run, or of several side by side: one HTML page made from run folders alone.

Importing it imports matplotlib; import it where the report is written, not where training starts.
"""

from tameformer.report.page import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
