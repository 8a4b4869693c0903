"""Arms behind one endpoint: Ray Serve deployments, an OpenAI-shaped ingress that splits traffic, a load generator.

Nothing here imports torch or transformers except :mod:`serving.transformers_engine`, which only the process that
holds a model loads.
"""
