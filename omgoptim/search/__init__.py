"""Architecture search: the space, the latency predictor, the proposal rule, the study and its trials.

`omgoptim.search.space` and the modules on numbers need numpy alone; `omgoptim.search.study` needs Optuna (the extra
`search`), and `omgoptim.search.auto` needs torch.
"""
