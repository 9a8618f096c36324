"""Frozen features as bags: extraction by pretrained networks, heads trained on them, and what the heads find."""
