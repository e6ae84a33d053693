"""What every server of assay has: settings, routes, keys, guards, threads, commits, pages and the
server process.
"""
