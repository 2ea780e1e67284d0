"""summary.json, overlays and the HTML report."""
