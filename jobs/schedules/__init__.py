"""Families that run every night: what is due, what was run, and the process that starts it. No torch, no MLflow."""

# How the cluster's answer to a request begins in a job's log.
ANSWER = "stillhouse-answer "
