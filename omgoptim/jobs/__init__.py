"""Runs: folder, worker process, queue, progress, cancel and resume. The submitting side needs no torch."""
