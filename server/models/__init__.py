"""Models and versions: loading, routing, rollback, unloading."""
