"""The `stillhouse` command: one module for each group of commands, joined in :mod:`jobs.cli.main`."""
