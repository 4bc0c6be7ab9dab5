"""Statistics, comparisons, and the sentences that they support."""
