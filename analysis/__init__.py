"""From finished records to tables, figures and findings. Nothing here trains or scores."""
