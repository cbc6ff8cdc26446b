"""Tensors: what a model is, how it loads, answers and learns. Sync only, no trio, no peer."""
