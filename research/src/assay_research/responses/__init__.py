"""The red team for served responses: cheats as programs, and the rivals on the same responses."""
