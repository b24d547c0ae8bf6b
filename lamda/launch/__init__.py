"""Entry points of launchers and commands: each combines a task, a framework and the benchmarks."""
