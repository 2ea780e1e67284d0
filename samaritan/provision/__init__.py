"""From a description of a consortium to certificates and one start-up kit per party."""
