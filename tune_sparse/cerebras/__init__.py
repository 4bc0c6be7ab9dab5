"""The site's Cerebras environment and appliance: found, asked, and given work. Nothing of it is imported here."""
