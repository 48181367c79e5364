"""The embedded demo: ``fxbasis demo``."""

from .job import run_demo as run_demo
