"""Measuring on another machine, through the user's own OpenSSH.

`client.py` is this side, `agent.py` the other; between them are frames on the pipes of one ssh process. Over there
nothing is installed: a package of the modules that measure, numpy and an engine lie in a cache folder.
"""
