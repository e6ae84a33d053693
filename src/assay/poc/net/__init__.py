"""What services and validators share below their own parts: HTTP routes and server, keys, signatures, guards, commits."""
