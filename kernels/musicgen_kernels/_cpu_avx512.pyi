from ._cpu_baseline import *  # noqa: F403
