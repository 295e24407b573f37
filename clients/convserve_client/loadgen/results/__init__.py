"""Results of a run: samples, their summary, objectives, and the report."""
