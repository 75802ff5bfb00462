"""The sections of a report as typed blocks: what is shown, in every form.

Each section is a function `section(report, full)` that returns a `Section`, or None where the report has nothing of
it. The short form is what fits a screen or an agent's context; the full form shows every row.
"""
