"""The pages in a real browser, against real nodes."""
