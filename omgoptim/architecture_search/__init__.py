"""Architecture search: the space, the latency predictor, the proposal rule, the study and its trials.

`space` and the modules on numbers need numpy alone; `study` needs Optuna (the extra `search`), and `auto` needs
torch.
"""
