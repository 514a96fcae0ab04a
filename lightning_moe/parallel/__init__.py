"""Mesh, process groups, collectives, random streams, and gradient reduction."""
