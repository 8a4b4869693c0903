"""Who may start on a cluster that families share, and who waits."""
