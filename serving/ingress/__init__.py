"""The doors: processes that listen, draw an arm for each request, and pass its answer on."""
