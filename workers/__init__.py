"""The GPU side: turns what the farm hands out into images. Torch is loaded only by an engine."""
