"""APIs that other services already speak: one file each, which only translates.

served.py is what they share over submissions.submit, keys.py the ways their clients send a key.
"""
