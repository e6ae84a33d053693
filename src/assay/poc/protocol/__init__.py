"""The protocol: rounds, pipelines, the transforms between a hidden state and a published value, and
proof files.
"""
