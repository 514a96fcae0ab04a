"""Schedules as pure functions ``(ranks, microbatches, options) -> Schedule`` (torch-free).

One file for each family; :mod:`lightning_moe.pipeline.registry` knows them by name.
"""
