"""The short way between doors and arms: a TCP connection per request under way, with small frames on it.

Through a Serve handle each request costs the processor some six milliseconds on a small machine, in the router, the
actor call and the stream of results; a frame costs a tenth of one. Serve starts, watches, replaces and counts the arms'
processes all the same; only what a request says goes this way.
"""
