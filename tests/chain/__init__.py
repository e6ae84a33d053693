"""The client of the Gonka chain against the service."""
