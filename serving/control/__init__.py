"""The one process that decides how the traffic goes: weights, ramps, arms that fail, experiments.

No request passes through it. The doors ask it for the plan and tell it what they have answered; while it is away they
go on by the plan they have.
"""
