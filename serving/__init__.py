"""Arms behind one endpoint: Ray Serve deployments, an OpenAI-shaped ingress that splits traffic, a load generator.

Nothing here imports torch or transformers except the engines in :mod:`serving.engines`, which only the process that
holds a model loads.
"""
