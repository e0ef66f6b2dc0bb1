"""Bulk uploads: how a file of lines becomes the frames of a job.

lines: reading and checking one. matrices: every combination of what a template lists. staging: rows into the staging
table. parts: what comes over HTTP, bit by bit. uploads: from the first bit to the job, or to what was wrong.
"""
