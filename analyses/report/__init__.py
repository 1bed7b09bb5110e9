"""The report: what a model looks at, which heads did the work, and how far that can be trusted, on one page or in the terminal."""

from analyses.report.findings import Findings, find
from analyses.report.page import report_page
from analyses.report.question import Question, from_pairs, from_prompt, from_task

__all__ = ["Findings", "Question", "find", "from_pairs", "from_prompt", "from_task", "report_page"]
