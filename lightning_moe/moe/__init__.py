"""Mixture-of-Experts layers: router, dispatch to the ranks that hold the experts, experts, combine."""
