"""How work reaches a cluster: the command line, submitted jobs, the checks of a machine. Imports no torch."""
