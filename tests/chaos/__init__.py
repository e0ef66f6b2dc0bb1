"""For the chaos test: processes that kill themselves, a hostile store, checks, and what these must catch."""
