"""Studies: many runs under one budget, and the tables and pages that compare them."""
