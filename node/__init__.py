"""The node: the only floor that sees all the others; tasks, HTTP, command line, disk."""
