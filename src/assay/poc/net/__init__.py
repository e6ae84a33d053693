"""What every server has: settings, routes, keys, guards, threads, commits, pages, the process."""
