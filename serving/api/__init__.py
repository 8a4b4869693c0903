"""OpenAI's wire shapes: what comes in (:mod:`requests`), what goes out (:mod:`replies`), and how errors look."""
