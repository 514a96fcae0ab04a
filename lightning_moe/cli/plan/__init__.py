"""``lightning-moe plan``: what a recipe's parallel axes and pipeline lead to, before anything runs (torch-free)."""
