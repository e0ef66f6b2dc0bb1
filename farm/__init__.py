"""The control plane: takes jobs, hands out frames, counts usage. Never imports torch or workers."""
