"""Expert layers whose exchange of rows hides under computation."""
