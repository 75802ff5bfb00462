"""Reports and states as terminal text, markdown and pages."""
