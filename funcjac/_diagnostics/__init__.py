"""Looking inside: what runs and why, whether rows are apart, whether derivatives are right."""
