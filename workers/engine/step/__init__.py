"""Step by step: frames of any settings share denoiser forwards, and join and leave between two of them.

record.py is one frame in flight, pick.py says who shares the next forward, families/ knows how each pipeline
denoises and decodes, loop.py is the engine. docs/engine.md tells how it works.
"""
