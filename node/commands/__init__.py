"""What `python -m node` can do, one file a command."""
