"""What a compilation tells people: the summary of a manifest and the HTML report. Both read the manifest alone."""
