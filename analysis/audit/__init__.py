"""Rules that find errors in results, and doubts about them."""
