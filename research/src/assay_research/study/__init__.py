"""Logs of the first three experiments, their summary and page. Git history keeps what trained the
runs.
"""
