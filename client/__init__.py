"""The hospital's side: a courier, and the agent behind it."""
