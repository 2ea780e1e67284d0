"""What leaves a site: its policy, the gate that enforces it, and the log of what passed."""
