"""The self-audit: does the code that samples, clips, sums and adds noise keep what is claimed?"""
