"""Experts in models and in checkpoint folders: find them, cut them, load and save what is left."""
