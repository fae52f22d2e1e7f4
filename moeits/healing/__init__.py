"""Heal a pruned model: adapters by LoRA, down projections by least squares."""
